"""Where the taps of a 7x7 per-pixel convolution read, as one small matrix per axis and tile.

A tap reads one padded cell; a padded cell is a reflection of a cell of the (upsampled) map; an
upsampled cell is a weighted mean of four cells of the source. All of this is linear and separable,
so for a tile of the output one matrix per axis says what a tap means in terms of source cells, and
neither the upsampled nor the padded map is ever made.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

TAPS = 7
REACH = TAPS // 2

# Cells of the source that a tile advances along an axis. Small tiles copy many margins, large
# ones multiply by many zeros: these are about the fastest for maps of 1024 channels.
TILE_CELLS = 6

# Elements of the largest temporary when several small maps go through one product (4 MiB).
PIECE_ELEMENTS = 2**20

# The cubic of the framework's bicubic resampling.
CUBIC_A = -0.75


def precise(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype that sums are made in: float32, or float64 if any of the tensors has it."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


class Rule(enum.Enum):
    """What lies between the source and the taps."""

    PADDED = "padded"  # the source is already padded by 3 cells on all sides
    REFLECT = "reflect"  # padded by reflection
    UPSAMPLE = "upsample"  # upsampled to twice the size (bicubic), then padded by reflection

    @property
    def ratio(self) -> int:
        """Output cells for each source cell, along an axis."""
        return 2 if self is Rule.UPSAMPLE else 1

    @property
    def before(self) -> int:
        """How many source cells before its own cell an output cell begins to read."""
        return 0 if self is Rule.PADDED else REACH

    def cells(self, source_length: int) -> int:
        """Output cells divided by `ratio`, for a source of this length."""
        return source_length - 2 * REACH if self is Rule.PADDED else source_length


def reflect(index: int, length: int) -> int:
    """Index into an axis continued by reflection without repeating the edge.

    Maps shorter than four cells, on which the framework's padding fails, are reflected again and
    again, as in ``numpy.pad``. Example: -1 in a map of 4 is 1; -3 in a map of 2 is 1.
    """
    if length == 1:
        return 0
    index %= 2 * length - 2
    return min(index, 2 * length - 2 - index)


def cubic(distance: float) -> float:
    """Weight of a cell at this distance in bicubic resampling."""
    d, a = abs(distance), CUBIC_A
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def tap_sources(rule: Rule, position: int, tap: int, length: int) -> list[tuple[int, float]]:
    """Source cells and weights behind one tap of one output cell, along an axis.

    Args:
        rule: what lies between.
        position: output cell.
        tap: 0 to 6.
        length: of the source.

    Returns:
        Cells may repeat; their weights add up.
    """
    if rule is Rule.PADDED:
        return [(position + tap, 1.0)]
    at = reflect(position + tap - REACH, rule.ratio * length)
    if rule is Rule.REFLECT:
        return [(at, 1.0)]
    centre = (at + 0.5) / 2 - 0.5
    low = int(np.floor(centre))
    cells = range(low - 1, low + 3)
    return [(min(max(cell, 0), length - 1), cubic(centre - cell)) for cell in cells]


@dataclass(frozen=True)
class Axis:
    """The tiles of one axis.

    Attributes:
        matrix: (tiles, outputs, 7, window): weight of a source cell of the tile's window behind a
            tap of an output cell of the tile. Zero for cells outside the map.
        index: int64 (tiles, window) source cells, moved into the map where they lie outside.
        inside: (first, end) of the window columns that lie in the map, for each tile.
        outputs: length of the output.
    """

    matrix: torch.Tensor
    index: torch.Tensor
    inside: tuple[tuple[int, int], ...]
    outputs: int


def tile_cells(cells: int, target: int) -> int:
    """Cells of each tile, so that the tiles are about ``target`` long and fit well.

    Example: 24 with target 7 gives 6 (four tiles).
    """
    return -(-cells // -(-cells // target))


@lru_cache(maxsize=1024)
def make_axis(
    rule: Rule, length: int, target: int, dtype: torch.dtype, device: torch.device
) -> Axis:
    """Tiles of an axis whose source has ``length`` cells.

    Raises:
        ValueError: a padded source that is not longer than its padding.
    """
    cells, ratio = rule.cells(length), rule.ratio
    if cells < 1:
        raise ValueError(f"a map with padding has at least 7 cells along each axis, got {length}")
    size = tile_cells(cells, target)
    tiles, window = -(-cells // size), size + 2 * REACH
    starts = np.arange(tiles) * size - rule.before
    matrix = np.zeros((tiles, ratio * size, TAPS, window))
    for position in range(ratio * cells):
        tile, inner = divmod(position, ratio * size)
        for tap in range(TAPS):
            for cell, weight in tap_sources(rule, position, tap, length):
                matrix[tile, inner, tap, cell - starts[tile]] += weight
    columns = starts[:, None] + np.arange(window)
    inside = [(max(-start, 0), min(length - start, window)) for start in starts.tolist()]
    # A cached tensor must not be an inference tensor, or training after evaluation would fail.
    with torch.inference_mode(False):
        return Axis(
            torch.from_numpy(matrix).to(device, dtype),
            torch.from_numpy(columns.clip(0, length - 1)).to(device),
            tuple(inside),
            ratio * cells,
        )


@dataclass(frozen=True)
class Strip:
    """A row of tiles.

    Attributes:
        rows: output rows.
        tiles: tiles side by side.
        width: output columns (the tiles may reach beyond).
        index: int64 (tiles * window rows * window columns) cells of the flattened source.
        down: (Y, 7, S): taps to window rows, for each output row.
        across: (X, 7, T): taps to window columns, for each output column of all tiles.
    """

    rows: slice
    tiles: int
    width: int
    index: torch.Tensor
    down: torch.Tensor
    across: torch.Tensor

    def maps_at_once(self, channels: int) -> int:
        """Maps of this many channels that one product takes: many small ones, single large ones."""
        weights = self.across.shape[0] * self.down.shape[0] * self.down.shape[2]
        weights *= self.across.shape[2]
        return max(PIECE_ELEMENTS // max(weights, self.index.shape[0] * channels), 1)

    def spread(self, kernel: torch.Tensor) -> torch.Tensor:
        """Weights of window cells from weights of taps.

        Args:
            kernel: (n, Y, W, 7, 7) of the strip in n maps.

        Returns:
            (n * tiles, X / tiles * Y, S * T): for each pixel (column by column), its window.
        """
        height, taps, window = self.down.shape
        columns, count = self.across.shape[0], kernel.shape[0]
        if columns > self.width:
            kernel = torch.nn.functional.pad(kernel, (0, 0, 0, 0, 0, columns - self.width))
        taps_first = kernel.permute(1, 3, 0, 2, 4).reshape(height, taps, -1)
        down = torch.bmm(self.down.transpose(1, 2), taps_first)  # (Y, S, n * X * 7)
        down = down.view(height, window, count * columns, taps).permute(2, 0, 1, 3)
        down = down.reshape(count * columns, height * window, taps)
        spread = torch.bmm(down, self._across(count))
        return spread.view(count * self.tiles, columns // self.tiles * height, -1)

    def gather(self, spread: torch.Tensor) -> torch.Tensor:
        """Transpose of `spread`: (n * tiles, X / tiles * Y, S * T) to (n, Y, W, 7, 7)."""
        height, taps, window = self.down.shape
        columns, count = self.across.shape[0], spread.shape[0] // self.tiles
        spread = spread.view(count * columns, height * window, -1)
        down = torch.bmm(spread, self._across(count).transpose(1, 2))
        down = down.view(count * columns, height, window, taps).permute(1, 2, 0, 3)
        down = down.reshape(height, window, count * columns * taps)
        kernel = torch.bmm(self.down, down).view(height, taps, count, columns, taps)
        return kernel.permute(2, 0, 3, 1, 4)[:, :, : self.width]

    def cut(self, pixels: torch.Tensor) -> torch.Tensor:
        """Output pixels (n, Y, W, C) in the order of the tiles: (n * tiles, X / tiles * Y, C)."""
        height, columns = self.down.shape[0], self.across.shape[0]
        pixels = pixels.transpose(1, 2)
        if columns > self.width:
            pixels = torch.nn.functional.pad(pixels, (0, 0, 0, 0, 0, columns - self.width))
        return pixels.reshape(len(pixels) * self.tiles, columns // self.tiles * height, -1)

    def join(self, tiles: torch.Tensor) -> torch.Tensor:
        """Transpose of `cut`: (n * tiles, X / tiles * Y, C) to (n, Y, W, C), a view."""
        count = tiles.shape[0] // self.tiles
        pixels = tiles.view(count, self.across.shape[0], self.down.shape[0], -1)
        return pixels[:, : self.width].transpose(1, 2)

    def _across(self, count: int) -> torch.Tensor:
        """(n * X, 7, T): the matrices of all columns of n maps."""
        return self.across if count == 1 else self.across.repeat(count, 1, 1)


@lru_cache(maxsize=256)
def make_strips(
    rule: Rule,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    target: int = TILE_CELLS,
) -> tuple[Strip, ...]:
    """All strips of a map.

    Args:
        rule: what lies between the source and the taps.
        size: (h, w) of the source.
        dtype: of the computation.
        device: of the computation.
        target: cells of a tile along each axis.

    Raises:
        ValueError: a padded source that is not longer than its padding.
    """
    rows = make_axis(rule, size[0], target, dtype, device)
    columns = make_axis(rule, size[1], target, dtype, device)
    across = columns.matrix.flatten(0, 1)
    strips = []
    with torch.inference_mode(False):
        for tile, (first, end) in enumerate(rows.inside):
            top = tile * rows.matrix.shape[1]
            height = min(rows.matrix.shape[1], rows.outputs - top)
            cells = rows.index[tile, first:end, None] * size[1] + columns.index[:, None]
            strips.append(
                Strip(
                    slice(top, top + height),
                    len(columns.inside),
                    columns.outputs,
                    cells.flatten(),
                    rows.matrix[tile, :height, :, first:end].contiguous(),
                    across,
                )
            )
    return tuple(strips)
