"""What a measuring process imports: little, so that it starts fast."""

from __future__ import annotations

import numpy as np
import torch

from llava_uhd.bench.timing import Variant


def fill(task: int, form: str) -> Variant:
    """Makes ``task`` MiB, in the long form four times as much."""
    size = task * (4 if form == "long" else 1) * 2**20
    return Variant(lambda: np.full(size, 3, np.uint8), lambda made: torch.tensor([made[-1] * 1.0]))
