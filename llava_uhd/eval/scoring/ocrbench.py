"""OCRBench: an answer is right if it contains one of the accepted texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

FORMULAS = "Handwritten Mathematical Expression Recognition"

# Group of the report -> its categories. The score is the number of right answers out of 1000.
GROUPS = {
    "Text Recognition": (
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
    ),
    "Scene Text-centric VQA": ("Scene Text-centric VQA",),
    "Doc-oriented VQA": ("Doc-oriented VQA",),
    "Key Information Extraction": ("Key Information Extraction",),
    FORMULAS: (FORMULAS,),
}
CATEGORIES = tuple(name for names in GROUPS.values() for name in names)


def ocrbench_hit(answer: str, references: Iterable[str], category: str) -> float:
    """1 if one of the references stands in the answer, else 0.

    Both in lower case, stripped, line breaks as spaces. Formulas keep their case, and lose their
    spaces and line breaks instead. An empty reference stands in everything.

    Example: ``ocrbench_hit("It says OK.", ["ok"], "Digit String Recognition")`` is 1.
    """
    plain = _plain_formula if category == FORMULAS else _plain_text
    text = plain(answer)
    return float(any(plain(reference) in text for reference in references))


def _plain_text(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _plain_formula(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def ocrbench_totals(hits: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Right answers by group, and of all.

    Args:
        hits: (category, 0 or 1) of every item.

    Returns:
        Group -> number of right answers, "Final Score" last; "Final Score Norm" is a tenth of it,
        the percentage when all 1000 questions were answered.
    """
    totals = {
        group: sum(hit for category, hit in hits if category in categories)
        for group, categories in GROUPS.items()
    }
    total = sum(totals.values())
    return {**totals, "Final Score": total, "Final Score Norm": total / 10}
