"""Scores of GQA as its official scorer computes them, but for what needs scene graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from llava_uhd.eval.metrics import mean

# Steps that only look something up are not counted as steps of reasoning.
_NO_STEPS = ("exist", "query: name", "choose name")


class Outcome(NamedTuple):
    """A prediction beside its question.

    Attributes:
        prediction: converted answer.
        question: entry of the questions file.
    """

    prediction: str
    question: Mapping[str, Any]

    @property
    def right(self) -> bool:
        """Both are the same, character by character."""
        return self.prediction == self.question["answer"]


def convert(answer: str) -> str:
    """The published conversion of an answer: periods at its end are removed, then lower case.

    White space is not touched: ``convert("Cat.")`` is "cat", ``convert("Cat. ")`` is "cat. ".
    """
    return answer.rstrip(".").lower()


def num_steps(question: Mapping[str, Any]) -> int:
    """Number of reasoning steps of a question."""
    texts = [f"{step['operation']}: {step['argument']}" for step in question["semantic"]]
    return sum(not any(word in text for word in _NO_STEPS) for text in texts)


def num_words(question: Mapping[str, Any]) -> int:
    """Number of words of a question."""
    return len(question["question"].split())


def accuracy(outcomes: Iterable[Outcome]) -> float:
    """Right predictions in percent."""
    return 100 * mean(outcome.right for outcome in outcomes)


def distribution(outcomes: Sequence[Outcome]) -> float | None:
    """How far the predicted answers of a global group are from the right ones: lower is better.

    Chi square of the counts of each right answer, averaged over the groups by their size, divided
    by 100; None without groups.

    Example: a group of 2 whose right answers are red, red and that is answered red, blue has
    (1 - 2)² / 2 = 0.5, which makes 0.005.
    """
    gold: dict[str, Counter[str]] = {}
    found: dict[str, Counter[str]] = {}
    for prediction, question in outcomes:
        group = question["groups"]["global"]
        if group is not None:
            gold.setdefault(group, Counter())[question["answer"]] += 1
            found.setdefault(group, Counter())[prediction] += 1
    if not gold:
        return None
    total, size = 0.0, 0
    for group, counts in gold.items():
        chi = sum((found[group][answer] - count) ** 2 / count for answer, count in counts.items())
        total += chi * counts.total()
        size += counts.total()
    return total / size / 100


def scores(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """All numbers of the official report's head, over balanced questions.

    ``validity`` and ``plausibility`` are 0 as in the report without a file of choices, which does
    not exist for testdev; a number is left out where it has no question.
    """
    result: dict[str, float] = {}
    if outcomes:
        result["accuracy"] = accuracy(outcomes)
    for name, wanted in (("binary", False), ("open", True)):
        rows = [each for each in outcomes if (_structure(each) == "query") is wanted]
        if rows:
            result[name] = accuracy(rows)
    result |= {"validity": 0.0, "plausibility": 0.0}
    spread = distribution(outcomes)
    return result if spread is None else {**result, "distribution": spread}


def tables(outcomes: Sequence[Outcome]) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy and number of questions by type, steps and words, in the order of the report."""
    result = {}
    for name, key in (
        ("structural type", _structure),
        ("semantic type", lambda each: each.question["types"]["semantic"]),
        ("steps number", lambda each: num_steps(each.question)),
        ("words number", lambda each: num_words(each.question)),
    ):
        parts: dict[Any, list[Outcome]] = {}
        for each in outcomes:
            parts.setdefault(key(each), []).append(each)
        result[name] = {
            str(value): {"accuracy": accuracy(parts[value]), "items": len(parts[value])}
            for value in sorted(parts)
        }
    return result


def _structure(outcome: Outcome) -> str:
    return outcome.question["types"]["structural"]
