"""TextVQA val, with the OCR tokens of the published question file and without them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.published import add_answer, iterate_rows, read_object
from llava_uhd.eval.task import Item
from llava_uhd.eval.tasks.question_file import SHORT, QuestionFileTask, image_path, numbered
from llava_uhd.eval.tasks.soft_accuracy import SoftAccuracyTask

logger = logging.getLogger(__name__)

_TOKENS = "Reference OCR token: "
_OLD_TOKENS = "OCR tokens: "
_OLD_QUESTION = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_HUMAN_ANSWERS = 10


def question_of(prompt: str) -> str:
    """The question in a published prompt, as written there.

    Example: of the three lines "Who?", "Reference OCR token: a" and "Answer ..." it is "Who?".

    Raises:
        UserError: none of the published forms.
    """
    lines = prompt.split("\n")
    if prompt.startswith(_OLD_TOKENS):
        found = _OLD_QUESTION.search(prompt)
        if found:
            return found[1]
    elif _TOKENS in prompt and len(lines) == 3:
        return lines[1] if prompt.startswith(_TOKENS) else lines[0]
    elif len(lines) == 2:
        return lines[0]
    raise UserError(f"{prompt!r} is no prompt of TextVQA: a question in one line is looked for")


class TextVQA(SoftAccuracyTask, QuestionFileTask):
    """Several questions share a picture: ids are image id and question in lower case."""

    name = "textvqa"
    title = "TextVQA val (OCR tokens in the prompt)"
    folder = "textvqa"
    source = (
        "get TextVQA_0.5.1_val.json and train_val_images.zip (its folder train_images) from "
        "textvqa.org/dataset and the question file from eval.zip of the LLaVA-1.5 evaluation guide"
    )
    questions = "llava_textvqa_val_v051_ocr.jsonl"
    published_size = 5_000
    annotations = "TextVQA_0.5.1_val.json"
    images = "train_images"
    main_metric = "accuracy"
    # The published score is a mean over the file of answers.
    unanswered = "skip"

    def files(self, root: Path) -> list[Path]:
        """Also the annotations."""
        return [*super().files(root), root / self.annotations]

    def gold_files(self, root: Path) -> list[Path]:
        """Annotations only."""
        return [root / self.annotations]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line of the question file, joined with its annotation."""
        file, seen = root / self.questions, Counter[str]()
        gold = self._gold(root)
        for index, row in enumerate(iterate_rows(file, "question_id", "image", "text")):
            try:
                question = question_of(row["text"])
            except UserError as error:
                raise UserError(f"{file}, record {index}: {error}") from None
            key = _key(row["question_id"], question)
            if key not in gold:
                raise UserError(f"{file}, record {index}: {key!r} is not in {self.annotations}")
            yield Item(
                numbered(key, seen),
                self.prompt(row["text"], question),
                (image_path(root / self.images, row["image"], file),),
                reference=gold[key],
                published_id=row["question_id"],
            )

    def prompt(self, text: str, question: str) -> str:
        """What is asked: the line of the question file."""
        return text

    def gold_items(self, root: Path) -> Iterator[Item]:
        """One item per annotation; of questions that occur twice the last annotation holds."""
        seen, gold = Counter[str](), self._gold(root)
        for row in self._annotations(root):
            key = _key(row["image_id"], row["question"])
            references = gold[key]
            yield Item(
                numbered(key, seen), row["question"], (), references, published_id=row["image_id"]
            )

    def _annotations(self, root: Path) -> list[dict[str, Any]]:
        file = root / self.annotations
        rows = read_object(file).get("data")
        if not isinstance(rows, list):
            raise UserError(f"{file} has no list 'data'")
        for index, row in enumerate(rows):
            missing = {"image_id", "question", "answers"} - set(row)
            if missing:
                raise UserError(f"{file}: data[{index}] has no field '{min(missing)}'")
            if len(row["answers"]) != _HUMAN_ANSWERS:
                raise UserError(
                    f"{file}: data[{index}] has {len(row['answers'])} answers instead of "
                    f"{_HUMAN_ANSWERS}: take the validation split"
                )
        return rows

    def _gold(self, root: Path) -> dict[str, list[str]]:
        rows = self._annotations(root)
        return {_key(row["image_id"], row["question"]): row["answers"] for row in rows}

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """Answers, joined by image id and the question in the prompt."""
        answers: dict[str | int, str] = {}
        seen, tokens = Counter[str](), 0
        for index, row in enumerate(iterate_rows(file, "question_id", "prompt", "text")):
            try:
                key = _key(row["question_id"], question_of(row["prompt"]))
            except UserError as error:
                raise UserError(f"{file}, record {index}: {error}") from None
            add_answer(answers, numbered(key, seen), row["text"], file)
            tokens += _TOKENS in row["prompt"] or _OLD_TOKENS in row["prompt"]
        logger.warning("%s: %d of %d prompts hold OCR tokens", file, tokens, len(answers))
        return answers


class TextVQAWithoutOCR(TextVQA):
    """The same questions without the line of OCR tokens: scores are lower by 3 to 13 points."""

    name = "textvqa_no_ocr"
    title = "TextVQA val (no OCR tokens)"
    part_of = "textvqa"

    def prompt(self, text: str, question: str) -> str:
        """The question and the usual request."""
        return f"{question}{SHORT}"


def _key(image_id: Any, question: str) -> str:
    return f"{image_id} {question.lower()}"
