"""Runs of visual tokens that may be averaged with each other, from views and their token maps."""

from __future__ import annotations

from collections.abc import Sequence

from llava_uhd.images.maps import Newline, TokenMap
from llava_uhd.language.runs import Run

Grid = tuple[int, int]


def runs_of_views(shapes: Sequence[Grid]) -> list[Run]:
    """One run for each view, where tokens stand as the projector gives them."""
    return [Run(rows * columns, columns) for rows, columns in shapes]


def runs_of_maps(maps: Sequence[TokenMap], separated: bool = False) -> list[Run]:
    """Runs of joined maps: whole maps, or single rows where a newline follows each.

    Learned newlines are runs of one token, which nothing shortens.

    Args:
        maps: in the order of the sequence.
        separated: newlines of the text stand between the rows of joined views (layout "rows").
    """
    runs: list[Run] = []
    for each in maps:
        height, width = each.out_height, each.out_width
        if separated and each.columns * each.rows > 1:
            runs += [Run(width, width)] * height
            continue
        if each.newline == Newline.ROWS:
            line = [Run(width, width), Run(1)] if width else [Run(1)]
            runs += line * height
            continue
        if height * width:
            runs.append(Run(height * width, width))
        if each.newline == Newline.END:
            runs.append(Run(1))
    return runs
