"""Boxes of referring expressions (RefCOCO, RefCOCO+, RefCOCOg): parser and overlap as published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 shares of the picture's width and height."""

SCALE = 1000.0  # the published scorer multiplies shares by it before it rounds to single precision
THRESHOLD = 0.5


class BoxTotals(NamedTuple):
    """Scores of a split.

    Attributes:
        accuracy: share of all samples with an overlap above 0.5; an unreadable box is wrong.
        accuracy_of_parsed: the published number: unreadable samples are left out of the count.
        mean_iou_of_parsed: mean overlap of the readable samples.
        samples: all.
        parsed: readable ones.
    """

    accuracy: float
    accuracy_of_parsed: float
    mean_iou_of_parsed: float
    samples: int
    parsed: int


def parse_box(text: str) -> Box | None:
    r"""Reads ``[x1, y1, x2, y2]``, with or without brackets, from the text before a blank line.

    Anything else than four finite numbers is None; the published parser dies of four parts that
    are not numbers.

    Example: ``parse_box("[0.1, 0, 0.5, 1]\n\nIt is red.")`` is ``(0.1, 0.0, 0.5, 1.0)``.
    """
    first = text.split("\n\n")[0].replace("[", "").replace("]", "")
    parts = first.split(",")
    if len(parts) != 4:
        return None
    try:
        x1, y1, x2, y2 = (float(part) for part in parts)
    except ValueError:
        return None
    return (x1, y1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None


def overlap(first: Box, second: Box) -> float:
    """Intersection over union, in single precision as published.

    Corners are taken as they are: a box with exchanged corners has no intersection with anything.

    Example: ``overlap((0, 0, 1, 1), (0, 0, 1, 0.5))`` is 0.5.
    """
    a, b = (torch.tensor([value * SCALE for value in box]) for box in (first, second))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp(min=0)
    shared = sides[0] * sides[1]
    union = areas[0] + areas[1] - shared
    return float(shared / union) if union else 0.0


def box_totals(overlaps: Sequence[float | None]) -> BoxTotals:
    """Scores of a split from the overlap of each sample; None where the box was unreadable.

    A split without a readable sample has 0 everywhere. The mean overlap is a sum in single
    precision, whose last digits depend on the order: published is that of the answer file.

    Raises:
        ValueError: no samples.
    """
    if not overlaps:
        raise ValueError("no samples")
    known = torch.tensor([value for value in overlaps if value is not None])
    right = int((known > THRESHOLD).sum())
    return BoxTotals(
        accuracy=right / len(overlaps),
        accuracy_of_parsed=right / max(len(known), 1),
        mean_iou_of_parsed=float(known.mean()) if len(known) else 0.0,
        samples=len(overlaps),
        parsed=len(known),
    )
