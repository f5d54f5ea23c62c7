"""Enlarging, jittering and blurring a map as two matrix products.

Each of these acts on rows and columns alike and is linear, so any chain of them is ``R M C^T`` with
a small matrix for each axis. No map in between is ever made: at 336 pixels and 1024 channels each
would take half a gigabyte per picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from llava_uhd.train.vdim.jitter import Jitter

BLUR_TAPS = 5
BLUR_SIGMA = 1.0


def blur_weights() -> list[float]:
    """Taps of the Gaussian, adding up to 1."""
    offsets = range(-(BLUR_TAPS // 2), BLUR_TAPS // 2 + 1)
    weights = [math.exp(-(offset**2) / (2 * BLUR_SIGMA**2)) for offset in offsets]
    return [weight / sum(weights) for weight in weights]


def blur_rows(rows: torch.Tensor) -> torch.Tensor:
    """Gaussian along the last axis of (1, N, L), borders reflected."""
    padded = F.pad(rows, [BLUR_TAPS // 2] * 2, mode="reflect")
    length = rows.shape[-1]
    total = torch.zeros_like(rows)
    for index, weight in enumerate(blur_weights()):
        total += weight * padded[..., index : index + length]
    return total


@dataclass(frozen=True)
class Resampling:
    """What is done to a map, in this order.

    Attributes:
        size: (height, width) it is enlarged to (bilinear, align_corners False).
        jitter: a view; None for none.
        max_pad: border that the view was drawn for.
        blur: at the end.
    """

    size: tuple[int, int]
    jitter: Jitter | None = None
    max_pad: int = 0
    blur: bool = False

    def matrix(self, axis: int, length: int, device: torch.device) -> torch.Tensor:
        """What happens along one axis.

        Args:
            axis: 0 for rows, 1 for columns.
            length: of the map along it.
            device: where to make it.

        Returns:
            float32 (size[axis], length).
        """
        unit = torch.eye(length, device=device)[None]  # (1, inputs, positions)
        size = self.size[axis]
        if length != size:
            unit = F.interpolate(unit, size, mode="linear", align_corners=False)
        if self.jitter is not None:
            if self.max_pad:
                unit = F.pad(unit, [self.max_pad] * 2, mode="reflect")
            if self.jitter.zoom > 1:
                zoom = self.jitter.zoom
                unit = F.interpolate(unit, scale_factor=zoom, mode="linear", align_corners=False)
            start = self.jitter.y if axis else self.jitter.x
            unit = unit[..., start : start + size]
            if axis and self.jitter.flip:
                unit = unit.flip(-1)
        if self.blur:
            unit = blur_rows(unit)
        return unit[0].T.contiguous()

    def __call__(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) to float32 (B, C, *size)."""
        with torch.autocast(maps.device.type, enabled=False):
            rows = self.matrix(0, maps.shape[-2], maps.device)
            columns = self.matrix(1, maps.shape[-1], maps.device)
            return rows @ (maps.float() @ columns.T)
