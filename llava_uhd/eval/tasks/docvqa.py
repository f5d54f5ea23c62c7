"""DocVQA: validation scored here, test for the server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.published import check_all_answered, iterate_rows, read_value
from llava_uhd.eval.task import Answers, Item
from llava_uhd.eval.tasks.joined import UREADER, DocumentTask
from llava_uhd.eval.tasks.question_file import SHORT, QuestionFileTask, first_of, image_path

_SOURCE = "get the images of DocVQA from rrc.cvc.uab.es (challenge 17) or "


class DocVQA(DocumentTask):
    """The validation split in the layout of LLaVA-UHD v2."""

    name = "docvqa"
    title = "DocVQA val"
    folder = "docvqa"
    source = (
        f"{_SOURCE}DUE_Benchmark/DocVQA of UReader's data, to playground/data/ureader, and the two "
        "JSONL files of the LLaVA-UHD v2 evaluation"
    )
    questions = "docvqa_questions.jsonl"
    annotations = "docvqa_annotations.jsonl"
    images = "pngs"
    image_places = (f"{UREADER}/DUE_Benchmark/DocVQA/pngs",)


class DocVQATest(QuestionFileTask):
    """The test split: a file to upload, no score.

    A line of ``test.jsonl`` has ``question_id`` and ``image``, and the question as ``text`` (asked
    as it stands) or as ``question`` (the usual request is added).
    """

    name = "docvqa_test"
    title = "DocVQA test"
    folder = "docvqa"
    source = f"{_SOURCE}use its test split: test.jsonl beside the folder test/documents"
    questions = "test.jsonl"
    images = "test/documents"
    main_metric = "anls"
    published_size = 5_188
    local = False

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line."""
        file = root / self.questions
        for index, row in enumerate(iterate_rows(file, "question_id", "image")):
            text = row["text"] if "text" in row else f"{row.get('question', '')}{SHORT}"
            if text == SHORT:
                raise UserError(f"{file}, record {index}: has neither text nor question")
            yield Item(_number(row["question_id"], file), text, (self._image(root, row, file),))

    def _image(self, root: Path, row: dict[str, Any], file: Path) -> Path:
        # Some lists write the path from the folder of the whole project.
        name = str(row["image"]).replace("\\", "/").rpartition("documents/")[2]
        folder = root / self.images
        return first_of(image_path(folder, name, file), image_path(root, row["image"], file))

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Nothing: the answers are with the server."""
        return {}

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """A JSON list of ``questionId`` and ``answer``."""
        check_all_answered(self.name, [item.id for item in items], answers)
        rows = [{"questionId": item.id, "answer": answers[item.id]} for item in items]
        return [("docvqa_test.json", json.dumps(rows).encode())]

    def check_submission(self, root: Path, file: Path) -> None:
        """Every question once, numbers and texts."""
        rows = read_value(file)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{file} must be a JSON list of questionId and answer")
        for index, row in enumerate(rows):
            if type(row.get("questionId")) is not int or not isinstance(row.get("answer"), str):
                raise UserError(
                    f"{file}, record {index}: needs a whole number questionId and a text answer"
                )
        found = [row["questionId"] for row in rows]
        questions = root / self.questions
        rows = list(iterate_rows(questions, "question_id"))
        wanted = [_number(row["question_id"], questions) for row in rows]
        if sorted(found) != sorted(wanted):
            raise UserError(
                f"{file}: its {len(set(found))} questions are not the {len(wanted)} of "
                f"{self.questions}, each once"
            )


def _number(question_id: Any, file: Path) -> int:
    try:
        return int(question_id)
    except (TypeError, ValueError):
        raise UserError(
            f"{file}: question_id {question_id!r} must be a whole number: the server wants it"
        ) from None
