"""VizWiz: test for the server, val scored here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.published import (
    add_answer,
    check_all_answered,
    iterate_rows,
    read_answers,
    read_rows,
    read_value,
)
from llava_uhd.eval.scoring.vqa import normalise
from llava_uhd.eval.task import Answers, Item
from llava_uhd.eval.tasks.question_file import SHORT, QuestionFileTask, image_path
from llava_uhd.eval.tasks.soft_accuracy import SoftAccuracyTask

SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT


class VizWiz(QuestionFileTask):
    """The test split."""

    name = "vizwiz"
    title = "VizWiz test"
    folder = "vizwiz"
    source = (
        "get test.zip from vizwiz.org and llava_test.jsonl from eval.zip of the LLaVA-1.5 "
        "evaluation guide"
    )
    questions = "llava_test.jsonl"
    published_size = 8_000
    images = "test"
    main_metric = "accuracy"
    local = False
    scored_by = "vizwiz_val"

    def item(self, root: Path, row: dict[str, Any]) -> Item:
        """The item of a line; uploads go by the name of its image."""
        item = super().item(root, row)
        return Item(item.id, item.question, item.images, extra={"image": row["image"]})

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Nothing: human answers are with the server."""
        return {}

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """Answers; lines that are no JSON are left out and counted, as the converter does."""
        return read_answers(file, skip_broken=True)

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """One JSON list of image and normalised answer, in the order of the questions."""
        check_all_answered(self.name, [item.id for item in items], answers)
        rows = [
            {"image": item.extra["image"], "answer": normalise(answers[item.id])} for item in items
        ]
        return [("vizwiz.json", json.dumps(rows).encode())]

    def check_submission(self, root: Path, file: Path) -> None:
        """Every image of the question file, in its order, with a text."""
        found = _read_upload(file)
        names = [row["image"] for row in iterate_rows(root / self.questions, "image")]
        if [image for image, _ in found] != names:
            raise UserError(
                f"{file}: its {len(found)} images are not the {len(names)} of {self.questions} in "
                "the same order"
            )


def _read_upload(file: Path) -> list[tuple[str, str]]:
    rows = read_value(file)
    if not isinstance(rows, list):
        raise UserError(f"{file} must be a JSON list of image and answer")
    for index, row in enumerate(rows):
        texts = [row.get(key) for key in ("image", "answer")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{file}, record {index}: needs the texts image and answer")
    return [(row["image"], row["answer"]) for row in rows]


class VizWizVal(SoftAccuracyTask):
    """The validation split; ids are places in ``val.json``, as in the numbers of its images."""

    name = "vizwiz_val"
    title = "VizWiz val"
    folder = "vizwiz"
    source = "get val.zip and the annotations from vizwiz.org"
    published_size = 4_319
    main_metric = "accuracy"

    def files(self, root: Path) -> list[Path]:
        """Annotations and images."""
        return [root / "val.json", root / "val"]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per annotation."""
        file = root / "val.json"
        for index, row in enumerate(read_rows(file, "image", "question", "answers")):
            groups = {"answer type": str(row["answer_type"])} if row.get("answer_type") else {}
            yield Item(
                index,
                f"{row['question']}{SUFFIX}",
                (image_path(root / "val", row["image"], file),),
                reference=[str(each["answer"]) for each in row["answers"]],
                groups=groups,
            )

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """An answers file, or an upload file, whose images are told by their numbers."""
        if "image" not in next(iterate_rows(file), {}):
            return read_answers(file, skip_broken=True)
        places = {
            _number(row["image"]): index
            for index, row in enumerate(read_rows(root / "val.json", "image"))
        }
        answers: dict[str | int, str] = {}
        for image, text in _read_upload(file):
            add_answer(answers, places.get(_number(image), image), text, file)
        return answers


def _number(image: str) -> str:
    return image.rpartition("_")[2]
