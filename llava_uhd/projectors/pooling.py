"""RoIAlign of a regular grid of windows as two small matrices.

The windows of the spatially constrained resampler tile the map, bilinear sampling is a product of
one rule per axis, and so are the means over samples: the pooled map is ``A_h @ map @ A_w.T`` with
matrices that depend on the map's shape only. Exact, differentiable, any dtype, channels last.

Semantics kept from the published operator (``aligned=False``, adaptive sampling): sample
coordinates are cell indices without a half-cell shift; a window is at least one cell long;
coordinates beyond the map by more than a cell count as zeros. Coordinate arithmetic is float32 in
the operator's order.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt, sqrt

import numpy as np
import torch
from torch.nn import functional as F

from llava_uhd.images.geometry import pool_bins

# Elements of the maps that a CPU pools in one product (8 MiB in float32).
CPU_ELEMENTS = 2**21


def axis_matrix(
    length: int, window: float, num_windows: int, bins: int, round_to: torch.dtype | None = None
) -> np.ndarray:
    """One axis of the pooling.

    Args:
        length: cells of the map along the axis.
        window: length of a window in cells (double precision).
        num_windows: windows along the axis.
        bins: bins in a window along the axis.
        round_to: round window corners to this dtype, as published half-precision code does.

    Returns:
        float32 (num_windows * bins, length); row ``i * bins + p`` averages the samples of bin p of
        window i.
    """
    matrix = np.zeros((num_windows * bins, length), np.float32)
    f32 = np.float32
    for i in range(num_windows):
        corners = torch.tensor([i * window, i * window + window], dtype=torch.float64).float()
        if round_to is not None:
            corners = corners.to(round_to).float()
        start, end = (f32(value) for value in corners.tolist())
        size = max(end - start, f32(1))
        bin_size = size / f32(bins)
        samples = int(np.ceil(size / f32(bins)))
        for p in range(bins):
            row = matrix[i * bins + p]
            for k in range(samples):
                at = start + f32(p) * bin_size + f32(k + 0.5) * bin_size / f32(samples)
                _add_sample(row, at, length, f32(1) / f32(samples))
    return matrix


def _add_sample(row: np.ndarray, at: np.float32, length: int, weight: np.float32) -> None:
    """Adds the two neighbours of a linear sample at coordinate ``at`` to a matrix row."""
    if at < -1 or at > length:
        return
    at = max(at, np.float32(0))
    low = int(at)
    if low >= length - 1:
        row[length - 1] += weight
        return
    fraction = at - np.float32(low)
    row[low] += weight * (np.float32(1) - fraction)
    row[low + 1] += weight * fraction


@lru_cache(maxsize=4096)
def pooling_matrices(
    rows: int, columns: int, grid_size: int, round_to: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both axes for a map of ``rows`` x ``columns`` under ``grid_size ** 2`` windows.

    Returns:
        float32 CPU (grid_size * bin_rows, rows) and (grid_size * bin_columns, columns).
    """
    bin_rows, bin_columns = pool_bins(rows, columns)
    aspect = columns / rows
    height = sqrt(rows * columns / grid_size**2 / aspect)
    width = height * aspect
    # A cached tensor must not be an inference tensor, or training after evaluation would fail.
    with torch.inference_mode(False):
        return (
            torch.from_numpy(axis_matrix(rows, height, grid_size, bin_rows, round_to)),
            torch.from_numpy(axis_matrix(columns, width, grid_size, bin_columns, round_to)),
        )


@lru_cache(maxsize=1024)
def _placed_matrices(
    rows: int,
    columns: int,
    grid_size: int,
    round_to: torch.dtype | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    down, across = pooling_matrices(rows, columns, grid_size, round_to)
    with torch.inference_mode(False):  # as above
        return down.to(device, dtype), across.to(device, dtype)


@lru_cache(maxsize=1024)
def _table_matrices(
    rows: int,
    columns: int,
    grid_size: int,
    side: int,
    round_to: torch.dtype | None,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bicubic resampling from ``side`` to the map's shape and pooling, in one matrix per axis."""
    matrices = []
    # As above; and kept for later calls, whatever precision this one computes in.
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        for pooling in pooling_matrices(rows, columns, grid_size, round_to):
            # Along its second axis the identity keeps its size, which changes nothing there.
            resampling = F.interpolate(
                torch.eye(side)[None, None],
                size=(pooling.shape[1], side),
                mode="bicubic",
                align_corners=False,
            )
            matrices.append((pooling @ resampling[0, 0]).to(device))
    return matrices[0], matrices[1]


def pool_table(
    table: torch.Tensor, grid: tuple[int, int], grid_size: int, round_to: torch.dtype | None = None
) -> torch.Tensor:
    """Resamples a square table to a map's shape (bicubic) and pools each window, in float32.

    The resampled map, which may be large, is never made: both steps are linear and separable.

    Args:
        table: (side * side, C), row by row.
        grid: (rows, columns) of the map.
        grid_size: windows along each axis.
        round_to: see `axis_matrix`.

    Returns:
        (grid_size ** 2, bins, C) in the table's dtype; windows and bins as in `pool_windows`.
    """
    count, width = table.shape
    side = isqrt(count)
    down, across = _table_matrices(*grid, grid_size, side, round_to, table.device)
    with torch.autocast(table.device.type, enabled=False):
        pooled = down @ table.float().reshape(side, side * width)
        pooled = torch.matmul(across, pooled.reshape(-1, side, width))
    bins = down.shape[0] // grid_size, across.shape[0] // grid_size
    pooled = pooled.reshape(grid_size, bins[0], grid_size, bins[1], width).transpose(1, 2)
    return pooled.reshape(grid_size**2, bins[0] * bins[1], width).to(table.dtype)


def pool_windows(
    maps: torch.Tensor, grid_size: int, round_to: torch.dtype | None = None
) -> torch.Tensor:
    """Pools each window of each map.

    Args:
        maps: (n, rows, columns, C).
        grid_size: windows along each axis.
        round_to: see `axis_matrix`.

    Returns:
        (grid_size ** 2, n, bins, C): windows row by row, bins of a window row by row. Windows come
        first because attention inside windows is a batched product over them.
    """
    count, rows, columns, width = maps.shape
    down, across = _placed_matrices(rows, columns, grid_size, round_to, maps.dtype, maps.device)
    bin_rows, bin_columns = down.shape[0] // grid_size, across.shape[0] // grid_size
    # On a CPU few maps at a time keep the temporaries small enough to be reused: fresh pages for
    # large ones cost more than the products. A GPU takes all maps in one launch.
    at_once = count if maps.device.type != "cpu" else CPU_ELEMENTS // (rows * columns * width)
    pieces = []
    for part in maps.split(max(at_once, 1)):
        pooled = torch.matmul(down, part.reshape(-1, rows, columns * width))
        pooled = torch.matmul(across, pooled.reshape(-1, columns, width))
        pooled = pooled.reshape(-1, grid_size, bin_rows, grid_size, bin_columns, width)
        pieces.append(pooled.permute(1, 3, 0, 2, 4, 5))  # (g, g, n, bin rows, bin columns, C)
    pooled = torch.cat(pieces, dim=2)
    return pooled.reshape(grid_size**2, count, bin_rows * bin_columns, width)
