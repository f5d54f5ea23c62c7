"""Tiles of LLaVA-NeXT and LLaVA-OneVision ("anyres"): integer arithmetic only.

A canvas is chosen from a list, the image is scaled into it and padded, and the canvas is cut into
square tiles; a square copy of the whole image is the overview. Afterwards what stands for padding
is cut away from the joined map of the tiles, and a map that is still too large is shrunk.

Source: the published LLaVA-NeXT code. Sizes are ``(width, height)`` in pixels, token maps
``(rows, columns)``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import lru_cache
from math import ceil, sqrt

from llava_uhd.errors import UserError
from llava_uhd.images.geometry import Canvas, Size, SlicePlan, check_size

Grid = tuple[int, int]

_RANGE_ITEM = re.compile(r"\(\s*(\d+)\s*x\s*(\d+)\s*\)")

# Tile sides that the published range syntax allows.
TILE_SIDES = (224, 336, 384, 448, 512)

# A map within this factor of the allowed side length stays as it is.
SLACK = 1.1


def expand_pinpoints(value: str | Sequence[Sequence[int]] | None, tile: int) -> tuple[Size, ...]:
    """Canvas sizes from their published notations.

    Args:
        value: a list of (width, height); its text; or a range in tiles, of which only the first
            and the last item count: ``"(1x1),...,(6x6)"`` are all of 1 to 6 columns and rows.
        tile: side of a tile in pixels.

    Example: ``expand_pinpoints("(1x1),...,(2x2)", 384)`` is
    ``((384, 384), (384, 768), (768, 384), (768, 768))``.

    Raises:
        UserError: another notation, or a size that is no multiple of the tile.
    """
    where = "image.pinpoints"
    if isinstance(value, str) and "x" in value:
        items = [(int(a), int(b)) for a, b in _RANGE_ITEM.findall(value)]
        if not items:
            raise UserError(f"{where} '{value}' must read like '(1x1),...,(6x6)'")
        (first_w, first_h), (last_w, last_h) = items[0], items[-1]
        widths, heights = range(first_w, last_w + 1), range(first_h, last_h + 1)
        sizes = tuple((tile * column, tile * row) for column in widths for row in heights)
    else:
        sizes = _listed_sizes(value, where)
    if not sizes:
        raise UserError(
            f"{where} is empty: anyres needs sizes in pixels or a range such as '(1x1),...,(6x6)'"
        )
    wrong = [size for size in sizes if min(size) < tile or size[0] % tile or size[1] % tile]
    if wrong:
        raise UserError(
            f"{where}: {wrong[0][0]} x {wrong[0][1]} is no multiple of image.scale_resolution "
            f"{tile}, the side of a tile"
        )
    return sizes


def _listed_sizes(value: str | Sequence[Sequence[int]] | None, where: str) -> tuple[Size, ...]:
    try:
        listed = ast.literal_eval(value) if isinstance(value, str) else value
        return tuple((int(width), int(height)) for width, height in listed or ())
    except (ValueError, SyntaxError, TypeError) as error:
        raise UserError(
            f"{where} must be a list of [width, height] in pixels or a range such as "
            f"'(1x1),...,(6x6)', got {value!r:.80}"
        ) from error


def select_canvas(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """The canvas that keeps most of an image and, among those, wastes least.

    Ties go to the first in the list.

    Example: 640x480 with tiles of 384 from 1x1 to 6x6: (768, 768).
    """
    best, most, least_waste = sizes[0], 0, float("inf")
    for canvas_width, canvas_height in sizes:
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_width * canvas_height - kept
        if kept > most or (kept == most and waste < least_waste):
            best, most, least_waste = (canvas_width, canvas_height), kept, waste
    return best


def fit_canvas(width: int, height: int, canvas: Size) -> Canvas:
    """Scales an image into a canvas and centres it on black.

    Example: 640x480 on 768x768: scaled to 768x576, 96 pixels from the top.
    """
    scale_w, scale_h = canvas[0] / width, canvas[1] / height
    if scale_w < scale_h:
        scaled = (canvas[0], min(ceil(height * scale_w), canvas[1]))
    else:
        scaled = (min(ceil(width * scale_h), canvas[0]), canvas[1])
    offset = ((canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2)
    return Canvas(scaled, offset, canvas, fill="black")


@lru_cache(maxsize=4096)
def plan_anyres(
    width: int, height: int, sizes: tuple[Size, ...], tile: int, patch: int
) -> SlicePlan:
    """Plans overview and tiles of one image.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        sizes: of the canvases, from `expand_pinpoints`.
        tile: side of a tile and of the overview.
        patch: side of a tower patch; a rest at the right and bottom of a tile is not read.
    """
    check_size(width, height)
    canvas = select_canvas(width, height, sizes)
    grid = (canvas[0] // tile, canvas[1] // tile)
    return SlicePlan(
        image_size=(width, height),
        overview_size=(tile, tile),
        grid=grid,
        refine_size=canvas,
        slice_size=(tile, tile),
        num_slices=grid[0] * grid[1],
        patch_size=patch,
        overview_first=True,
        slices_on=fit_canvas(width, height, canvas),
    )


def unpadded(image_size: Size, grid: Grid) -> tuple[int, int, int, int]:
    """Part (top, left, rows, columns) of a joined map that does not stand for padding.

    The cut is rounded down on both sides alike, so one row or column more than the image has may
    stay (published).

    Example: an image of 640x480 on a map of 54x54: ``(7, 0, 40, 54)``.
    """
    (width, height), (rows, columns) = image_size, grid
    if width / height > columns / rows:
        kept = int(height * (columns / width))
        cut = (rows - kept) // 2
        return cut, 0, rows - 2 * cut, columns
    kept = int(width * (rows / height))
    cut = (columns - kept) // 2
    return 0, cut, rows, columns - 2 * cut


def shrunk(grid: Grid, max_tiles: int | None, tile_tokens: int) -> Grid:
    """Size of a map after the limit of ``max_tiles`` tiles.

    Example: 80x107 tokens, 9 tiles of 729: as it is; 162x162: ``(81, 81)``.

    Args:
        grid: (rows, columns) of the map.
        max_tiles: None sets no limit.
        tile_tokens: of one tile.
    """
    rows, columns = grid
    if max_tiles is None:
        return grid
    factor = sqrt(rows * columns / (max_tiles * tile_tokens))
    if factor <= SLACK:
        return grid
    return int(rows // factor), int(columns // factor)
