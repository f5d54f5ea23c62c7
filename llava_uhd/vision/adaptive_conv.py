"""The 7x7 convolution with a kernel for every pixel, shared by all channels.

Three operations, each with the derivatives of the others:

- convolve: every output pixel is the sum of its window times its kernel;
- convolve_transposed: the gradient of the source;
- correlate: the products of a pixel with its window, which is the gradient of the kernels, and
  also what the range kernel of a joint bilateral upsampler begins with.

The source may first be upsampled to twice its size (bicubic) and is padded by reflection; see
`adaptive_conv_plan`: both are made part of the kernels. `adaptive_conv_tiles` does this on every
device, `adaptive_conv_triton` on GPUs where Triton is installed; this module chooses, and adds the
gradients. Neither makes the windows of all pixels, forward or backward.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from llava_uhd.vision import adaptive_conv_tiles
from llava_uhd.vision.adaptive_conv_plan import TAPS, Rule, precise


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


def backend(*tensors: torch.Tensor) -> ModuleType:
    """The module whose functions take these tensors; see above."""
    if tensors[0].is_cuda and precise(*tensors) == torch.float32 and has_triton():
        from llava_uhd.vision import adaptive_conv_triton

        return adaptive_conv_triton
    return adaptive_conv_tiles


class _Convolve(torch.autograd.Function):
    """`convolve` with its gradients."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, kernel: torch.Tensor, rule: Rule) -> torch.Tensor:
        check_shapes(source, kernel, rule)
        ctx.save_for_backward(source, kernel)
        ctx.rule = rule
        with torch.autocast(source.device.type, enabled=False):
            return backend(source, kernel).convolve(source, kernel, rule)

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
                transposed = backend(grad, kernel).convolve_transposed
                grad_source = transposed(grad, kernel, ctx.rule, size).to(source.dtype)
            if ctx.needs_input_grad[1]:
                correlate = backend(grad, source).correlate
                grad_kernel = correlate(grad, source, ctx.rule).to(kernel.dtype)
        return grad_source, grad_kernel, None


class _Correlate(torch.autograd.Function):
    """`correlate` with its gradients."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, source: torch.Tensor, rule: Rule) -> torch.Tensor:
        ctx.save_for_backward(left, source)
        ctx.rule = rule
        with torch.autocast(source.device.type, enabled=False):
            return backend(left, source).correlate(left, source, rule)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        left, source = ctx.saved_tensors
        grad_left = grad_source = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                convolve = backend(source, grad).convolve
                grad_left = convolve(source, grad, ctx.rule).to(left.dtype)
            if ctx.needs_input_grad[1]:
                size = (source.shape[1], source.shape[2])
                transposed = backend(left, grad).convolve_transposed
                grad_source = transposed(left, grad, ctx.rule, size).to(source.dtype)
        return grad_left, grad_source, None
