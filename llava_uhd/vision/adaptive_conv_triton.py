"""GPU kernels of the 7x7 convolution with a kernel for every pixel.

First the kernels over the padded (and upsampled) map are turned into kernels over the source, which
are 7x7 too: in both cases an output cell reads the 49 source cells around its own. That is a
linear step on small tensors, left to the framework; what is left has one form for all rules. An
output row of a few source cells and a block of channels is one program: for each of the 7 window
rows a banded matrix of kernel weights times the cells of the window, on the tensor cores, summed in
float32. The gradient of the source gathers instead of adding atomically, so that results do not
depend on the order of programs.

Importing this module needs the ``triton`` package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from llava_uhd.vision.adaptive_conv_plan import TAPS, Rule, make_axis

# Source cells (for the transpose: their columns) of a program. With 10, and two output cells for
# each, the 16 window columns and the 32 reading pixels need no filling.
CELLS = 8
CELLS_TRANSPOSED = 10
CHANNELS = 128


@triton.jit
def _convolve_kernel(
    source: tl.tensor, weights: tl.tensor, output: tl.tensor, height: tl.tensor, width: tl.tensor,
    out_rows: tl.tensor, out_columns: tl.tensor, channels: tl.tensor, tiles: tl.tensor,
    RATIO: tl.constexpr, BEFORE: tl.constexpr, CELLS: tl.constexpr, PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles % (out_rows // RATIO)
    item = (tl.program_id(0) // tiles // (out_rows // RATIO)).to(tl.int64)
    pixel = tl.arange(0, PIXELS)
    inner = pixel % (RATIO * CELLS)
    y = row * RATIO + pixel // (RATIO * CELLS)
    x = tile * CELLS * RATIO + inner
    alive = (pixel < RATIO * RATIO * CELLS) & (x < out_columns)
    place = (item * out_rows + y) * out_columns + x
    column = tl.arange(0, COLUMNS)
    tap = column[None, :] - (inner // RATIO)[:, None]
    band = alive[:, None] & (tap >= 0) & (tap < 7)
    at = tile * CELLS - BEFORE + column
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((PIXELS, BLOCK), dtype=tl.float32)
    for tap_row in range(7):
        from_row = tl.full((COLUMNS,), row - BEFORE + tap_row, tl.int32)
        inside = (at >= 0) & (at < width) & (from_row >= 0) & (from_row < height)
        matrix = tl.load(weights + place[:, None] * 49 + tap_row * 7 + tap, mask=band, other=0.0)
        cells = tl.load(
            source + ((item * height + from_row) * width + at)[:, None] * channels + channel,
            mask=inside[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        total = tl.dot(matrix, cells.to(tl.float32), total, input_precision=PRECISION)
    tl.store(
        output + place[:, None] * channels + channel,
        total.to(output.dtype.element_ty),
        mask=alive[:, None] & (channel < channels)[None, :],
    )


@triton.jit
def _transposed_kernel(
    grad: tl.tensor, weights: tl.tensor, output: tl.tensor, height: tl.tensor, width: tl.tensor,
    out_rows: tl.tensor, out_columns: tl.tensor, channels: tl.tensor, tiles: tl.tensor,
    RATIO: tl.constexpr, BEFORE: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr,
    PIXELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles % height
    item = (tl.program_id(0) // tiles // height).to(tl.int64)
    inner = tl.arange(0, ROWS)
    at = tile * CELLS + inner
    alive = (inner < CELLS) & (at < width)
    pixel = tl.arange(0, PIXELS)
    # Output cells whose windows may hold the source cells of this tile.
    cell = tile * CELLS + BEFORE - 6 + pixel // RATIO
    x = cell * RATIO + pixel % RATIO
    reading = (pixel < RATIO * (CELLS + 6)) & (x >= 0) & (x < out_columns)
    tap = at[:, None] + BEFORE - cell[None, :]
    band = alive[:, None] & reading[None, :] & (tap >= 0) & (tap < 7)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for step in range(7 * RATIO):
        tap_row = step // RATIO
        y = tl.full((PIXELS,), (row + BEFORE - tap_row) * RATIO + step % RATIO, tl.int32)
        inside = reading & (y >= 0) & (y < out_rows)
        place = (item * out_rows + y) * out_columns + x
        matrix = tl.load(
            weights + place[None, :] * 49 + tap_row * 7 + tap,
            mask=band & inside[None, :],
            other=0.0,
        )
        pixels = tl.load(
            grad + place[:, None] * channels + channel,
            mask=inside[:, None] & (channel < channels)[None, :],
            other=0.0,
        )
        total = tl.dot(matrix, pixels.to(tl.float32), total, input_precision=PRECISION)
    tl.store(
        output + ((item * height + row) * width + at)[:, None] * channels + channel,
        total.to(output.dtype.element_ty),
        mask=alive[:, None] & (channel < channels)[None, :],
    )


@triton.jit
def _correlate_kernel(
    left: tl.tensor, source: tl.tensor, output: tl.tensor, height: tl.tensor, width: tl.tensor,
    out_rows: tl.tensor, out_columns: tl.tensor, channels: tl.tensor, tiles: tl.tensor,
    RATIO: tl.constexpr, BEFORE: tl.constexpr, CELLS: tl.constexpr, PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles % (out_rows // RATIO)
    item = (tl.program_id(0) // tiles // (out_rows // RATIO)).to(tl.int64)
    tap_row = tl.program_id(1)
    pixel = tl.arange(0, PIXELS)
    inner = pixel % (RATIO * CELLS)
    y = row * RATIO + pixel // (RATIO * CELLS)
    x = tile * CELLS * RATIO + inner
    alive = (pixel < RATIO * RATIO * CELLS) & (x < out_columns)
    place = (item * out_rows + y) * out_columns + x
    column = tl.arange(0, COLUMNS)
    tap = column[None, :] - (inner // RATIO)[:, None]
    at = tile * CELLS - BEFORE + column
    from_row = tl.full((COLUMNS,), row - BEFORE + tap_row, tl.int32)
    inside = (at >= 0) & (at < width) & (from_row >= 0) & (from_row < height)
    total = tl.zeros((PIXELS, COLUMNS), dtype=tl.float32)
    for start in range(0, channels, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        kept = (channel < channels)[None, :]
        pixels = tl.load(
            left + place[:, None] * channels + channel, mask=alive[:, None] & kept, other=0.0
        )
        cells = tl.load(
            source + ((item * height + from_row) * width + at)[:, None] * channels + channel,
            mask=inside[:, None] & kept,
            other=0.0,
        )
        total = tl.dot(
            pixels.to(tl.float32),
            tl.trans(cells.to(tl.float32)),
            total,
            input_precision=PRECISION,
        )
    tl.store(
        output + place[:, None] * 49 + tap_row * 7 + tap,
        total,
        mask=alive[:, None] & (tap >= 0) & (tap < 7),
    )


@dataclass(frozen=True)
class Shape:
    """Sizes of one call.

    Attributes:
        rule: what lies between the source and the taps.
        batch: maps.
        source: (h, w).
        output: (H, W).
        channels: of the maps.
    """

    rule: Rule
    batch: int
    source: tuple[int, int]
    output: tuple[int, int]
    channels: int

    @staticmethod
    def of(rule: Rule, source: Sequence[int], channels: int, batch: int) -> Shape:
        """For a source (h, w)."""
        height, width = source
        output = (rule.ratio * rule.cells(height), rule.ratio * rule.cells(width))
        return Shape(rule, batch, (height, width), output, channels)

    def numbers(self, tiles: int) -> tuple[int, ...]:
        """The run-time arguments of the kernels."""
        return (*self.source, *self.output, self.channels, tiles)


def power(value: int) -> int:
    """The next power of two, at least the 16 that the tensor cores take."""
    return max(triton.next_power_of_2(value), 16)


def constants(shape: Shape, dtype: torch.dtype, cells: int) -> dict[str, Any]:
    """Compile-time arguments that all kernels share.

    Half-precision maps are exact in the 10 bits of mantissa that the tensor cores keep of a
    float32, and the error that this makes in the weights is below that of the rounded result.
    """
    return {
        "RATIO": shape.rule.ratio,
        "BEFORE": shape.rule.before,
        "CELLS": cells,
        "BLOCK": min(power(shape.channels), CHANNELS),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def window_constants(shape: Shape) -> dict[str, int]:
    """Compile-time arguments of the kernels that go over windows."""
    return {"PIXELS": power(shape.rule.ratio**2 * CELLS), "COLUMNS": power(CELLS + TAPS - 1)}


def transposed_constants(shape: Shape) -> dict[str, int]:
    """Compile-time arguments of the kernel that goes over the pixels that read a cell."""
    return {
        "ROWS": power(CELLS_TRANSPOSED),
        "PIXELS": power(shape.rule.ratio * (CELLS_TRANSPOSED + TAPS - 1)),
    }


def source_kernel(kernel: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Kernels over the padded map to kernels over the source; both (B, H, W, 7, 7) float32."""
    down, across = _axes(shape, kernel.device)
    kernel = torch.einsum("byxij,yis->byxsj", kernel.float(), down)
    return torch.einsum("byxsj,xjt->byxst", kernel, across).contiguous()


def padded_kernel(kernel: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Transpose of `source_kernel`."""
    down, across = _axes(shape, kernel.device)
    kernel = torch.einsum("byxst,xjt->byxsj", kernel, across)
    return torch.einsum("byxsj,yis->byxij", kernel, down)


def _axes(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, 7, 7) and (W, 7, 7): taps to source cells around each output cell."""
    down, across = (make_axis(shape.rule, n, 1, torch.float32, device) for n in shape.source)
    return down.matrix.flatten(0, 1), across.matrix.flatten(0, 1)


def convolve(source: torch.Tensor, kernel: torch.Tensor, rule: Rule) -> torch.Tensor:
    """(B, h, w, C) and (B, H, W, 7, 7) to (B, H, W, C) in the dtype of ``source``."""
    source = source.contiguous()
    shape = Shape.of(rule, source.shape[1:3], source.shape[3], len(source))
    weights = source_kernel(kernel, shape)
    output = source.new_empty(shape.batch, *shape.output, shape.channels)
    tiles = triton.cdiv(rule.cells(shape.source[1]), CELLS)
    fixed = constants(shape, source.dtype, CELLS)
    grid = (
        shape.batch * rule.cells(shape.source[0]) * tiles,
        triton.cdiv(shape.channels, fixed["BLOCK"]),
    )
    numbers = shape.numbers(tiles)
    with torch.cuda.device_of(output):
        _convolve_kernel[grid](
            source, weights, output, *numbers, **fixed, **window_constants(shape)
        )
    return output


def convolve_transposed(
    grad: torch.Tensor, kernel: torch.Tensor, rule: Rule, size: tuple[int, int]
) -> torch.Tensor:
    """(B, H, W, C) and (B, H, W, 7, 7) to the source's (B, h, w, C), in the dtype of ``grad``."""
    grad = grad.contiguous()
    shape = Shape.of(rule, size, grad.shape[3], len(grad))
    weights = source_kernel(kernel, shape)
    output = grad.new_empty(shape.batch, *size, shape.channels)
    tiles = triton.cdiv(size[1], CELLS_TRANSPOSED)
    fixed = constants(shape, grad.dtype, CELLS_TRANSPOSED)
    grid = (shape.batch * size[0] * tiles, triton.cdiv(shape.channels, fixed["BLOCK"]))
    numbers = shape.numbers(tiles)
    _transposed_kernel[grid](
        grad, weights, output, *numbers, **fixed, **transposed_constants(shape)
    )
    return output


def correlate(left: torch.Tensor, source: torch.Tensor, rule: Rule) -> torch.Tensor:
    """(B, H, W, C) with windows of (B, h, w, C) to (B, H, W, 7, 7) float32."""
    left, source = left.contiguous(), source.contiguous()
    shape = Shape.of(rule, source.shape[1:3], source.shape[3], len(source))
    output = left.new_empty(*left.shape[:3], TAPS, TAPS, dtype=torch.float32)
    tiles = triton.cdiv(rule.cells(shape.source[1]), CELLS)
    dtype = torch.promote_types(left.dtype, source.dtype)
    fixed = {**constants(shape, dtype, CELLS), "BLOCK": min(power(shape.channels), CHANNELS // 2)}
    grid = (shape.batch * rule.cells(shape.source[0]) * tiles, TAPS)
    numbers = shape.numbers(tiles)
    with torch.cuda.device_of(output):
        _correlate_kernel[grid](left, source, output, *numbers, **fixed, **window_constants(shape))
    return padded_kernel(output, shape)
