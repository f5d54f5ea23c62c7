"""MMMU validation: college exams with options and open questions, several images an item."""

from __future__ import annotations

import ast
import re

from llava_uhd.errors import UserError
from llava_uhd.eval.scoring.choice import choose, mmmu_letter, mmmu_open_match, read_options
from llava_uhd.eval.tables import Row
from llava_uhd.eval.task import Item
from llava_uhd.eval.tasks.kit import KitTask, choice_prompt
from llava_uhd.eval.tasks.question_file import SHORT
from llava_uhd.images.pixels import ImageSource
from llava_uhd.text.templates import IMAGE_MARKER

_PLACE = re.compile(r"<image (\d+)>")
_OTHER = "Other Answers"


class MMMU(KitTask):
    """``accuracy`` is VLMEvalKit's exact matching, ``accuracy_official`` the parser of the authors.

    Neither guesses: what cannot be read is wrong. An open question is, for the first of them, a
    choice between the right answer and "Other Answers".

    Images stand where the question names them. In the style "kit" only the first image of an item
    is shown, in front, and the places are left out of the text: LLaVA-UHD v2 was measured so.
    """

    name = "mmmu"
    title = "MMMU val"
    folder = "mmmu"
    source = (
        "get MMMU_DEV_VAL.tsv of VLMEvalKit (opencompass.openxlab.space/utils/VLMEval/"
        "MMMU_DEV_VAL.tsv)"
    )
    table = "MMMU_DEV_VAL"
    grouped_by = ("split", "l2-category", "category")
    main_metric = "accuracy"
    published_size = 900

    def belongs(self, row: Row) -> bool:
        """Only the validation split, where the table has several."""
        return row.get("split") in (None, "validation", "val")

    def question(self, row: Row) -> str:
        """Question and options; an open question asks for a word or phrase."""
        options = read_options(row)
        if options or self.style == "kit":
            return choice_prompt(row, options, self.style)
        return f"{row['question']}{SHORT}"

    def item(self, row: Row, images: tuple[ImageSource, ...]) -> Item:
        """The item of a row, with its images in the text."""
        item = super().item(row, images)
        if self.style == "kit":
            text, shown = _PLACE.sub("", item.question), images[:1]
        elif not images:  # only its score is asked for
            text, shown = item.question, ()
        else:
            text, shown = _place(item.question, images)
        return Item(item.id, text, shown, item.reference, groups=item.groups, extra=item.extra)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Both readings of the answer."""
        options, gold = item.extra["options"], item.reference
        if options:
            read = choose(parsed, options) == gold, mmmu_letter(parsed, options) == gold
            return {"accuracy": float(read[0]), "accuracy_official": float(read[1])}
        right = choose(parsed, {"A": gold, "B": _OTHER}) == "A"
        return {
            "accuracy": float(right),
            "accuracy_official": mmmu_open_match(parsed, _accepted(gold)),
        }


def _accepted(answer: str) -> list[str]:
    """Accepted answers of an open question: one text, or a list in the notation of Python."""
    if answer.startswith("["):
        try:
            return [str(each) for each in ast.literal_eval(answer)]
        except (ValueError, SyntaxError):
            pass
    return [answer]


def _place(text: str, images: tuple[ImageSource, ...]) -> tuple[str, tuple[ImageSource, ...]]:
    """Images where ``<image k>`` names them; all of them in front if none is named."""
    numbers = [int(found[1]) for found in _PLACE.finditer(text)]
    if not numbers:
        return text, images
    if not all(1 <= number <= len(images) for number in numbers):
        raise UserError(f"names <image {max(numbers)}> but has {len(images)} images")
    return _PLACE.sub(IMAGE_MARKER, text), tuple(images[number - 1] for number in numbers)
