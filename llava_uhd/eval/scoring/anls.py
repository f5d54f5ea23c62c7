"""Average normalised Levenshtein similarity, as DocVQA defines it and as LLaVA-UHD v2 computed it.

Both give 0 to a similarity below 0.5; exactly 0.5 counts.
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance in characters: insertions, deletions and replacements cost 1.

    Example: ``edit_distance("July", "Jul")`` is 1.
    """
    if len(first) < len(second):
        first, second = second, first
    row = list(range(len(second) + 1))
    for index, character in enumerate(first, 1):
        diagonal, row[0] = row[0], index
        for place, other in enumerate(second, 1):
            cost = min(row[place] + 1, row[place - 1] + 1, diagonal + (character != other))
            diagonal, row[place] = row[place], cost
    return row[-1]


def anls(answer: str, references: Sequence[str]) -> float:
    """DocVQA's similarity: the best over the accepted answers.

    Texts are compared in lower case with white space collapsed, but the distance is divided by the
    length of the longer *original* text, in upper case as published (a "ß" counts twice).

    Example: ``anls("Jul", ["July", "Aug"])`` is 0.75.

    Raises:
        ValueError: no references.
    """
    if not references:
        raise ValueError("no accepted answers to compare with")
    nearest = min(_distance(answer, reference) for reference in references)
    return _threshold(1 - nearest)


def _distance(answer: str, reference: str) -> float:
    length = max(len(answer.upper()), len(reference.upper()))
    if not length:
        return 0.0
    return edit_distance(" ".join(reference.lower().split()), " ".join(answer.lower().split())) / (
        length
    )


def anls_uhd_v2(answer: str, reference: str) -> float:
    """LLaVA-UHD v2's similarity to the one reference: both stripped and in lower case.

    Two empty texts are equal here; the published code divides by zero.
    """
    answer, reference = answer.strip().lower(), reference.strip().lower()
    length = max(len(answer), len(reference))
    return _threshold(1 - edit_distance(answer, reference) / length) if length else 1.0


def _threshold(similarity: float) -> float:
    return similarity if similarity >= THRESHOLD else 0.0
