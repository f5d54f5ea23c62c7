"""Learned joint bilateral upsampling of feature maps, guided by the image (the VDIM of UHD v2).

A stage doubles a map: it upsamples it and convolves it with a 7x7 kernel for every pixel, made from
the image at that size. Stacks of one, two or three stages give maps of 2, 4 or 8 times the tower's
resolution. Parameter names and arithmetic are those of the published files; the adaptive
convolution is `adaptive_conv`.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from llava_uhd.vision.adaptive_conv import upsample_conv, window_products
from llava_uhd.vision.adaptive_conv_plan import TAPS

KEY_WIDTH = 32
GUIDANCE_WIDTH = 3
STACKS = (2, 4, 8)

# Elements of a map that the last 1x1 convolution takes at a time where nothing learns.
IN_PLACE_ELEMENTS = 2**20


def stack_scale(scales: Collection[int]) -> int | None:
    """The stack that yields these scales: the largest above 1, or None if there is none.

    Example: (1, 4) is served by the 4x stack.
    """
    above = [scale for scale in scales if scale > 1]
    return max(above) if above else None


def learns(module: nn.Module) -> bool:
    """Whether any parameter of the module requires a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def call(module: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    """Runs a module, and what it holds in a row, without its hooks.

    A stack runs once for every kind of view shape in a batch. Hooks are where ZeRO-3 collects
    weights, in an order that must be the same in every process: so they run once, at the module
    that calls the stack.
    """
    if type(module) is nn.Sequential:
        for part in module:
            inputs = (call(part, *inputs),)
        return inputs[0]
    result: torch.Tensor = module.forward(*inputs)
    return result


def reset_conv(conv: nn.Conv2d) -> None:
    """The framework's initial values, also for modules that were built without storage."""
    fan_in = conv.weight[0].numel()
    init.kaiming_uniform_(conv.weight, a=5**0.5)
    if conv.bias is not None:
        init.uniform_(conv.bias, -(fan_in**-0.5), fan_in**-0.5)


class QuietWhileFrozen(nn.Module):
    """Stays in evaluation mode (no dropout) while none of its parameters learns."""

    def train(self, mode: bool = True) -> QuietWhileFrozen:
        """As in any module, but frozen parameters keep it in evaluation mode."""
        super().train(mode and learns(self))
        return self

    def hush(self) -> None:
        """Back to evaluation mode if the module was frozen after `train`."""
        if self.training and not learns(self):
            self.eval()


class JBUStage(QuietWhileFrozen):
    """One doubling (published as ``JBULearnedRange``): 7x7 taps, keys of 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        count = TAPS * TAPS
        self.range_temp = nn.Parameter(torch.empty(()))
        self.sigma_spatial = nn.Parameter(torch.empty(()))
        self.range_proj = nn.Sequential(
            nn.Conv2d(GUIDANCE_WIDTH, KEY_WIDTH, 1),
            nn.GELU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(KEY_WIDTH, KEY_WIDTH, 1),
        )
        self.fixup_proj = nn.Sequential(
            nn.Conv2d(count + GUIDANCE_WIDTH, count, 1),
            nn.GELU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(count, count, 1),
        )

    def reset_weights(self) -> None:
        """Published initial values."""
        init.zeros_(self.range_temp)
        init.ones_(self.sigma_spatial)
        for part in (self.range_proj, self.fixup_proj):
            for module in part:
                if isinstance(module, nn.Conv2d):
                    reset_conv(module)

    def range_kernel(self, guidance: torch.Tensor) -> torch.Tensor:
        """How alike a pixel of the guidance and its neighbours are, summing to one.

        Args:
            guidance: (B, 3, H, W) in the dtype of the parameters.

        Returns:
            (B, H, W, 49), float32 or better.
        """
        keys = call(self.range_proj, guidance).permute(0, 2, 3, 1)  # (B, H, W, 32)
        scores = window_products(keys).flatten(3)
        temperature = self.range_temp.to(scores.dtype).exp().clamp(1e-4, 1e4)
        return (temperature * scores).softmax(-1)

    def spatial_kernel(self, dtype: torch.dtype) -> torch.Tensor:
        """Gaussian of the distance in units of 3 pixels: (49,)."""
        axis = torch.linspace(-1, 1, TAPS, dtype=dtype, device=self.sigma_spatial.device).square()
        distance = (axis[:, None] + axis).flatten()
        return torch.exp(-distance / (2 * self.sigma_spatial.to(dtype).square()))

    def kernel(self, guidance: torch.Tensor) -> torch.Tensor:
        """The kernel of every pixel.

        Args:
            guidance: (B, 3, H, W) in the dtype of the parameters.

        Returns:
            (B, H, W, 7, 7), float32 or better. Not normalised after its last correction.
        """
        kernel = self.range_kernel(guidance)
        kernel = kernel * self.spatial_kernel(kernel.dtype)
        kernel = kernel / kernel.sum(-1, keepdim=True).clamp_min(1e-7)
        pixels = kernel.permute(0, 3, 1, 2)
        correction = call(self.fixup_proj, torch.cat([pixels.to(guidance.dtype), guidance], 1))
        kernel = torch.add(kernel, correction.permute(0, 2, 3, 1), alpha=0.1)
        return kernel.unflatten(-1, (TAPS, TAPS))

    def forward(self, source: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Doubles a map.

        Args:
            source: (B, h, w, C), channels last.
            guidance: (B, 3, H, W), the whole image at any size.

        Returns:
            (B, 2h, 2w, C) in the dtype of ``source``.
        """
        self.hush()
        size = (2 * source.shape[1], 2 * source.shape[2])
        small = F.adaptive_avg_pool2d(guidance, size).to(self.range_temp.dtype)
        return upsample_conv(source, self.kernel(small))


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of channels-last rows (..., C), which is a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(..., C) to the same."""
        return F.linear(rows, self.weight.flatten(1), self.bias)


class Fixup(QuietWhileFrozen, nn.Sequential):
    """``x + 0.1 * conv(x)``, a 1x1 convolution behind channel dropout.

    A sequence of the two because the published parameter names are its.
    """

    def __init__(self, width: int) -> None:
        super().__init__(nn.Dropout2d(0.2), PointwiseConv(width))

    def reset_weights(self) -> None:
        """Published initial values."""
        for module in self:
            if isinstance(module, nn.Conv2d):
                reset_conv(module)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Corrects maps; where nothing is to be learned, in place.

        Args:
            maps: (B, H, W, C), channels last, which the caller gives away.

        Returns:
            (B, H, W, C).
        """
        self.hush()
        dropout, conv = self
        grad = torch.is_grad_enabled() and (maps.requires_grad or learns(self))
        if grad or self.training:
            dropped = call(dropout, maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return torch.add(maps, call(conv, dropped), alpha=0.1)
        for rows in maps.view(-1, maps.shape[-1]).split(IN_PLACE_ELEMENTS // maps.shape[-1] + 1):
            rows.add_(call(conv, rows), alpha=0.1)
        return maps


class UpsamplerStack(QuietWhileFrozen):
    """Feature maps at 2, 4 or 8 times the tower's resolution.

    Parameter names are the published ones. Maps and guidance may come in any float dtype: the work
    is done in the parameters', the kernels' statistics in float32 or better.

    The 8x stack has a correction behind every stage; its plain ``fixup_proj`` serves `final_map`
    only. Elsewhere it is tied in with weight zero, so that all parameters that learn have
    gradients, as data parallel training demands.

    Args:
        width: channels of the maps.
        scale: 2, 4 or 8.

    Raises:
        ValueError: another scale.
    """

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        if scale not in STACKS:
            raise ValueError(f"there are upsampler stacks for the scales 2, 4 and 8, not {scale}")
        self.scale = scale
        self.scales = tuple(each for each in STACKS if each <= scale)
        for index in range(len(self.scales)):
            self.add_module(f"up{index + 1}", JBUStage())
        self.fixup_proj = Fixup(width)
        if scale == 8:
            for each in self.scales:
                self.add_module(f"fixup_proj_{each}x", Fixup(width))

    def reset_weights(self) -> None:
        """Published initial values of all parts."""
        for module in self.modules():
            if isinstance(module, JBUStage | Fixup):
                module.reset_weights()

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.parameters()).dtype

    def stages(self) -> dict[int, JBUStage]:
        """The stage that makes the map of each scale, from the smallest."""
        found = {}
        for index, scale in enumerate(self.scales):
            stage = getattr(self, f"up{index + 1}")
            assert isinstance(stage, JBUStage)
            found[scale] = stage
        return found

    def fixup(self, scale: int) -> Fixup | None:
        """The correction of the map of a scale, if it has one."""
        name = f"fixup_proj_{scale}x" if self.scale == 8 else "fixup_proj"
        if self.scale != 8 and scale != self.scale:
            return None
        fixup = getattr(self, name)
        assert isinstance(fixup, Fixup)
        return fixup

    def forward(
        self,
        source: torch.Tensor,
        guidance: torch.Tensor,
        wanted: Collection[int] | None = None,
    ) -> dict[int, torch.Tensor]:
        """The maps as the language model's projector reads them.

        Args:
            source: (B, C, h, w) features, any memory format.
            guidance: (B, 3, H, W), the whole normalised image; need not be a multiple of the map.
            wanted: scales to return; None for all.

        Returns:
            Scale -> (B, C, scale * h, scale * w) in the parameters' dtype, channels last in memory.

        Raises:
            ValueError: a scale that this stack does not have, or batches that differ.
        """
        return self._run(source, guidance, wanted, detach=False)

    def stage_maps(
        self, source: torch.Tensor, guidance: torch.Tensor, detach: bool = True
    ) -> dict[int, torch.Tensor]:
        """All maps, for a loss at every scale.

        Args:
            source: see `forward`.
            guidance: see `forward`.
            detach: as published, a stage does not learn from the losses of larger scales.

        Returns:
            See `forward`.
        """
        return self._run(source, guidance, None, detach)

    def final_map(self, source: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """The largest map, corrected once: (B, C, scale * h, scale * w).

        Differs from `forward` for the 8x stack only, which there corrects every map.
        """
        rows = self._rows(source, guidance)
        for stage in self.stages().values():
            rows = call(stage, rows, guidance)
        return call(self.fixup_proj, rows).permute(0, 3, 1, 2)

    def _rows(self, source: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Channels last in the parameters' dtype, checked."""
        self.hush()
        if source.dim() != 4 or guidance.dim() != 4 or len(source) != len(guidance):
            raise ValueError(
                "the upsampler needs maps (B, C, h, w) and images (B, 3, H, W), got "
                f"{tuple(source.shape)} and {tuple(guidance.shape)}"
            )
        return source.permute(0, 2, 3, 1).to(self.dtype)

    def _run(
        self,
        source: torch.Tensor,
        guidance: torch.Tensor,
        wanted: Collection[int] | None,
        detach: bool,
    ) -> dict[int, torch.Tensor]:
        chosen = set(self.scales if wanted is None else wanted)
        if not chosen <= set(self.scales):
            raise ValueError(f"a {self.scale}x stack makes {self.scales}, not {sorted(chosen)}")
        rows = self._rows(source, guidance)
        maps: dict[int, torch.Tensor] = {}
        for scale, stage in self.stages().items():
            if scale > max(chosen, default=0):
                break
            rows = call(stage, rows, guidance)
            fixup = self.fixup(scale)
            if fixup is not None:
                rows = call(fixup, rows)
            if scale == 8 and torch.is_grad_enabled() and learns(self.fixup_proj):
                idle = [each.sum() for each in self.fixup_proj.parameters()]
                rows.add_(torch.stack(idle).sum() * 0.0)
            if scale in chosen:
                maps[scale] = rows.permute(0, 3, 1, 2)
            if detach:
                rows = rows.detach()
        return maps
