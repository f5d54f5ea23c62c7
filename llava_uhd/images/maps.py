"""From the token maps of single views to the rows of the sequence: integers only.

A `TokenMap` says which views are joined, what is cut away, how the rest is resampled and where the
learned newline stands. The processor counts the tokens of these maps, the model carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from llava_uhd.config.model import ImageConfig, VideoConfig
from llava_uhd.images.anyres import shrunk, unpadded
from llava_uhd.images.geometry import SlicePlan

Grid = tuple[int, int]


class Newline(IntEnum):
    """Where the learned newline stands in a map."""

    NONE = 0
    END = 1
    ROWS = 2


class TokenMap(NamedTuple):
    """Tokens of one or several views as one map in the sequence.

    Attributes:
        columns: views side by side.
        rows: views one above the other; the map takes ``columns * rows`` views in reading order.
        top: first kept row of tokens of the joined map.
        left: first kept column.
        height: kept rows.
        width: kept columns.
        out_height: rows after resampling.
        out_width: columns after resampling.
        pool: how it is resampled: 0 bilinearly, a positive stride by averages, a negative one by
            maxima.
        newline: a `Newline`.
    """

    columns: int
    rows: int
    top: int
    left: int
    height: int
    width: int
    out_height: int
    out_width: int
    pool: int = 0
    newline: int = Newline.NONE

    @property
    def tokens(self) -> int:
        """Rows of the sequence that the map takes."""
        newlines = {Newline.NONE: 0, Newline.END: 1, Newline.ROWS: self.out_height}
        return self.out_height * self.out_width + newlines[Newline(self.newline)]


def whole_map(shape: Grid, columns: int = 1, rows: int = 1, newline: int = 0) -> TokenMap:
    """Equal views joined, nothing cut away."""
    height, width = rows * shape[0], columns * shape[1]
    return TokenMap(columns, rows, 0, 0, height, width, height, width, newline=newline)


def uses_maps(image: ImageConfig, video: VideoConfig) -> bool:
    """Whether the sequence holds anything but the views' tokens as the projector gives them."""
    return image.layout in ("rows", "unpad", "spatial") or video.pool_stride > 1


def image_maps(config: ImageConfig, plan: SlicePlan, shapes: Sequence[Grid]) -> list[TokenMap]:
    """Maps of one image, in the order of the sequence.

    Args:
        config: layout, and the limit of tiles.
        plan: of the image.
        shapes: (rows, columns) of tokens of each view, in reading order.

    Example: 640x480 as one overview and 2x2 tiles of 27x27 tokens in the layout "unpad": 729 tokens
    of the overview, then 40 rows of 54 tokens and a newline.
    """
    if config.layout in ("slices", "flat") or (config.layout == "rows" and plan.grid is None):
        return [whole_map(shape) for shape in shapes]
    newline = config.layout == "unpad"
    if plan.grid is None:
        end = Newline.END if newline else Newline.NONE
        return [whole_map(shape, newline=end) for shape in shapes]
    columns, rows = plan.grid
    overview = whole_map(shapes[0 if plan.overview_first else -1])
    joined = whole_map(shapes[-1 if plan.overview_first else 0], columns, rows)
    if newline:
        joined = _without_padding(joined, config, plan)
    return [overview, joined] if plan.overview_first else [joined, overview]


def _without_padding(joined: TokenMap, config: ImageConfig, plan: SlicePlan) -> TokenMap:
    top, left, height, width = 0, 0, joined.height, joined.width
    if plan.slices_on is not None:
        top, left, height, width = unpadded(plan.image_size, (height, width))
    tile_tokens = joined.height * joined.width // (joined.columns * joined.rows)
    out_height, out_width = shrunk((height, width), config.max_tiles, tile_tokens)
    return joined._replace(
        top=top,
        left=left,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        newline=Newline.ROWS,
    )


def video_maps(image: ImageConfig, video: VideoConfig, shapes: Sequence[Grid]) -> list[TokenMap]:
    """Maps of one video, one per frame.

    Args:
        image: its layout says whether there is a learned newline.
        video: pooling, and where the newline stands.
        shapes: (rows, columns) of tokens of each frame.

    Example: 4 frames of 27x27, stride 2, newline "one_token": 3 maps of 196 tokens and one of 197.
    """
    maps = [_pooled(whole_map(shape), video) for shape in shapes]
    if image.layout != "unpad" or video.newline == "no_token":
        return maps
    if video.newline == "grid":
        return [each._replace(newline=Newline.ROWS) for each in maps]
    if video.newline == "frame":
        return [each._replace(newline=Newline.END) for each in maps]
    return [*maps[:-1], maps[-1]._replace(newline=Newline.END)]


def _pooled(whole: TokenMap, video: VideoConfig) -> TokenMap:
    stride = video.pool_stride
    if stride == 1:
        return whole
    if video.pool_mode == "bilinear":
        size = (-(-whole.height // stride), -(-whole.width // stride))
        pool = 0
    else:  # an incomplete square at the border is left out, as published
        size = (max(whole.height // stride, 1), max(whole.width // stride, 1))
        pool = stride if video.pool_mode == "average" else -stride
    return whole._replace(out_height=size[0], out_width=size[1], pool=pool)
