"""Learned position tables of square maps, resampled to any grid."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


def resample_positions(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Bicubic resampling of a square position table (align_corners False, no antialias).

    Computed in float32 and returned in the table's dtype. The published tower resamples in the
    table's dtype; in float32 the two are equal.

    Args:
        table: (side * side, C), row by row.
        grid: (rows, columns) wanted.

    Returns:
        (rows * columns, C).
    """
    count, width = table.shape
    side = round(count**0.5)
    if (side, side) == grid:
        return table
    square = table.float().reshape(1, side, side, width).permute(0, 3, 1, 2)
    resampled = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resampled[0].permute(1, 2, 0).reshape(-1, width).to(table.dtype)


class ResampledRows:
    """Resampled forms of one table, kept per grid while the table does not learn.

    Args:
        num_prefix: leading rows of the table that are not part of the map.
    """

    def __init__(self, num_prefix: int = 0) -> None:
        self.num_prefix = num_prefix
        self._rows: dict[tuple[int, int], torch.Tensor] = {}
        self._key: tuple[object, ...] = ()

    def __call__(self, table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Returns (num_prefix + rows * columns, C) for one grid, prefix rows first."""
        if torch.is_grad_enabled() and table.requires_grad:
            return self._resample(table, grid)
        # The version counter changes with every write, so a load or an optimizer step empties it.
        version = 0 if table.is_inference() else table._version
        key = (table.data_ptr(), version, table.dtype, table.device)
        if key != self._key:
            self._rows, self._key = {}, key
        if grid not in self._rows:
            self._rows[grid] = self._resample(table, grid).detach()
        return self._rows[grid]

    def _resample(self, table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        if not self.num_prefix:
            return resample_positions(table, grid)
        prefix, patches = table[: self.num_prefix], table[self.num_prefix :]
        return torch.cat([prefix, resample_positions(patches, grid)])


class PositionTable(nn.Module):
    """The learned position table of a tower.

    Args:
        num_prefix: leading rows that are not patches (the class token's).
        num_patches: patches of the square grid the tower was trained on.
        width: channels.
    """

    def __init__(self, num_prefix: int, num_patches: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_prefix + num_patches, width))
        self._rows = ResampledRows(num_prefix)

    def reset_weights(self) -> None:
        """Normal rows."""
        init.normal_(self.weight, std=0.02)

    def forward(self, grids: list[tuple[int, int]]) -> torch.Tensor:
        """The rows for each grid, prefix rows first, one after another: (N, C).

        A single tensor: processes that share weights out count the results of a module.
        """
        unique = {grid: self._rows(self.weight, grid) for grid in dict.fromkeys(grids)}
        return torch.cat([unique[grid] for grid in grids])
