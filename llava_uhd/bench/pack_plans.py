"""What batches hold: padded in two orders, and packed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from llava_uhd.bench.pack_data import Lengths
from llava_uhd.data.packing import Packing, mean_budget
from llava_uhd.data.sampler import modality_length_grouped_indices

SHUFFLED, GROUPED, PACKED = "shuffled", "grouped", "packed"


@dataclass(frozen=True)
class Sharing:
    """How samples are shared out.

    Attributes:
        per_device: samples of a padded batch.
        devices: that work at the same time.
        accumulated: batches of each device in an optimizer step.
    """

    per_device: int = 16
    devices: int = 8
    accumulated: int = 1

    @property
    def per_step(self) -> int:
        """Batches of an optimizer step."""
        return self.devices * self.accumulated


@dataclass(frozen=True)
class Way:
    """One way to make batches.

    Attributes:
        name: of the way.
        slots: positions of all batches, padding included.
        fill: share of them that holds a token.
        batches: forward passes of all devices together.
        samples_per_step: mean.
        imbalance: costliest batch of a step over the mean of its batches, mean over whole steps.
        operations: of all batches, padding included, in training.
        plan_s: CPU seconds of making the order.
        row: slots of a batch: of a packed row, or of the largest padded batch.
    """

    name: str
    slots: int
    fill: float
    batches: int
    samples_per_step: float
    imbalance: float
    operations: float
    plan_s: float
    row: int

    def to_dict(self) -> dict[str, Any]:
        """Plain form for JSON."""
        return asdict(self)


def shuffled_order(lengths: Lengths, sharing: Sharing, seed: int) -> list[int]:
    """The order without grouping."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(lengths.tokens), generator=generator).tolist()


def grouped_order(lengths: Lengths, sharing: Sharing, seed: int) -> list[int]:
    """The published ``group_by_modality_length``."""
    generator = torch.Generator().manual_seed(seed)
    return modality_length_grouped_indices(
        lengths.words, sharing.per_device, sharing.per_step, generator
    )


def padded_way(
    name: str, order: Sequence[int], lengths: Lengths, sharing: Sharing, plan_s: float
) -> Way:
    """Figures of padded batches in an order."""
    size = sharing.per_device
    starts = range(0, len(order), size)
    batches = [np.array(order[start : start + size]) for start in starts]
    counts = np.array([len(batch) for batch in batches])
    longest = np.array([lengths.tokens[batch].max() for batch in batches])
    vision = np.array([lengths.vision[batch].sum() for batch in batches])
    costs = counts * lengths.language(longest) + vision
    slots = int((counts * longest).sum())
    return Way(
        name,
        slots,
        int(lengths.tokens.sum()) / slots,
        len(batches),
        len(order) / (len(batches) / sharing.per_step),
        _imbalance(costs, sharing.per_step),
        float(costs.sum()),
        plan_s,
        int((counts * longest).max()),
    )


def _imbalance(costs: np.ndarray, per_step: int) -> float:
    whole = len(costs) // per_step * per_step
    if not whole:
        return 1.0
    steps = costs[:whole].reshape(-1, per_step)
    return float((steps.max(1) / steps.mean(1)).mean())


def packed_way(
    lengths: Lengths, sharing: Sharing, seed: int, budget: int | None = None
) -> tuple[Way, Packing]:
    """Figures of packed rows.

    Args:
        lengths: of the data.
        sharing: of the samples.
        seed: of the order.
        budget: tokens of a row; None: those of ``per_device`` average samples.
    """
    costs = lengths.costs
    begun = time.process_time()
    if budget is None:
        budget = mean_budget(lengths.tokens, sharing.per_device)
    packing = Packing(lambda epoch: (lengths.tokens, costs), budget, sharing.per_step, seed)
    plan = packing.plan(0)
    plan_s = time.process_time() - begun
    found = packing.report()
    way = Way(
        f"{PACKED} {budget:,}",
        found.rows * budget,
        found.fill,
        found.rows,
        found.samples_per_step,
        _imbalance(plan.sums(costs).ravel(), sharing.per_step),
        float(costs.sum()),
        plan_s,
        budget,
    )
    return way, packing


def compare_plans(
    lengths: Lengths, sharing: Sharing, budgets: Sequence[int | None], seed: int = 0
) -> list[Way]:
    """All ways over the same data.

    Args:
        lengths: of the data.
        sharing: of the samples.
        budgets: tokens of packed rows, see `packed_way`.
        seed: of the orders.
    """
    ways = []
    for name, make in ((SHUFFLED, shuffled_order), (GROUPED, grouped_order)):
        begun = time.process_time()
        order = make(lengths, sharing, seed)
        plan_s = time.process_time() - begun
        ways.append(padded_way(name, order, lengths, sharing, plan_s))
    return ways + [packed_way(lengths, sharing, seed, budget)[0] for budget in budgets]
