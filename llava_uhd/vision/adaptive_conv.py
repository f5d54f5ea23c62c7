"""The 7x7 convolution with a kernel for every pixel, shared by all channels.

Three operations, each with the derivatives of the others:

- convolve: every output pixel is the sum of its window times its kernel;
- its transpose, the gradient of the source;
- correlate: the products of a pixel with its window, which is the gradient of the kernels, and
  also what the range kernel of a joint bilateral upsampler begins with.

The source may first be upsampled to twice its size (bicubic) and is padded by reflection; see
`adaptive_conv_plan`: both are part of the kernels here. On a CPU (and on any device without a
better kernel) the map is cut into tiles. A tile's pixels share most of their windows, so that its
convolution is one matrix product of a banded matrix, made from the kernels, with the window's
cells. Memory beyond the result is that of one row of tiles, in the backward pass as well.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llava_uhd.vision.adaptive_conv_plan import TAPS, Rule, Strip, make_strips


def adaptive_conv(padded: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolves a map that is already padded.

    Args:
        padded: (B, C, H + 6, W + 6), any memory format.
        kernel: (B, H, W, 7, 7): row and column of the tap last.

    Returns:
        (B, C, H, W) in the dtype of ``padded``, channels last in memory.

    Raises:
        ValueError: shapes that do not fit.
    """
    rows = padded.permute(0, 2, 3, 1)
    return _Convolve.apply(rows, kernel, Rule.PADDED).permute(0, 3, 1, 2)


def upsample_conv(source: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Upsamples by two (bicubic, ``align_corners`` False), pads by reflection and convolves.

    Args:
        source: (B, h, w, C), channels last.
        kernel: (B, 2h, 2w, 7, 7).

    Returns:
        (B, 2h, 2w, C) in the dtype of ``source``.

    Raises:
        ValueError: shapes that do not fit.
    """
    return _Convolve.apply(source, kernel, Rule.UPSAMPLE)


def window_products(features: torch.Tensor) -> torch.Tensor:
    """Scalar products of every pixel with the 49 pixels around it, padded by reflection.

    Args:
        features: (B, H, W, C), channels last.

    Returns:
        (B, H, W, 7, 7), float32 (float64 for float64 features).
    """
    return _Correlate.apply(features, features, Rule.REFLECT)


def precise(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype that sums are made in: float32, or float64 if any of the tensors has it."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def check_shapes(source: torch.Tensor, kernel: torch.Tensor, rule: Rule) -> None:
    """Raises ValueError if a kernel (B, H, W, 7, 7) is not for a source (B, h, w, C)."""
    height, width = (rule.ratio * rule.cells(length) for length in source.shape[1:3])
    expected = (source.shape[0], height, width, TAPS, TAPS)
    if source.dim() != 4 or tuple(kernel.shape) != expected:
        raise ValueError(
            f"adaptive convolution: a source of shape {tuple(source.shape)} needs kernels of shape "
            f"{expected}, got {tuple(kernel.shape)}"
        )


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether the GPU kernels can be compiled here."""
    return importlib.util.find_spec("triton") is not None


def gpu_kernels(*tensors: torch.Tensor) -> ModuleType | None:
    """The GPU kernels, if they take these tensors."""
    if not (tensors[0].is_cuda and precise(*tensors) == torch.float32 and has_triton()):
        return None
    from llava_uhd.vision import adaptive_conv_triton

    return adaptive_conv_triton


def convolve(source: torch.Tensor, kernel: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Without autograd: (B, h, w, C) and (B, H, W, 7, 7) to (B, H, W, C)."""
    kernels = gpu_kernels(source, kernel)
    if kernels is not None:
        return kernels.convolve(source, kernel, rule)
    dtype, source = precise(source, kernel), source.contiguous()
    output = source.new_empty(*kernel.shape[:3], source.shape[3])
    for item, strip in _parts(source, rule, dtype):
        weights = strip.spread(kernel[item, strip.rows].to(dtype))
        tiles = torch.bmm(weights, _windows(source[item], strip, dtype))
        output[item, strip.rows] = strip.join(tiles)
    return output


def convolve_transposed(
    grad: torch.Tensor, kernel: torch.Tensor, rule: Rule, size: tuple[int, int]
) -> torch.Tensor:
    """Without autograd: (B, H, W, C) and (B, H, W, 7, 7) to the source's (B, h, w, C).

    The result is float32 (or float64): windows overlap and add up.
    """
    kernels = gpu_kernels(grad, kernel)
    if kernels is not None:
        return kernels.convolve_transposed(grad, kernel, rule, size)
    dtype = precise(grad, kernel)
    result = grad.new_zeros(grad.shape[0], *size, grad.shape[3], dtype=dtype)
    for item, strip in _parts(result, rule, dtype):
        weights = strip.spread(kernel[item, strip.rows].to(dtype))
        tiles = strip.cut(grad[item, strip.rows].to(dtype))
        windows = torch.bmm(weights.transpose(1, 2), tiles)  # (tiles, S * T, C)
        result[item].flatten(0, 1).index_add_(0, strip.index, windows.flatten(0, 1))
    return result


def correlate(left: torch.Tensor, source: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Without autograd: (B, H, W, C) with windows of (B, h, w, C) to (B, H, W, 7, 7)."""
    kernels = gpu_kernels(source, left)
    if kernels is not None:
        return kernels.correlate(left, source, rule)
    dtype, source = precise(left, source), source.contiguous()
    result = left.new_empty(*left.shape[:3], TAPS, TAPS, dtype=dtype)
    for item, strip in _parts(source, rule, dtype):
        tiles = strip.cut(left[item, strip.rows].to(dtype))
        products = torch.bmm(tiles, _windows(source[item], strip, dtype).transpose(1, 2))
        result[item, strip.rows] = strip.gather(products)
    return result


def _parts(source: torch.Tensor, rule: Rule, dtype: torch.dtype) -> list[tuple[int, Strip]]:
    """All strips of all maps."""
    size = (source.shape[1], source.shape[2])
    strips = make_strips(rule, size, dtype, source.device)
    return [(item, strip) for item in range(len(source)) for strip in strips]


def _windows(source: torch.Tensor, strip: Strip, dtype: torch.dtype) -> torch.Tensor:
    """The cells (tiles, S * T, C) that the tiles of a strip read from (h, w, C)."""
    cells = source.flatten(0, 1).index_select(0, strip.index)
    return cells.to(dtype).view(strip.tiles, -1, source.shape[-1])


class _Convolve(torch.autograd.Function):
    """`convolve` with its gradients."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, kernel: torch.Tensor, rule: Rule) -> torch.Tensor:
        check_shapes(source, kernel, rule)
        ctx.save_for_backward(source, kernel)
        ctx.rule = rule
        with torch.autocast(source.device.type, enabled=False):
            return convolve(source, kernel, rule)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        source, kernel = ctx.saved_tensors
        grad_source = grad_kernel = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                size = (source.shape[1], source.shape[2])
                grad_source = convolve_transposed(grad, kernel, ctx.rule, size).to(source.dtype)
            if ctx.needs_input_grad[1]:
                grad_kernel = correlate(grad, source, ctx.rule).to(kernel.dtype)
        return grad_source, grad_kernel, None


class _Correlate(torch.autograd.Function):
    """`correlate` with its gradients."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, source: torch.Tensor, rule: Rule) -> torch.Tensor:
        ctx.save_for_backward(left, source)
        ctx.rule = rule
        with torch.autocast(source.device.type, enabled=False):
            return correlate(left, source, rule)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        left, source = ctx.saved_tensors
        grad_left = grad_source = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_left = convolve(source, grad, ctx.rule).to(left.dtype)
            if ctx.needs_input_grad[1]:
                size = (source.shape[1], source.shape[2])
                grad_source = convolve_transposed(left, grad, ctx.rule, size).to(source.dtype)
        return grad_left, grad_source, None
