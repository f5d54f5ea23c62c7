"""A picture of how good a model is at each place of a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llava_uhd.images.geometry import Size


class Panel(NamedTuple):
    """One picture size.

    Attributes:
        size: (width, height) in pixels.
        grid: (columns, rows) of places.
        values: (row, column) -> percent; places without a value stay white.
        xs: vertical borders between slices, in pixels.
        ys: horizontal borders.
    """

    size: Size
    grid: Size
    values: Mapping[tuple[int, int], float]
    xs: Sequence[float]
    ys: Sequence[float]


def heat_map(panels: Sequence[Panel], title: str) -> bytes:
    """Draws panels side by side.

    Args:
        panels: at least one.
        title: above them.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure

    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns + 0.8, 3.1 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{title} (dashed: borders between slices)")
    shown = None
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        width, height = panel.size
        field = np.full(panel.grid[::-1], np.nan)
        for place, value in panel.values.items():
            field[place] = value
        shown = axes.imshow(field, cmap="viridis", vmin=0, vmax=100, extent=(0, width, height, 0))
        for (row, column), value in panel.values.items():
            x, y = (column + 0.5) * width / panel.grid[0], (row + 0.5) * height / panel.grid[1]
            colour = "black" if value > 60 else "white"
            axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        for border in panel.xs:
            axes.axvline(border, color="red", linestyle="--", linewidth=1.5)
        for border in panel.ys:
            axes.axhline(border, color="red", linestyle="--", linewidth=1.5)
        axes.set_title(f"{width} x {height}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    if shown is not None:
        figure.colorbar(shown, ax=figure.axes, shrink=0.8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
