"""Everything random in a step, from one seed, so that a resumed run repeats it."""

from __future__ import annotations

import random

import numpy as np
import torch

from llava_uhd.train.vdim.jitter import Jitter, JitterRange, sample_jitter


def seed_of(*numbers: int) -> int:
    """A seed below 2**63 that differs for every sequence of numbers, in their order.

    Example: ``seed_of(0, 7, 1)`` for seed 0, step 7, micro-batch 1.
    """
    state = np.random.SeedSequence([number % 2**32 for number in numbers])
    return int(state.generate_state(1, np.uint64)[0]) >> 1


class Draws:
    """Random numbers of one step, drawn on the CPU and thus the same on every device.

    Args:
        seed: see `seed_of`.
    """

    def __init__(self, seed: int) -> None:
        self.coins = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        # The control's own, so that with or without it everything else is drawn alike.
        self.aside = torch.Generator().manual_seed(seed_of(seed, 1))

    def jitter(self, limits: JitterRange, size: tuple[int, int]) -> Jitter:
        """A view of pictures of (height, width)."""
        return sample_jitter(limits, size, self.coins, self.generator)

    def projection(self, batch: int, width: int, to: int) -> torch.Tensor:
        """Normal (batch, width, to), not yet normalised."""
        return torch.randn(batch, width, to, generator=self.generator)

    def keep(self, batch: int, rows: int, columns: int, control: bool = False) -> torch.Tensor:
        """Uniform (batch, rows, columns, 1) for `AttentionDownsampler`."""
        generator = self.aside if control else self.generator
        return torch.rand(batch, rows, columns, 1, generator=generator)

    def points(self, size: tuple[int, int], count: int) -> torch.Tensor:
        """int64 (2, count): rows, then columns, of places in (height, width), with replacement."""
        rows = torch.randint(0, size[0], (count,), generator=self.generator)
        columns = torch.randint(0, size[1], (count,), generator=self.generator)
        return torch.stack([rows, columns])
