"""Q-Bench (LLVisionQA) in English and Chinese: what a picture's quality is like."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.data.files import BOM
from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import percent_of_each
from llava_uhd.eval.published import add_answer, json_lines, read_rows
from llava_uhd.eval.task import Answers, Item, Scored, Task
from llava_uhd.eval.tasks.question_file import image_path, numbered

_LETTERS = string.ascii_uppercase
_BLANKS = re.compile(r"\s*")


class QBench(Task):
    """The development split; ids are names of images.

    Attributes:
        questions: the file, below the task's folder.
        asks: what stands between question and options.
        answers_name: of the published file of answers.
    """

    name = "qbench"
    title = "Q-Bench dev"
    folder = "qbench"
    source = "get the LLVisionQA questions and images from the Q-Bench repository"
    questions = "llvisionqa_dev.json"
    images = "images_llvisionqa"
    asks = "\nChoose between one of the options as follows:\n"
    answers_name = "llvisionqa_dev_answers.jsonl"
    main_metric = "accuracy"
    max_new_tokens = 1024

    def files(self, root: Path) -> list[Path]:
        """Questions and images."""
        return [root / self.questions, root / self.images]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per entry."""
        file, seen = root / self.questions, Counter[str]()
        for index, row in enumerate(read_rows(file, "img_path", "question", "candidates")):
            if self.local and "correct_ans" not in row:
                raise UserError(f"{file}, record {index}: has no field 'correct_ans'")
            names = [name for name in ("type", "concern") if name in row]
            options = "".join(
                f"{letter}. {text}\n" for letter, text in zip(_LETTERS, row["candidates"])
            )
            yield Item(
                numbered(row["img_path"], seen),
                f"{row['question']}{self.asks}{options}",
                (image_path(root / self.images, row["img_path"], file),),
                row.get("correct_ans"),
                groups={name: str(row[name]) for name in names},
                published_id=row["img_path"],
                extra=row,
            )

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """Objects with ``img_path`` and ``response``, with or without line breaks between them."""
        answers: dict[str | int, str] = {}
        seen = Counter[str]()
        for row in _objects(file):
            if not isinstance(row, dict) or not {"img_path", "response"} <= set(row):
                raise UserError(f"{file}: every object needs img_path and response")
            add_answer(answers, numbered(row["img_path"], seen), row["response"], file)
        return answers

    def published_row(self, item: Item, answer: str, model: str) -> dict[str, Any]:
        """The question's entry and ``response``."""
        return {**item.extra, "response": answer}

    def parse(self, item: Item, answer: str) -> str:
        """The text as it is."""
        return answer

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Whether the first letter, the first word or the whole answer is the right option."""
        if not self.local:
            return {}
        return {"accuracy": float(is_right(parsed, item.extra["candidates"], item.reference))}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Accuracy in percent."""
        return percent_of_each([each.metrics for each in scored])

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """The published file of answers, one object a line; only the test split is uploaded."""
        if self.local:
            return []
        rows = [
            self.published_row(item, answers[item.id], "") for item in items if item.id in answers
        ]
        return [(self.answers_name, json_lines(rows))]

    def check_submission(self, root: Path, file: Path) -> None:
        """Every question in its order, with a response."""
        wanted = [item.id for item in self.items(root)]
        if list(self.read_published(root, file)) != wanted:
            raise UserError(f"{file}: its images are not those of {self.questions} in their order")


class QBenchTest(QBench):
    """The test split, whose answers are sent in."""

    name = "qbench_test"
    title = "Q-Bench test"
    questions = "llvisionqa_test.json"
    answers_name = "llvisionqa_test_answers.jsonl"
    local = False


class QBenchChinese(QBench):
    """The development split in Chinese."""

    name = "qbench_zh"
    title = "Q-Bench-zh dev"
    questions = "质衡-问答-验证集.json"
    # As published: a backslash stands where a line break was meant.
    asks = "\\在下列选项中选择一个:\n"
    answers_name = "llvisionqa_zh_dev_answers.jsonl"


class QBenchChineseTest(QBenchChinese):
    """The test split in Chinese."""

    name = "qbench_zh_test"
    title = "Q-Bench-zh test"
    questions = "质衡-问答-测试集.json"
    answers_name = "llvisionqa_zh_test_answers.jsonl"
    local = False


def is_right(response: str, candidates: Sequence[str], right: str) -> bool:
    """The common reading of an answer; an empty one is wrong.

    Example: for candidates bad, good and the right one good, "B", "B. good", "good" and "good one"
    are right, "It is good" is wrong.
    """
    if not response:
        return False
    place = _LETTERS.find(response[0])
    by_letter = 0 <= place < len(candidates) and candidates[place] == right
    return by_letter or right in (response, response.split(" ")[0])


def _objects(file: Path) -> Iterator[Any]:
    """JSON objects one behind the other, in a list or in lines."""
    try:
        text = file.read_bytes().removeprefix(BOM).decode("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error})") from error
    if text.lstrip().startswith("["):
        yield from read_rows(file)
        return
    decoder, place = json.JSONDecoder(), 0
    while True:
        place = _BLANKS.match(text, place).end()  # type: ignore[union-attr]
        if place == len(text):
            return
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError as error:
            raise UserError(f"{file} is no JSON at character {place} ({error})") from error
        yield value
