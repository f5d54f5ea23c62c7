"""MME: two yes/no questions an image, fourteen categories, two sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
CATEGORIES = (*PERCEPTION, *COGNITION)
_LOOKED_AT = 4  # characters in front of an answer


def read_answer(text: str) -> str:
    """The official reading: "yes", "no" or "other".

    Either the whole answer in lower case, or what its first four characters contain, "yes" first.

    Example: "Yes, it is" is yes; "I do not know" is "other", "none" and "know" are "no".
    """
    lower = text.lower()
    if lower in ("yes", "no"):
        return lower
    head = lower[:_LOOKED_AT]
    return next((word for word in ("yes", "no") if word in head), "other")


def category_scores(right: Sequence[bool], images: Sequence[object]) -> dict[str, float]:
    """Scores of a category.

    Args:
        right: of each question.
        images: the image that each question belongs to.

    Returns:
        ``acc``: right questions in percent; ``acc_plus``: images whose questions are all right, in
        percent; ``score``: their sum, 200 at most.

    Example: two images, one with both and one with one right question: 75 + 50 = 125.
    """
    whole: dict[object, bool] = {}
    for correct, image in zip(right, images, strict=True):
        whole[image] = whole.get(image, True) and correct
    acc = 100 * sum(right) / len(right)
    acc_plus = 100 * sum(whole.values()) / len(whole)
    return {"acc": acc, "acc_plus": acc_plus, "score": acc + acc_plus}


def totals(scores: Mapping[str, float]) -> dict[str, float]:
    """``perception`` (2000 at most) and ``cognition`` (800): sums over the categories there are."""
    sums = {"perception": PERCEPTION, "cognition": COGNITION}
    return {
        name: sum(scores[each] for each in categories if each in scores)
        for name, categories in sums.items()
        if any(each in scores for each in categories)
    }
