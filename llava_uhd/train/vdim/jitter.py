"""Jitter: shifted, enlarged, mirrored views of a picture and, by the same numbers, of its maps.

A map that is right must, after the same jitter, shrink to the features of the jittered picture:
that is what teaches the upsampler.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Jitter:
    """Parameters of one view.

    Attributes:
        x: first ROW of the cut in the padded and enlarged picture.
        y: first COLUMN.
        zoom: factor, 1 or more.
        flip: mirrored left to right.
    """

    x: int
    y: int
    zoom: float = 1.0
    flip: bool = False


@dataclass(frozen=True)
class JitterRange:
    """What `sample_jitter` may draw.

    Attributes:
        max_pad: pixels of reflected border around the picture.
        max_zoom: largest factor.
        use_flips: mirror every second view.
    """

    max_pad: int
    max_zoom: float
    use_flips: bool = True


def sample_jitter(
    limits: JitterRange, size: tuple[int, int], coins: random.Random, generator: torch.Generator
) -> Jitter:
    """Draws a view; the same draws in the same order as the published code.

    Args:
        limits: what may be drawn.
        size: (height, width) of the picture in pixels.
        coins: flip, whether to zoom, and the factor, in this order.
        generator: row and column, in this order.
    """
    height, width = size
    flip = coins.random() > 0.5 if limits.use_flips else False
    zoomed = coins.random() > 0.5
    zoom = coins.uniform(1, limits.max_zoom) if zoomed else 1.0
    zoom = float(torch.tensor(zoom, dtype=torch.float32))  # published in this precision
    rows = int((height + 2 * limits.max_pad) * zoom) - height + 1
    columns = int((width + 2 * limits.max_pad) * zoom) - width + 1
    x = int(torch.randint(0, rows, (), generator=generator))
    y = int(torch.randint(0, columns, (), generator=generator))
    return Jitter(x, y, zoom, flip)


def apply_jitter(pictures: torch.Tensor, jitter: Jitter, max_pad: int) -> torch.Tensor:
    """Pads by reflection, enlarges (bilinear), cuts to the old size and mirrors.

    Args:
        pictures: (B, C, H, W), pictures or maps of the same size in pixels.
        jitter: one view for all of them.
        max_pad: that the view was drawn for, below H and W.

    Returns:
        (B, C, H, W).
    """
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, [max_pad] * 4, mode="reflect") if max_pad else pictures
    if jitter.zoom > 1:
        padded = F.interpolate(
            padded, scale_factor=jitter.zoom, mode="bilinear", align_corners=False
        )
    view = padded[..., jitter.x : jitter.x + height, jitter.y : jitter.y + width]
    return view.flip(-1) if jitter.flip else view
