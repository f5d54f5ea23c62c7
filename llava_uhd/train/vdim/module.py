"""What learns in a VDIM pre-training, and the loss of one step.

A step shows each picture in a few jittered views. The tower's features of a view are the target;
the guess are the upsampler's maps of the untouched picture, jittered alike and shrunk by a learned
downsampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from llava_uhd.config.vdim import VdimConfig
from llava_uhd.train.vdim.downsampler import AttentionDownsampler, SimpleDownsampler
from llava_uhd.train.vdim.draws import Draws
from llava_uhd.train.vdim.jitter import JitterRange, apply_jitter
from llava_uhd.train.vdim.losses import crf_loss, entropy, reconstruction_loss, tv_loss
from llava_uhd.train.vdim.resample import Resampling
from llava_uhd.vision.towers import VisionTower
from llava_uhd.vision.upsampler import UpsamplerStack

# Scale of the plain features, which the control heads read.
CONTROL = 1


class TowerFeatures(nn.Module):
    """A frozen tower over square pictures, each one view.

    Args:
        tower: the vision tower.
    """

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.patch = int(tower.config.patch_size)
        self.width = int(tower.config.hidden_size)

    def train(self, mode: bool = True) -> TowerFeatures:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalised pictures to float32 (B, C, H / patch, W / patch).

        Raises:
            ValueError: sides that are no multiples of the patch.
        """
        batch, _, height, width = pictures.shape
        p = self.patch
        if height % p or width % p:
            raise ValueError(f"pictures of {height} x {width} have no whole patches of {p}")
        rows, columns = height // p, width // p
        tiles = pictures.view(batch, 3, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        grids = torch.tensor([[rows, columns]] * batch)
        features = self.tower(tiles.reshape(-1, 3 * p * p), grids)
        return features.view(batch, rows, columns, -1).permute(0, 3, 1, 2).float()


def enlarge(maps: torch.Tensor, size: tuple[int, int], mode: str = "bilinear") -> torch.Tensor:
    """Maps in picture resolution: (B, C, h, w) to (B, C, *size)."""
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode=mode, align_corners=False)


@dataclass(frozen=True)
class Projection:
    """Random directions in which features are compared.

    Attributes:
        matrix: (B, C, D) with columns of length 1, or None to compare the channels themselves.
    """

    matrix: torch.Tensor | None

    @classmethod
    def drawn(cls, like: torch.Tensor, draws: Draws, to: int | None) -> Projection:
        """Draws directions for features (B, C, ...)."""
        if to is None:
            return cls(None)
        matrix = draws.projection(like.shape[0], like.shape[1], to).to(like.device)
        return cls(matrix / matrix.norm(dim=1, keepdim=True))

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, ...) to float32 (B, D, ...)."""
        if self.matrix is None:
            return features.float()
        with torch.autocast(features.device.type, enabled=False):
            return torch.einsum("bc...,bcd->bd...", features.float(), self.matrix)


class ScaleNet(nn.Module):
    """Predicts from features how far a guess of them will be off.

    Args:
        width: channels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Conv2d(width, 1, 1)

    def reset_weights(self) -> None:
        """A tenth of the framework's default."""
        self.net.reset_parameters()
        with torch.no_grad():
            self.net.weight.mul_(0.1)
            if self.net.bias is not None:
                self.net.bias.mul_(0.1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to float32 (B, 1, h, w), at least 1e-4."""
        return torch.exp(self.net(features).float() + 0.1).clamp(min=1e-4)


class Head(nn.Module):
    """Downsampler and uncertainty of one scale."""

    downsampler: AttentionDownsampler | SimpleDownsampler
    scale_net: ScaleNet | None

    def __init__(self, width: int, patch: int, config: VdimConfig) -> None:
        super().__init__()
        self.downsampler = (
            AttentionDownsampler(width, patch, config.blur, config.dropout)
            if config.downsampler == "attention"
            else SimpleDownsampler(patch)
        )
        self.scale_net = ScaleNet(width) if config.predicted_uncertainty else None


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are at hand already.

    They were summed view by view, so that the graph of only one view is alive at a time; to the
    trainer, to accumulation and to several processes it is one forward and one backward pass.
    """

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        """``tensors``: parameters, then their gradients."""
        ctx.save_for_backward(*tensors[count:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients, scaled."""
        own = [outputs[0] * gradient for gradient in ctx.saved_tensors]
        return (None, None, *own, *([None] * len(own)))


class GradientSum:
    """Adds up gradients of several losses; what a loss does not depend on counts as 0.

    Args:
        tensors: that the gradients belong to.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = list(tensors)
        self.sums = [torch.zeros_like(tensor) for tensor in self.tensors]

    def add(
        self, outputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor] | None = None
    ) -> None:
        """Adds the gradients of ``outputs``, weighted for tensors, and frees their graph."""
        # A step may run under autocast, a backward pass should not.
        with torch.autocast(outputs[0].device.type, enabled=False):
            found = torch.autograd.grad(outputs, self.tensors, weights, allow_unused=True)
        for total, gradient in zip(self.sums, found, strict=True):
            if gradient is not None:
                total += gradient


def shrink(
    head: Head, maps: torch.Tensor, view: Resampling, keep: torch.Tensor | None = None
) -> torch.Tensor:
    """Jitters maps like their picture and shrinks them to the tower's grid.

    Args:
        head: whose downsampler.
        maps: (B, C, h, w) of any size.
        view: from the map to the view, without blur.
        keep: see `AttentionDownsampler`.

    Returns:
        float32 (B, C, H / patch, W / patch).
    """
    blurred = replace(view, blur=head.downsampler.blur)
    with torch.autocast(maps.device.type, enabled=False):
        small: torch.Tensor = head.downsampler.pool_resampled(maps.float(), blurred, keep)
    return small


class VdimModule(nn.Module):
    """Frozen features, the stack that learns, and a head per scale.

    Args:
        features: module with ``width`` and ``patch`` that maps (B, 3, H, W) to (B, C, h, w).
        config: of the recipe.
    """

    def __init__(self, features: TowerFeatures, config: VdimConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = features.patch
        self.features = features
        self.upsampler = UpsamplerStack(features.width, config.scale)
        self.heads = nn.ModuleDict(
            {
                self.head_name(scale): Head(features.width, features.patch, config)
                for scale in self.scales
            }
        )

    @staticmethod
    def head_name(scale: int) -> str:
        """Name of a scale's head. Example: ``4x``."""
        return f"{scale}x"

    def head(self, name: str) -> Head:
        """The head of that name."""
        found = self.heads[name]
        assert isinstance(found, Head)
        return found

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales with a head, largest first, as the published code goes through them."""
        control = (CONTROL,) if self.config.control else ()
        return (*reversed(self.config.scales), *control)

    def reset_weights(self) -> None:
        """Initial values of everything that learns."""
        self.upsampler.reset_weights()
        for module in self.heads.modules():
            if isinstance(module, AttentionDownsampler | SimpleDownsampler | ScaleNet):
                module.reset_weights()

    def learning(self, control: bool = True) -> list[nn.Parameter]:
        """Parameters that learn.

        Args:
            control: with those of the control heads, whose gradient no other parameter sees.
        """
        own = f"heads.{self.head_name(CONTROL)}."
        return [
            parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and (control or not name.startswith(own))
        ]

    def maps(self, pictures: torch.Tensor, source: torch.Tensor) -> dict[int, torch.Tensor]:
        """Maps that the heads read, by scale; the control's is the tower's own.

        Args:
            pictures: (B, 3, H, W).
            source: (B, C, h, w) their features.
        """
        found = self.upsampler.stage_maps(source, pictures, detach=self.config.detach)
        maps = {scale: found[scale] for scale in self.config.scales}
        return maps | ({CONTROL: source} if self.config.control else {})

    def forward(
        self, pictures: torch.Tensor, seed: int = 0, draws: Draws | None = None
    ) -> dict[str, torch.Tensor]:
        """The loss of one step.

        Args:
            pictures: (B, 3, H, W) normalised, sides multiples of the patch.
            seed: of everything random in the step, dropout included.
            draws: instead of those of the seed.

        Returns:
            ``loss``, which carries the gradients, and its parts under their published names
            without the ``loss/`` in front: ``rec_4x`` (sum over the views), ``crf_4x``, ``tv``,
            ``ent``, ``total`` (without the control).
        """
        devices = [pictures.device] if pictures.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return self._step(pictures, draws or Draws(seed))

    def _step(self, pictures: torch.Tensor, draws: Draws) -> dict[str, torch.Tensor]:
        learning = self.learning() if torch.is_grad_enabled() else []
        source = self.features(pictures)
        # Maps made once are cut off the stack: each view leaves its gradient at the cut, and the
        # sum of all goes through the stack at the end.
        whole = self.maps(pictures, source) if self.config.reuse_maps else {}
        taught = [scale for scale in whole if whole[scale].requires_grad]
        cut = {s: m.detach().requires_grad_(s in taught) for s, m in whole.items()}
        gradients = GradientSum([*learning, *(cut[scale] for scale in taught)])
        parts: dict[str, torch.Tensor] = {}
        loss = torch.zeros((), device=pictures.device)
        for index in range(self.config.n_jitters):
            seen = cut or self.maps(pictures, source)
            view, found = self.view_loss(pictures, seen, draws, index == 0)
            if learning:
                gradients.add([view])
            loss = loss + view.detach()
            for name, value in found.items():
                parts[name] = parts.get(name, torch.zeros_like(loss)) + value.detach()
        if not learning:
            return {"loss": loss, **parts}
        own, at_cut = gradients.sums[: len(learning)], gradients.sums[len(learning) :]
        if taught:
            through = GradientSum(learning)
            through.add([whole[scale] for scale in taught], at_cut)
            own = [one + other for one, other in zip(own, through.sums, strict=True)]
        return {"loss": _WithGradients.apply(loss, len(learning), *learning, *own), **parts}

    def view_loss(
        self, pictures: torch.Tensor, seen: dict[int, torch.Tensor], draws: Draws, first: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of one view of each picture.

        Args:
            pictures: (B, 3, H, W).
            seen: their maps by scale.
            draws: what is random.
            first: whether it is the view that the terms other than the reconstruction judge.

        Returns:
            The loss and its parts.
        """
        config = self.config
        size = (int(pictures.shape[-2]), int(pictures.shape[-1]))
        jitter = draws.jitter(JitterRange(config.max_pad, config.max_zoom, config.use_flips), size)
        view = apply_jitter(pictures, jitter, config.max_pad)
        target = self.features(view)
        project = Projection.drawn(target, draws, config.random_projection)
        guidance = view if config.crf_jittered else pictures
        parts: dict[str, torch.Tensor] = {}
        loss = torch.zeros((), device=pictures.device)
        for scale in self.scales:
            name = self.head_name(scale)
            head = self.head(name)
            sharp = Resampling(size, jitter, config.max_pad)
            keep = draws.keep(
                len(pictures), target.shape[-2], target.shape[-1], control=scale == CONTROL
            )
            guess = shrink(head, seen[scale], sharp, keep.to(pictures.device))
            deviation = None if head.scale_net is None else head.scale_net(target)
            error = reconstruction_loss(project(guess), project(target), deviation)
            parts[f"rec_{name}"] = error / config.n_jitters
            loss = loss + parts[f"rec_{name}"]
            if first and scale != CONTROL:
                # Projection and resampling commute, and a projected map is much smaller.
                projected = sharp(project(seen[scale])) if config.crf_weight else None
                found = self.other_terms(head, guidance, projected, draws)
                if config.tv_weight:
                    found["tv"] = tv_loss(sharp(seen[scale]).square().sum(1, keepdim=True))
                parts[f"crf_{name}"] = found["crf"]
                for term in ("tv", "ent"):
                    parts[term] = parts.get(term, torch.zeros_like(loss)) + found[term]
                loss = loss + config.crf_weight * found["crf"] + config.tv_weight * found["tv"]
                loss = loss - config.filter_ent_weight * found["ent"]
        control = parts.get(f"rec_{self.head_name(CONTROL)}", torch.zeros_like(loss))
        return loss, {**parts, "total": loss - control}

    def other_terms(
        self,
        head: Head,
        guidance: torch.Tensor,
        projected: torch.Tensor | None,
        draws: Draws,
    ) -> dict[str, torch.Tensor]:
        """Conditional random field and entropy; 0 where the weight is 0."""
        zero = torch.zeros((), device=guidance.device)
        terms = {"crf": zero, "tv": zero, "ent": zero}
        if projected is not None:
            size = (int(guidance.shape[-2]), int(guidance.shape[-1]))
            points = draws.points(size, self.config.crf_points).to(guidance.device)
            terms["crf"] = crf_loss(guidance, projected, points)
        if self.config.filter_ent_weight:
            assert isinstance(head.downsampler, SimpleDownsampler)
            terms["ent"] = entropy(head.downsampler.kernel())
        return terms
