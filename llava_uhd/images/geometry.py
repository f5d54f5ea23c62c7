"""How an image of any shape is cut into views: integer arithmetic only, no tensors, no pictures.

Source: the image modularization of LLaVA-UHD (arXiv 2403.11703, section 3.1) as published with the
ECCV 2024 code. The order of every truncation and the ties decided by double rounding are part of
the published behaviour and are kept.

Sizes are ``(width, height)`` in pixels, grids ``(columns, rows)`` of slices, and patch grids
``(rows, columns)`` of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, isqrt, log, sqrt
from typing import Literal

from llava_uhd.errors import UserError

Size = tuple[int, int]

# (columns, rows) of pooling bins in a window, in the published order of preference.
POOL_SHAPES = ((4, 2), (3, 2), (4, 3), (3, 3), (2, 4), (2, 3), (3, 4))

# A bounded plan lets no view be more than this many times as long as wide, so that a view never
# has more patches than a square one. Only images beyond 16:1 reach the bound.
MAX_ASPECT_RATIO = 16.0


@dataclass(frozen=True)
class Canvas:
    """How a picture is laid out before it is used: scaled, and placed on a background.

    Attributes:
        scaled: size that the picture is resized to first.
        offset: (left, top) where it is placed; negative values cut it.
        size: of the canvas.
        fill: background, "black" or "mean" (of the model's normalisation).
    """

    scaled: Size
    offset: Size
    size: Size
    fill: Literal["black", "mean"] = "black"


@dataclass(frozen=True)
class SlicePlan:
    """The views of one image.

    Attributes:
        image_size: size of the original image.
        overview_size: size of the whole image as one view.
        grid: slices as (columns, rows), or None if the image is not cut.
        refine_size: size the original is resized to before cutting, a multiple of `slice_size`.
        slice_size: size of each slice.
        num_slices: ``columns * rows``, 0 if not cut.
        patch_size: side of a patch in pixels; what a view has beyond a multiple of it, at the right
            and bottom, is not read.
        overview_first: the overview comes before the slices in reading order, not after them.
        overview_on: canvas that the overview is resized from, or None: the image itself.
        slices_on: canvas of `refine_size` that the slices are cut from, or None: the resized image.
    """

    image_size: Size
    overview_size: Size
    grid: Size | None = None
    refine_size: Size | None = None
    slice_size: Size | None = None
    num_slices: int = 0
    patch_size: int = 14
    overview_first: bool = False
    overview_on: Canvas | None = None
    slices_on: Canvas | None = None

    @property
    def num_views(self) -> int:
        """Slices and the overview."""
        return self.num_slices + 1

    @property
    def view_sizes(self) -> list[Size]:
        """Sizes of the views in reading order: slices row by row, the overview after or before."""
        slices = [self.slice_size] * self.num_slices if self.slice_size else []
        if self.overview_first:
            return [self.overview_size, *slices]
        return [*slices, self.overview_size]

    @property
    def view_grids(self) -> list[tuple[int, int]]:
        """Patch grids (rows, columns) of the views, in the order of `view_sizes`."""
        side = self.patch_size
        return [(height // side, width // side) for width, height in self.view_sizes]

    @property
    def crop_boxes(self) -> list[tuple[int, int, int, int]]:
        """Boxes (left, top, right, bottom) of the slices in the refined image, row by row."""
        if self.grid is None or self.slice_size is None:
            return []
        columns, rows = self.grid
        width, height = self.slice_size
        return [
            (column * width, row * height, (column + 1) * width, (row + 1) * height)
            for row in range(rows)
            for column in range(columns)
        ]


def check_size(width: int, height: int) -> None:
    """Raises UserError unless both sides are positive."""
    if width < 1 or height < 1:
        raise UserError(f"image size must be positive, got {width} x {height}")


def floor_to_patches(length: float, patch_size: int) -> int:
    """Largest multiple of ``patch_size`` within ``length``, at least one patch.

    Example: ``floor_to_patches(405.9, 14)`` is 392; ``floor_to_patches(3, 14)`` is 14.
    """
    return max(floor(length / patch_size) * patch_size, patch_size)


def fit_area(
    size: Size,
    scale_resolution: int,
    patch_size: int,
    *,
    upscale: bool,
    max_aspect: float | None = None,
) -> Size:
    """Scales a size to about ``scale_resolution ** 2`` pixels, in whole patches.

    The height is computed and truncated first, the width follows from the truncated height: the
    published order, which is not symmetric under transposition (672x448 gives 406x266 but 448x672
    gives 266x406).

    Args:
        size: (width, height).
        scale_resolution: side of the square whose area is aimed at.
        patch_size: both sides become multiples of it.
        upscale: also enlarge sizes of a smaller area; otherwise those are only cut to patches.
        max_aspect: None for the published behaviour, else the longest side is at most this many
            times the shorter one.
    """
    width, height = size
    if width * height > scale_resolution * scale_resolution or upscale:
        ratio = width / height
        if max_aspect is not None:
            ratio = min(max(ratio, 1 / max_aspect), max_aspect)
        height = int(scale_resolution / sqrt(ratio))
        width = int(height * ratio)
    return floor_to_patches(width, patch_size), floor_to_patches(height, patch_size)


def choose_grid(log_ratio: float, multiple: int, max_slices: int) -> Size:
    """Grid of ``multiple - 1`` to ``multiple + 1`` slices whose shape is nearest to the image's.

    The first of equal candidates wins, so the order of the candidates and the double rounding of
    ``log(columns / rows)`` decide: a square image with 6 slices gets (3, 2), because
    ``|log(3/2)|`` rounds one unit below ``|log(2/3)|``.

    Args:
        log_ratio: natural logarithm of width / height of the image.
        multiple: how many squares of the scale resolution the image holds, already capped.
        max_slices: no candidate has more slices.
    """
    best, best_error = (1, 1), float("inf")
    for count in (multiple - 1, multiple, multiple + 1):
        if count == 1 or count > max_slices:
            continue
        for columns in range(1, count + 1):
            if count % columns:
                continue
            rows = count // columns
            error = abs(log_ratio - log(columns / rows))
            if error < best_error:
                best, best_error = (columns, rows), error
    return best


def plan_slices(
    width: int,
    height: int,
    max_slices: int = 7,
    scale_resolution: int = 336,
    patch_size: int = 14,
    *,
    bounded: bool = False,
    never_split: bool = False,
) -> SlicePlan:
    """Plans the overview and the slices of one image.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        max_slices: at most this many slices.
        scale_resolution: a view has about this many pixels squared.
        patch_size: side of a tower patch.
        bounded: keep every view's aspect ratio within `MAX_ASPECT_RATIO`. Equal to the published
            plan for every image whose views stay inside that bound; without it a 1x200000 image
            gives one view of 6196 patches.
        never_split: overview only, and always scaled to the full area.

    Example: ``plan_slices(672, 1088)`` has grid (2, 3), slices of 322x336, overview 252x420.

    Raises:
        ValueError: a size, ``max_slices``, ``scale_resolution`` or ``patch_size`` below 1, or a
            patch larger than the scale resolution.
    """
    check_size(width, height)
    if max_slices < 1 or patch_size < 1 or scale_resolution < patch_size:
        raise ValueError(
            "max_slices and patch_size must be at least 1, scale_resolution at least patch_size, "
            f"got {max_slices}, {patch_size}, {scale_resolution}"
        )
    max_aspect = MAX_ASPECT_RATIO if bounded else None
    size = (width, height)

    def fit(part: Size, upscale: bool) -> Size:
        return fit_area(part, scale_resolution, patch_size, upscale=upscale, max_aspect=max_aspect)

    multiple = min(ceil(width * height / scale_resolution**2), max_slices)
    if multiple <= 1 or never_split:
        return SlicePlan(size, fit(size, upscale=True), patch_size=patch_size)

    columns, rows = grid = choose_grid(log(width / height), multiple, max_slices)
    cell = (max(floor(width / columns), 1), max(floor(height / rows), 1))
    slice_size = fit(cell, upscale=True)
    return SlicePlan(
        image_size=size,
        overview_size=fit(size, upscale=False),
        grid=grid,
        refine_size=(slice_size[0] * columns, slice_size[1] * rows),
        slice_size=slice_size,
        num_slices=columns * rows,
        patch_size=patch_size,
    )


def fit_long_side(width: int, height: int, long_side: int) -> Size:
    """Size with the long side exactly ``long_side``, enlarging too; the short side is truncated.

    Published pre-resize of the evaluation loader (1024) and of TextVQA training images. The
    double-precision product may truncate one pixel low: 823x823 gives 1023x1024.

    Raises:
        UserError: the short side would vanish.
    """
    check_size(width, height)
    if width > height:
        size = (long_side, int((long_side / width) * height))
    else:
        size = (int((long_side / height) * width), long_side)
    if min(size) < 1:
        raise UserError(
            f"height and width must be > 0: {width} x {height} with a long side of {long_side} "
            f"gives {size[0]} x {size[1]}"
        )
    return size


def six_slice_size(width: int, height: int, scale_resolution: int = 336) -> Size:
    """Size at which an image holds about six squares of the scale resolution.

    Target of the published 10 % training augmentation.

    Example: ``six_slice_size(672, 448)`` is (1008, 672).
    """
    check_size(width, height)
    ratio = sqrt(6 * scale_resolution * scale_resolution / height / width)
    return max(int(width * ratio), 1), max(int(height * ratio), 1)


def pool_bins(rows: int, columns: int) -> tuple[int, int]:
    """Bins (rows, columns) of a resampler's windows on a map: the shape nearest to the map's.

    The first of equal candidates wins, as in the published code.

    Example: a 24x24 map has 3x3 bins, 16 rows x 36 columns have 2x4.
    """
    target = log(columns / rows)
    best = min(POOL_SHAPES, key=lambda shape: abs(target - log(shape[0] / shape[1])))
    return best[1], best[0]


def map_side(counts: Sequence[int]) -> int:
    """Side of the square token map of every view, which the layout "rows" needs.

    Example: ``map_side([144, 144])`` is 12.

    Args:
        counts: tokens of each view.

    Raises:
        UserError: the views do not all have the same square number of tokens.
    """
    side = isqrt(counts[0])
    if side < 1 or any(count != side * side for count in counts):
        raise UserError(
            "image.layout 'rows' joins square token maps, but the projector gives the views "
            f"{', '.join(str(count) for count in sorted(set(counts)))} tokens: set image.layout to "
            "'slices', or choose a projector with a fixed square number of tokens per view"
        )
    return side


def num_schema_tokens(plan: SlicePlan, layout: str = "slices", tokens_per_view: int = 0) -> int:
    """Separators in the text of one image.

    Args:
        plan: of the image.
        layout: "slices": one after each slice. "rows": one after each row of the joined token map,
            and one before the overview. The other layouts have none.
        tokens_per_view: a square number, for the layout "rows".

    Example: a grid of 2 columns and 3 rows of 144 tokens: 6, or ``3 * 12 + 1 = 37`` in rows.
    """
    if layout == "rows" and plan.grid is not None:
        return plan.grid[1] * map_side([tokens_per_view]) + 1
    return plan.num_slices if layout in ("slices", "rows") else 0


def num_image_positions(plan: SlicePlan, tokens_per_view: int, layout: str = "slices") -> int:
    """Positions that one image takes in the sequence, separators included.

    Example: six slices of 144 tokens: ``7 * 144 + 6 = 1014``; in a grid of 2 columns and 3 rows
    and in the layout "rows": ``36 * (24 + 1) + 1 + 144 = 1045``.
    """
    visual = plan.num_views * tokens_per_view
    return visual + num_schema_tokens(plan, layout, tokens_per_view)
