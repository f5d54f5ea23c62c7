"""Where visual tokens stand in a sequence: runs of tokens of one view, from integers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


class Run(NamedTuple):
    """Neighbouring visual tokens that may be averaged with each other.

    Attributes:
        length: tokens; 0 fills up tables.
        columns: of their map, or 0 where they form none.
    """

    length: int
    columns: int = 0


def checked_runs(runs: torch.Tensor, batch: int, total: int) -> torch.Tensor:
    """A table of runs as it came from a caller: int64 (B, R, 3) on the CPU.

    Args:
        runs: (B, R, 3), see `place_runs`.
        batch: rows of the batch.
        total: tokens of the whole sequence.

    Raises:
        ValueError: another shape, runs outside the sequence, or over each other.
    """
    if runs.ndim != 3 or runs.shape[0] != batch or runs.shape[2] != 3:
        raise ValueError(
            f"visual_runs must be ({batch}, runs, 3) for this batch, got {tuple(runs.shape)}: "
            "pass what get_visual_runs returned"
        )
    runs = runs.cpu().long()
    start, length = runs[..., 0], runs[..., 1]
    end = start + length
    # Rows that fill the table up have no length and may stand anywhere.
    before = F.pad(end.cummax(1).values[:, :-1], (1, 0)) if runs.shape[1] else end
    wrong = (length < 0) | ((length > 0) & ((start < before) | (end > total)))
    if bool(wrong.any()):
        row, number = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"visual_runs name tokens {int(start[row, number])} to {int(end[row, number])} in row "
            f"{row} of {total} tokens, which are not there or in another run: pass what "
            "get_visual_runs returned for the whole sequence"
        )
    return runs


def place_runs(mask: torch.Tensor, runs: Sequence[Run]) -> torch.Tensor:
    """Finds runs in a batch.

    Args:
        mask: (B, T) bool, the visual tokens.
        runs: of all rows, in reading order.

    Returns:
        int64 (B, R, 3) on the CPU: (start, length, columns) of the runs of each row, filled up with
        zeros.

    Raises:
        ValueError: the runs do not fill the mask.
    """
    remaining = iter(runs)
    rows: list[list[tuple[int, int, int]]] = []
    for row in mask.cpu():
        places = row.nonzero()[:, 0].tolist()
        found: list[tuple[int, int, int]] = []
        at = 0
        while at < len(places):
            run = next(remaining, None)
            if run is None or places[at + run.length - 1 : at + run.length] != [
                places[at] + run.length - 1
            ]:
                raise ValueError(
                    f"visual tokens stand at {len(places)} places of a row, which their runs "
                    "do not fill: text and images were prepared differently"
                )
            found.append((places[at], run.length, run.columns))
            at += run.length
        rows.append(found)
    if next(remaining, None) is not None:
        raise ValueError("there are more runs of visual tokens than places for them")
    widest = max((len(row) for row in rows), default=0)
    table = torch.zeros(len(rows), widest, 3, dtype=torch.long)
    for index, row_runs in enumerate(rows):
        if row_runs:
            table[index, : len(row_runs)] = torch.tensor(row_runs)
    return table
