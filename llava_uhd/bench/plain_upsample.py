"""Joint bilateral upsampling as the original computes it, with two forms of its 7x7 sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from llava_uhd.vision.adaptive_conv_plan import REACH, TAPS
from llava_uhd.vision.upsampler import Fixup, JBUStage, UpsamplerStack

Convolution = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def unfold_convolution(padded: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """All windows side by side in memory, times the kernels, summed.

    Args:
        padded: (B, C, H + 6, W + 6).
        kernel: (B, H, W, 7, 7).

    Returns:
        (B, C, H, W).
    """
    batch, height, width = kernel.shape[:3]
    windows = F.unfold(padded, TAPS).view(batch, -1, TAPS**2, height, width)
    return (windows * kernel.flatten(3).permute(0, 3, 1, 2).unsqueeze(1)).sum(2)


def shift_convolution(padded: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """The padded map shifted 49 times, each times its tap's weights, summed; see above."""
    height, width = kernel.shape[1:3]
    taps = kernel.permute(3, 4, 0, 1, 2).contiguous()
    result = torch.zeros_like(padded[:, :, :height, :width])
    for row in range(TAPS):
        for column in range(TAPS):
            shifted = padded[:, :, row : row + height, column : column + width]
            result = torch.addcmul(result, shifted, taps[row, column].unsqueeze(1))
    return result


CONVOLUTIONS: dict[str, Convolution] = {
    "unfold, multiply, sum": unfold_convolution,
    "sum of 49 shifts": shift_convolution,
}


def upsample(source: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) to the padded map (B, C, 2h + 6, 2w + 6)."""
    larger = F.interpolate(source, scale_factor=2, mode="bicubic", align_corners=False)
    return F.pad(larger, (REACH,) * 4, mode="reflect")


def range_kernel(stage: JBUStage, guidance: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) to (B, 49, H, W), through all windows of the keys side by side."""
    keys = stage.range_proj(guidance)
    batch, width, rows, columns = keys.shape
    windows = F.unfold(F.pad(keys, (REACH,) * 4, mode="reflect"), TAPS)
    scores = (windows.view(batch, width, -1, rows, columns) * keys.unsqueeze(2)).sum(1)
    return (stage.range_temp.exp().clamp(1e-4, 1e4) * scores).softmax(1)


def stage_kernel(stage: JBUStage, guidance: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) to (B, H, W, 7, 7), a view."""
    spatial = stage.spatial_kernel(torch.float32).view(1, -1, 1, 1)
    kernel = range_kernel(stage, guidance) * spatial
    kernel = kernel / kernel.sum(1, keepdim=True).clamp_min(1e-7)
    kernel = kernel + 0.1 * stage.fixup_proj(torch.cat([kernel, guidance], 1))
    return kernel.permute(0, 2, 3, 1).unflatten(-1, (TAPS, TAPS))


def run_stage(
    stage: JBUStage, source: torch.Tensor, guidance: torch.Tensor, convolution: Convolution
) -> torch.Tensor:
    """(B, C, h, w) and the image (B, 3, H, W) to (B, C, 2h, 2w)."""
    small = F.adaptive_avg_pool2d(guidance, (2 * source.shape[2], 2 * source.shape[3]))
    return convolution(upsample(source), stage_kernel(stage, small))


def run_fixup(fixup: Fixup, maps: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) to the same."""
    dropout, convolution = fixup
    assert isinstance(convolution, torch.nn.Conv2d)
    return 0.1 * F.conv2d(dropout(maps), convolution.weight, convolution.bias) + maps


def run_stack(
    stack: UpsamplerStack, source: torch.Tensor, guidance: torch.Tensor, convolution: Convolution
) -> dict[int, torch.Tensor]:
    """`UpsamplerStack.forward` in float32."""
    maps: dict[int, torch.Tensor] = {}
    for scale, stage in stack.stages().items():
        source = run_stage(stage, source, guidance, convolution)
        fixup = stack.fixup(scale)
        if fixup is not None:
            source = run_fixup(fixup, source)
        maps[scale] = source
    return maps
