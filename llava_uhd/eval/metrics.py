"""Scores as pure functions of texts and numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def exact_match(answer: str, reference: str) -> float:
    """1 if both texts are the same but for the white space around them, else 0."""
    return float(answer.strip() == reference.strip())


def place_accuracy(answer: str, reference: str) -> float:
    """Share of the characters of ``reference`` that ``answer`` has in the same place.

    A missing character is wrong; what ``answer`` has beyond the reference is not looked at.

    Example: ``place_accuracy("1294", "123")`` is 2/3.

    Raises:
        ValueError: empty reference.
    """
    if not reference:
        raise ValueError("the reference is empty")
    right = sum(a == b for a, b in zip(answer, reference))
    return right / len(reference)


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean.

    Raises:
        ValueError: no values: an average over nothing is no score.
    """
    known = list(values)
    if not known:
        raise ValueError("the mean of no values")
    return math.fsum(known) / len(known)


def standard_error(values: Iterable[float]) -> float:
    """Standard error of the mean: sample deviation / sqrt(n); 0 for a single value.

    Example: ``standard_error([0, 1, 1, 0])`` is ``sqrt(1/3) / 2``, about 0.289.
    """
    known = list(values)
    if len(known) < 2:
        return 0.0
    centre = mean(known)
    variance = math.fsum((value - centre) ** 2 for value in known) / (len(known) - 1)
    return math.sqrt(variance / len(known))


def grouped(items: Sequence[T], key: Callable[[T], str | None]) -> dict[str, list[T]]:
    """Items by key, in the order in which the keys appear; a key of None leaves the item out."""
    groups: dict[str, list[T]] = {}
    for item in items:
        name = key(item)
        if name is not None:
            groups.setdefault(name, []).append(item)
    return groups


def mean_of_each(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the rows that have it.

    Example: ``[{"a": 1, "b": 0}, {"a": 0}]`` gives ``{"a": 0.5, "b": 0.0}``.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: mean(row[name] for row in rows if name in row) for name in names}


def percent_of_each(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`mean_of_each` times 100, as most benchmarks are reported."""
    return {name: 100 * value for name, value in mean_of_each(rows).items()}
