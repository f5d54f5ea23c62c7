"""Scores that a judge gives: pairs of a review, grades of MM-Vet, verdicts on video answers."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Pair = tuple[float, float]

# What published reviews hold where the reply could not be read.
UNREAD = (-1, -1)
_LONGEST_VERDICT = 1000  # characters


class Relative(NamedTuple):
    """Summary of a review.

    Attributes:
        relative: 100 times the mean score of the answers through that of the references.
        reference: mean score of the references, out of 100.
        model: mean score of the answers, out of 100.
    """

    relative: float
    reference: float
    model: float


def read_pair(reply: str) -> Pair | None:
    """The two scores in the first line of a reply, as the published reviews read them.

    Exactly two parts between single spaces, commas counting as spaces. None for anything else.

    Example: ``"8 9"`` and ``"8,9"`` give ``(8.0, 9.0)``; ``"8, 9"`` (three parts), a blank
    first line and ``"9/10"`` give None.
    """
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return None
    try:
        first, second = float(parts[0]), float(parts[1])
    except ValueError:
        return None
    return (first, second) if math.isfinite(first) and math.isfinite(second) else None


def summarise(pairs: Sequence[Sequence[float]]) -> Relative:
    """Means of pairs of scores, each rounded to 3 decimals before anything else, as published.

    Example: ``[(8, 4), (8, 6)]`` gives ``(62.5, 80.0, 50.0)``.

    Args:
        pairs: scores of reference and answer out of 10; at least one pair.
    """
    reference, model = (round(value, 3) for value in np.asarray(pairs, float).mean(0).tolist())
    return Relative(model / reference * 100 if reference else math.nan, reference * 10, model * 10)


def read_grade(reply: str) -> float | None:
    """The grade from 0 to 1 that a reply begins with, as MM-Vet's evaluator reads it, or None.

    Example: ``"0.5 because"`` gives 0.5; ``"1.5"`` and ``"good"`` give None.
    """
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def read_verdict(reply: str) -> tuple[bool, int] | None:
    """Right or not, and a whole score from 0 to 5, of a dictionary with ``pred`` and ``score``.

    The dictionary is Python's or JSON's, and text may stand around it; the score is cut to a whole
    number, as published.

    Example: ``"{'pred': 'yes', 'score': 4.8}"`` gives ``(True, 4)``.
    """
    found = re.search(r"\{[^{}]*\}", reply[:_LONGEST_VERDICT])
    value = None if found is None else _dictionary(found.group())
    if value is None or not isinstance(value.get("pred"), str):
        return None
    words = value["pred"].lower()
    try:
        score = int(float(value.get("score")))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    if ("yes" not in words and "no" not in words) or not 0 <= score <= 5:
        return None
    return "yes" in words, score


def _dictionary(text: str) -> Mapping | None:
    value = None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        try:
            value = json.loads(text)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None
