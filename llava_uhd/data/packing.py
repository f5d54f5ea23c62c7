"""Plans of packed training: samples side by side in rows of a fixed number of tokens.

A plan is arithmetic on the samples' token counts and costs, decided by (counts, budget, seed,
epoch) alone. Rows are filled from a shuffled order; rows of like cost make a step, so that no
device waits for another. Nothing is padded, repeated or left out.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava_uhd.data.filling import pack_rows

# Rows of like cost are looked for among those of so many steps.
WINDOW_STEPS = 32

# Tokens (N,) and costs (N,) of all samples in an epoch.
EpochCounts = Callable[[int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Plan:
    """The rows of an epoch, step after step.

    Attributes:
        order: (N,) int64 indices of the samples, row after row.
        ends: (rows + 1,) int64: row r holds ``order[ends[r]:ends[r + 1]]``; it may be empty.
        rows_per_step: rows of an optimizer step, over all devices and accumulated passes.
        tail_steps: steps at the end whose rows hold less because the epoch ends there.
    """

    order: np.ndarray
    ends: np.ndarray
    rows_per_step: int
    tail_steps: int

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def steps(self) -> int:
        """Optimizer steps of the epoch."""
        return len(self) // self.rows_per_step

    def row(self, number: int) -> list[int]:
        """Indices of the samples of a row."""
        return self.order[self.ends[number] : self.ends[number + 1]].tolist()

    def rows(self) -> Iterator[list[int]]:
        """All rows."""
        return (self.row(number) for number in range(len(self)))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(steps, rows_per_step) sums over each row of a value (N,) of the samples."""
        before = np.concatenate([[0], np.cumsum(values[self.order])])
        return np.diff(before[self.ends]).reshape(-1, self.rows_per_step)


class Report(NamedTuple):
    """What a plan comes to.

    Attributes:
        samples: of the epoch.
        rows: of the epoch.
        steps: of the epoch.
        fill: share of the rows' slots that hold a token.
        samples_per_step: mean.
        fewest_samples: of a step that is not at the end of the epoch.
        most_samples: of a step.
        tokens_per_step: mean.
        imbalance: cost of the costliest row of a step over the mean of its rows, mean over steps.
        worst_imbalance: largest, over steps that are not at the end of the epoch.
    """

    samples: int
    rows: int
    steps: int
    fill: float
    samples_per_step: float
    fewest_samples: int
    most_samples: int
    tokens_per_step: float
    imbalance: float
    worst_imbalance: float


def report(plan: Plan, tokens: np.ndarray, costs: np.ndarray, budget: int) -> Report:
    """Figures of a plan.

    Args:
        plan: of an epoch.
        tokens: (N,) of the samples.
        costs: (N,) of the samples.
        budget: tokens of a row.
    """
    samples = plan.sums(np.ones_like(plan.order)).sum(1)
    spread = plan.sums(costs.astype(float))
    imbalance = spread.max(1) / np.maximum(spread.mean(1), 1e-300)
    whole = slice(0, max(plan.steps - plan.tail_steps, 0) or plan.steps)
    total = int(tokens.sum())
    return Report(
        len(plan.order),
        len(plan),
        plan.steps,
        total / (len(plan) * budget),
        len(plan.order) / plan.steps,
        int(samples[whole].min()),
        int(samples.max()),
        total / plan.steps,
        float(imbalance.mean()),
        float(imbalance[whole].max()),
    )


def arrange(
    rows: Sequence[list[int]],
    costs: np.ndarray,
    rows_per_step: int,
    steps: int,
    generator: random.Random,
) -> Plan:
    """Rows of like cost into steps, the steps in random order.

    The rows that do not fill the last steps are split until they do: every step has as many rows,
    some of them empty where there are fewer samples than rows.

    Args:
        rows: from `pack_rows`.
        costs: (N,) of the samples.
        rows_per_step: devices times accumulated passes.
        steps: of the epoch, at least ``len(rows) / rows_per_step``.
        generator: of the order.
    """
    missing = steps * rows_per_step - len(rows)
    if missing < 0:
        raise ValueError(f"{len(rows)} rows do not fit into {steps} steps of {rows_per_step}")
    tail = missing // rows_per_step + 1 if missing else 0
    whole = (steps - tail) * rows_per_step
    sums = np.array([costs[row].sum() for row in rows[:whole]])
    groups: list[np.ndarray] = []
    shuffled = shuffle(whole, generator)
    for start in range(0, whole, WINDOW_STEPS * rows_per_step):
        window = shuffled[start : start + WINDOW_STEPS * rows_per_step]
        groups += np.split(
            window[np.argsort(sums[window], kind="stable")], len(window) // rows_per_step
        )
    arranged = [
        rows[number] for place in shuffle(len(groups), generator) for number in groups[place]
    ]
    arranged += _split_rows(rows[whole:], costs, tail * rows_per_step)
    ends = np.cumsum([0, *map(len, arranged)])
    order = np.fromiter((index for row in arranged for index in row), np.int64, int(ends[-1]))
    return Plan(order, ends, rows_per_step, tail)


def _split_rows(rows: Sequence[list[int]], costs: np.ndarray, count: int) -> list[list[int]]:
    """The samples of rows in ``count`` rows, by rising cost; the costliest is halved first."""
    # (negative cost, place, row): the place decides between equals, as rows come.
    waiting = [(-float(costs[row].sum()), place, row) for place, row in enumerate(rows)]
    heapq.heapify(waiting)
    single: list[tuple[float, int, list[int]]] = []
    place = len(rows)
    while waiting and len(waiting) + len(single) < count:
        costliest = heapq.heappop(waiting)
        if len(costliest[2]) == 1:
            single.append(costliest)
            continue
        for half in _halves(costliest[2], costs):
            heapq.heappush(waiting, (-float(costs[half].sum()), place, half))
            place += 1
    found = [row for _, _, row in sorted([*waiting, *single], reverse=True)]
    return [[] for _ in range(count - len(found))] + found


def _halves(row: list[int], costs: np.ndarray) -> list[list[int]]:
    """A row of two samples or more as two of like cost."""
    halves: list[list[int]] = [[], []]
    sums = [0.0, 0.0]
    for index in sorted(row, key=lambda index: (-float(costs[index]), index)):
        lighter = int(sums[1] < sums[0])
        halves[lighter].append(index)
        sums[lighter] += float(costs[index])
    return halves if halves[1] else [row[:1], row[1:]]


def shuffle(count: int, generator: random.Random) -> np.ndarray:
    """(count,) a random order.

    Only the generator's own stream is used, which is the same in every Python version.
    """
    keys = np.fromiter((generator.random() for _ in range(count)), np.float64, count)
    return np.argsort(keys, kind="stable")


class Packing:
    """The plans of a run.

    Every epoch has the same number of steps, the most that one of them needs: the trainer counts
    on it.

    Args:
        counts: tokens and costs of all samples, by epoch.
        budget: tokens of a row.
        rows_per_step: devices times accumulated passes.
        seed: of the run.
        epochs: of the run; may be a fraction.
        max_steps: of the run, instead of ``epochs``; 0 or less: none.

    Raises:
        TooLongError: a sample does not fit into a row.
    """

    def __init__(
        self,
        counts: EpochCounts,
        budget: int,
        rows_per_step: int,
        seed: int = 0,
        epochs: float = 1,
        max_steps: int = 0,
    ) -> None:
        self.counts = counts
        self.budget = budget
        self.rows_per_step = rows_per_step
        self.seed = seed
        self._packed: tuple[int, list[list[int]]] | None = None
        self._planned: tuple[int, Plan] | None = None
        self.steps = epoch = 0
        last: float = 1
        while epoch < last:
            self.steps = max(self.steps, -(-len(self._rows(epoch)) // rows_per_step))
            last = max_steps / self.steps if max_steps > 0 else epochs
            epoch += 1

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return self.steps * self.rows_per_step

    def _generator(self, epoch: int) -> random.Random:
        # A text as seed is hashed, alike on every machine and Python version.
        return random.Random(f"packing {self.seed} {epoch}")

    def _rows(self, epoch: int) -> list[list[int]]:
        if self._packed is None or self._packed[0] != epoch:
            tokens = self.counts(epoch)[0]
            order = shuffle(len(tokens), self._generator(epoch)).tolist()
            self._packed = (epoch, pack_rows(tokens, self.budget, order))
        return self._packed[1]

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch of the run, counted from 0."""
        if self._planned is None or self._planned[0] != epoch:
            generator = random.Random(f"steps {self.seed} {epoch}")
            costs = self.counts(epoch)[1]
            made = arrange(self._rows(epoch), costs, self.rows_per_step, self.steps, generator)
            self._packed, self._planned = None, (epoch, made)
        return self._planned[1]

    def report(self, epoch: int = 0) -> Report:
        """Figures of an epoch's plan."""
        tokens, costs = self.counts(epoch)
        return report(self.plan(epoch), tokens, costs, self.budget)

    def digest(self) -> str:
        """SHA-256 of what all plans follow from."""
        tokens, costs = self.counts(0)
        digest = hashlib.sha256(f"{self.budget} {self.rows_per_step} {self.seed}".encode())
        digest.update(np.ascontiguousarray(tokens, np.int64).tobytes())
        digest.update(np.ascontiguousarray(costs, np.float64).tobytes())
        return digest.hexdigest()


def rows_for(samples: float, samples_per_row: float, devices: int) -> int:
    """Rows of a step that holds about so many samples: a multiple of the devices.

    Example: 128 samples, 5.2 to a row, 8 devices: 24 rows, three for each device.
    """
    return devices * max(1, round(samples / (samples_per_row * devices)))


def mean_budget(tokens: np.ndarray, samples: int) -> int:
    """Tokens that ``samples`` samples have on average, at least those of the longest one."""
    return max(math.ceil(float(tokens.mean()) * samples), int(tokens.max()))
