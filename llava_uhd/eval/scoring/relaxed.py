"""Relaxed accuracy of ChartQA: numbers may be 5 % off."""

from __future__ import annotations

from collections.abc import Sequence

TOLERANCE = 0.05


def parse_number(text: str) -> float | None:
    """A text as a number, or None; a percent sign at the end divides by 100.

    Everything that ``float`` reads counts: "1e3", "nan", "inf"; "1,000" and "$ 5" do not.

    Example: ``parse_number("50%")`` is 0.5.
    """
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_match(answer: str, reference: str) -> float:
    """1 if a number is within 5 % of the reference, or a text equals it but for case, else 0.

    The answer is stripped. A reference of 0 has no 5 %: it wants the same text, "0".
    """
    answer = answer.strip()
    number, target = parse_number(answer), parse_number(reference)
    if number is not None and target:
        return float(abs(number - target) / abs(target) <= TOLERANCE)
    return float(answer.lower() == reference.lower())


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """The best of `relaxed_match` over the accepted answers.

    Raises:
        ValueError: no references.
    """
    return max(relaxed_match(answer, reference) for reference in references)
