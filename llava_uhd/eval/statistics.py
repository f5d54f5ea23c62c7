"""How sure a score is, and whether two models differ: intervals and paired tests, all with a seed.

Items that stand or fall together (the copies of a question, the questions about an image of MME)
are one unit: units are drawn, never parts of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Interval = tuple[float, float]

SEED = 20240607
RESAMPLES = 2000
LEVEL = 0.95
NORMAL = 1.959963984540054  # so many standard errors to either side hold 95 %
_BLOCK = 4_000_000  # drawn numbers in memory at a time

# Where a score is no mean, the task's own aggregation is called on each resample.
_AGGREGATED = 1_000_000  # items that these calls may go through, all together
_MOST, _FEWEST, _GROUPS = 1000, 100, 100
_SMALLEST = 10  # units that an interval needs


@dataclass(frozen=True)
class Paired:
    """Two models on the same items.

    Attributes:
        items: number of them.
        difference: mean of the second minus mean of the first.
        interval: 95 % of the paired bootstrap.
        p: two-sided, of no difference.
        test: "McNemar" or "bootstrap".
        gained: items (or units) on which the second is better.
        lost: on which it is worse.
    """

    items: int
    difference: float
    interval: Interval
    p: float
    test: str
    gained: int
    lost: int


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test.

    Of the items on which two models differ, each is as likely to have gone one way as the other:
    twice the smaller tail of the binomial distribution, 1 at most.

    Args:
        gained: items that only the second model has right.
        lost: items that only the first one has right.

    Example: ``mcnemar(1, 5)`` is 2 * (1 + 6) / 64 = 0.21875.
    """
    total, fewer = gained + lost, min(gained, lost)
    if total == 0:
        return 1.0
    whole = math.lgamma(total + 1) - total * math.log(2)
    tail = math.fsum(
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(total - k + 1)) for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def in_units(values: Sequence[float], units: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of values of each unit, in the order in which the units appear.

    Args:
        values: (N,) of the items.
        units: (N,) what each item belongs to.

    Returns:
        (U,) float64 sums and (U,) float64 numbers.
    """
    place: dict[object, int] = {}
    index = np.array([place.setdefault(unit, len(place)) for unit in units], dtype=np.int64)
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64), minlength=len(place))
    return sums, np.bincount(index, minlength=len(place)).astype(np.float64)


def resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means over the items of resamples of the units.

    Drawing units with replacement is drawing, by a multinomial law, how often each kind of unit
    occurs: few numbers, where many units are alike.

    Args:
        sums: (U,) of each unit.
        counts: (U,) items of each unit.
        resamples: R.
        seed: of the draws.

    Returns:
        (R,) float64.
    """
    kinds, often = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    found = []
    for start in range(0, resamples, size := max(1, _BLOCK // len(kinds))):
        rows = min(size, resamples - start)
        drawn = random.multinomial(len(sums), often / len(sums), size=rows)
        found.append((drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1]))
    return np.concatenate(found)


def middle(estimates: np.ndarray) -> Interval:
    """The middle 95 % of (R,) resampled values."""
    low, high = np.quantile(estimates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def unit_error(sums: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of the mean over the items of (U,) units; 0 for one unit.

    With one item in each unit this is the sample deviation over the root of their number.
    """
    if len(sums) < 2:
        return 0.0
    rest = sums - counts * (sums.sum() / counts.sum())
    factor = len(sums) / (len(sums) - 1)
    return float(math.sqrt(factor * np.square(rest).sum()) / counts.sum())


def mean_intervals(values: Sequence[float], units: Sequence[object]) -> dict[str, Interval]:
    """95 % intervals of a mean: ``clt``, by the central limit theorem, and ``bootstrap``.

    Args:
        values: (N,) of the items.
        units: (N,) what each item belongs to.
    """
    sums, counts = in_units(values, units)
    centre, reach = float(sums.sum() / counts.sum()), NORMAL * unit_error(sums, counts)
    drawn = resampled_means(sums, counts, RESAMPLES, SEED)
    return {"clt": (centre - reach, centre + reach), "bootstrap": middle(drawn)}


def paired(first: Sequence[float], second: Sequence[float], units: Sequence[object]) -> Paired:
    """Compares two models item by item.

    McNemar's exact test where all values are 0 or 1 and each item is a unit of its own; else the
    paired bootstrap: the p-value is the share of resamples whose difference is as far from the
    one that was found as that is from 0.

    Args:
        first: (N,) values of the first model.
        second: (N,) values of the second one, of the same items.
        units: (N,) what each item belongs to.

    Raises:
        ValueError: no items.
    """
    if not first:
        raise ValueError("no items to compare")
    changes = [b - a for a, b in zip(first, second, strict=True)]
    sums, counts = in_units(changes, units)
    difference = float(sums.sum() / counts.sum())
    drawn = resampled_means(sums, counts, RESAMPLES, SEED)
    gained, lost = int((sums > 0).sum()), int((sums < 0).sum())
    binary = {*first, *second} <= {0, 1} and len(sums) == len(first)
    if binary:
        p = mcnemar(gained, lost)
    else:
        # 1e-12: sums of the same numbers in another order are equal.
        far = (np.abs(drawn - difference) >= abs(difference) - 1e-12).sum()
        p = float((far + 1) / (RESAMPLES + 1)) if gained or lost else 1.0
    test = "McNemar" if binary else "bootstrap"
    return Paired(len(first), difference, middle(drawn), p, test, gained, lost)


def aggregate_intervals(
    rows: Sequence[T],
    units: Sequence[object],
    aggregate: Callable[[Sequence[T]], Mapping[str, float]],
    metric: str,
) -> dict[str, Interval]:
    """95 % interval of a score that is no mean.

    Where each item is a unit of its own, items are drawn anew (``bootstrap``). Else a unit must
    not be in a sample twice, because its items would be taken for one larger unit: the units are
    dealt into 100 groups, each is left out in turn, and the interval follows from how much the
    score changes (``jackknife``).

    Args:
        rows: (N,) scored items.
        units: (N,) what each belongs to.
        aggregate: rows to scores.
        metric: the score.

    Returns:
        Empty where there are too few units.
    """
    place: dict[object, list[T]] = {}
    for row, unit in zip(rows, units, strict=True):
        place.setdefault(unit, []).append(row)
    if len(place) < _SMALLEST:
        return {}
    if len(place) < len(rows):
        return _jackknife(list(place.values()), aggregate, metric)
    resamples = min(max(_AGGREGATED // len(rows), _FEWEST), _MOST)
    random = np.random.default_rng(SEED)
    found = []
    for _ in range(resamples):
        drawn = random.integers(0, len(rows), len(rows))
        found.append(aggregate([rows[index] for index in drawn]).get(metric))
    known = np.array([value for value in found if value is not None])
    # A rare category that is in some samples only makes scores that mean different things.
    return {"bootstrap": middle(known)} if len(known) == resamples else {}


def _jackknife(
    units: Sequence[Sequence[T]],
    aggregate: Callable[[Sequence[T]], Mapping[str, float]],
    metric: str,
) -> dict[str, Interval]:
    whole = aggregate([row for unit in units for row in unit]).get(metric)
    groups = min(_GROUPS, len(units))
    dealt = np.random.default_rng(SEED).permutation(len(units)) % groups
    found = [
        aggregate([row for unit, group in zip(units, dealt) if group != left for row in unit]).get(
            metric
        )
        for left in range(groups)
    ]
    known = np.array([value for value in found if value is not None])
    if whole is None or len(known) < groups:
        return {}
    error = math.sqrt((groups - 1) / groups * np.square(known - known.mean()).sum())
    return {"jackknife": (whole - NORMAL * error, whole + NORMAL * error)}


def unit_of(values: Sequence[float], score: float) -> int:
    """1 or 100 where a score is the mean of these values times that, else 0."""
    if not values:
        return 0
    mean = math.fsum(values) / len(values)
    return next((unit for unit in (1, 100) if math.isclose(unit * mean, score)), 0)


def intervals(
    rows: Sequence[T],
    metrics: Sequence[Mapping[str, float]],
    units: Sequence[object],
    scores: Mapping[str, float],
    main: str,
    aggregate: Callable[[Sequence[T]], Mapping[str, float]],
) -> dict[str, dict[str, Interval]]:
    """Metric -> kind -> 95 % interval, of every score that is a mean, and of the main one.

    Args:
        rows: (N,) scored items.
        metrics: (N,) their values by metric.
        units: (N,) what each belongs to.
        scores: of all items.
        main: the main score.
        aggregate: rows to scores.
    """
    found: dict[str, dict[str, Interval]] = {}
    for name, score in scores.items():
        having = [(each[name], unit) for each, unit in zip(metrics, units) if name in each]
        factor = unit_of([value for value, _ in having], score)
        if factor:
            found_ends = mean_intervals([v for v, _ in having], [unit for _, unit in having])
            found[name] = {
                kind: (factor * low, factor * high) for kind, (low, high) in found_ends.items()
            }
    if main in scores and main not in found:
        found_ends = aggregate_intervals(rows, units, aggregate, main)
        if found_ends:
            found[main] = found_ends
    return found


def ends(intervals: Mapping[str, Sequence[float]]) -> Sequence[float] | None:
    """The interval that a table with room for one shows."""
    kinds: Iterator[str] = (kind for kind in ("bootstrap", "jackknife", "clt") if kind in intervals)
    kind = next(kinds, None)
    return None if kind is None else intervals[kind]
