"""POPE: yes or no, and what follows from their counts."""

from __future__ import annotations

from collections.abc import Sequence


def read_answer(text: str) -> str:
    """The published reading of an answer: "no" or "yes".

    What stands before the first period, without commas, in words at single spaces: one of "No",
    "not", "no" makes "no", everything else "yes": an empty text, "NO" and "no!" too.

    Example: ``read_answer("There are, no, dogs. Yes.")`` is ``"no"``.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def measures(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of "yes", with "yes" as the positive class.

    Args:
        answers: as `read_answer` gives them.
        labels: right ones, "yes" or "no".

    A share of nothing (the published program fails there) is 0.

    Example: answers yes, yes, no and labels yes, no, no have precision 1/2 and recall 1.
    """
    pairs = list(zip(answers, labels, strict=True))
    hits = pairs.count(("yes", "yes"))
    said, true = list(answers).count("yes"), list(labels).count("yes")
    precision, recall = _share(hits, said), _share(hits, true)
    return {
        "accuracy": _share(sum(answer == label for answer, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _share(2 * precision * recall, precision + recall),
        "yes_ratio": _share(said, len(pairs)),
    }


def counts(answers: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """Right and wrong answers: ``TP``, ``FP``, ``TN``, ``FN``."""
    pairs = list(zip(answers, labels, strict=True))
    names = {"TP": ("yes", "yes"), "FP": ("yes", "no"), "TN": ("no", "no"), "FN": ("no", "yes")}
    return {name: pairs.count(pair) for name, pair in names.items()}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
