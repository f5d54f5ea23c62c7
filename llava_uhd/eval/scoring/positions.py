"""Where slices meet, and how near a shape is to such a border: arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence

from llava_uhd.images.geometry import Size, SlicePlan

Box = tuple[float, float, float, float]

# How a border meets a shape, from bad to good.
CUT = "cut by a border"
NEAR = "nearer than its own size"
FAR = "farther away"
WHOLE = "picture not sliced"
NEARNESS = (CUT, NEAR, FAR, WHOLE)


def slice_borders(plan: SlicePlan, size: Size) -> tuple[list[float], list[float]]:
    """Borders between slices, in pixels of the picture.

    Args:
        plan: of the picture as it is cut, perhaps resized before.
        size: (width, height) of the picture file.

    Returns:
        x of the vertical and y of the horizontal borders inside the picture; both empty where it is
        not sliced.

    Example: 1008 x 672 in three columns and two rows: ``([336, 672], [336])``.
    """
    if plan.grid is None or plan.slice_size is None or plan.refine_size is None:
        return [], []
    scaled, offset = plan.refine_size, (0, 0)
    if plan.slices_on is not None:  # slices are cut from a canvas that the picture lies on
        scaled, offset = plan.slices_on.scaled, plan.slices_on.offset
    found = []
    for axis in (0, 1):
        places = [
            (index * plan.slice_size[axis] - offset[axis]) * size[axis] / scaled[axis]
            for index in range(1, plan.grid[axis])
        ]
        found.append([place for place in places if 0 < place < size[axis]])
    return found[0], found[1]


def nearness(box: Box, xs: Sequence[float], ys: Sequence[float]) -> str:
    """How the borders of `slice_borders` meet a shape: one of `NEARNESS`.

    Args:
        box: (left, top, right, bottom) of the shape.
        xs: of vertical borders.
        ys: of horizontal borders.

    Example: ``nearness((0, 0, 10, 10), [5], [])`` is `CUT`, with ``[15]`` it is `NEAR`.
    """
    if not xs and not ys:
        return WHOLE
    left, top, right, bottom = box
    gaps = [max(left - x, x - right) for x in xs] + [max(top - y, y - bottom) for y in ys]
    gap = min(gaps)
    if gap < 0:
        return CUT
    return NEAR if gap < max(right - left, bottom - top) else FAR


def region(row: int, column: int, rows: int, columns: int) -> str:
    """Third of the picture that a grid place lies in.

    Example: ``region(0, 6, 5, 7)`` is "top right", ``region(2, 3, 5, 7)`` is "middle".
    """
    vertical = ("top", "", "bottom")[3 * (2 * row + 1) // (2 * rows)]
    horizontal = ("left", "", "right")[3 * (2 * column + 1) // (2 * columns)]
    return f"{vertical} {horizontal}".strip() or "middle"
