"""VQAv2: test-dev and test for the server, val2014 scored here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_uhd.errors import UserError
from llava_uhd.eval.published import add_answer, iterate_rows, read_answers, read_object, read_value
from llava_uhd.eval.scoring.vqa import normalise, normalise_vqav2
from llava_uhd.eval.task import Answers, Item
from llava_uhd.eval.tasks.question_file import SHORT, QuestionFileTask, first_of, image_path
from llava_uhd.eval.tasks.soft_accuracy import SoftAccuracyTask

_SOURCE = (
    "get the images from visualqa.org/download.html (COCO test2015) and the question files from "
    "eval.zip of the LLaVA-1.5 evaluation guide"
)


class VQAv2(QuestionFileTask):
    """test-dev2015: answers are uploaded for all of test2015, empty where they were not asked."""

    name = "vqav2"
    title = "VQAv2 test-dev"
    folder = "vqav2"
    source = _SOURCE
    questions = "llava_vqav2_mscoco_test-dev2015.jsonl"
    published_size = 107_394
    all_questions = "llava_vqav2_mscoco_test2015.jsonl"
    images = "test2015"
    main_metric = "accuracy"
    local = False
    scored_by = "vqav2_val"

    def files(self, root: Path) -> list[Path]:
        """Also the questions that the server expects."""
        return [*super().files(root), root / self.all_questions]

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Nothing: human answers are with the server."""
        return {}

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """Answers; lines that are no JSON are left out and counted, as the converter does."""
        return read_answers(file, skip_broken=True)

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """One JSON list over test2015, normalised."""
        rows = [
            {"question_id": key, "answer": normalise(answers[key]) if key in answers else ""}
            for key in self._expected(root)
        ]
        return [(self.questions.replace(".jsonl", ".json"), json.dumps(rows).encode())]

    def check_submission(self, root: Path, file: Path) -> None:
        """All questions of test2015, once each, with texts, in any order."""
        answers = _read_results(file)
        expected = set(self._expected(root))
        absent, foreign = expected - set(answers), set(answers) - expected
        if absent or foreign:
            raise UserError(
                f"{file}: {len(absent)} questions of {self.all_questions} are missing and "
                f"{len(foreign)} are foreign: the server wants exactly those questions"
            )
        if not any(answers.values()):
            raise UserError(f"{file}: every answer is empty")

    def _expected(self, root: Path) -> list[str | int]:
        file = root / self.all_questions
        return [row["question_id"] for row in iterate_rows(file, "question_id")]


def _read_results(file: Path) -> dict[str | int, str]:
    """The results format: a JSON list of ``{"question_id", "answer"}``."""
    rows = read_value(file)
    if not isinstance(rows, list):
        raise UserError(f"{file} must be a JSON list of question_id and answer")
    answers: dict[str | int, str] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not {"question_id", "answer"} <= set(row):
            raise UserError(f"{file}, record {index}: needs question_id and answer")
        add_answer(answers, row["question_id"], row["answer"], file)
    return answers


class VQAv2Val(SoftAccuracyTask):
    """val2014 with its published questions and annotations."""

    name = "vqav2_val"
    title = "VQAv2 val2014"
    folder = "vqav2"
    source = (
        "get questions, annotations and COCO val2014 images from visualqa.org/download.html and "
        "unpack them there"
    )
    published_size = 214_354
    main_metric = "accuracy"

    def files(self, root: Path) -> list[Path]:
        """Questions, annotations, images."""
        return [
            first_of(
                root / "v2_OpenEnded_mscoco_val2014_questions.json", root / "val_questions.json"
            ),
            first_of(root / "v2_mscoco_val2014_annotations.json", root / "val_annotations.json"),
            root / "val2014",
        ]

    def items(self, root: Path) -> Iterator[Item]:
        """Questions of the questions file, human answers from the annotations."""
        questions, annotations, images = self.files(root)
        notes = {
            row["question_id"]: row
            for row in _rows(annotations, "annotations", "question_id", "answers")
        }
        for row in _rows(questions, "questions", "question_id", "question", "image_id"):
            key = row["question_id"]
            if key not in notes:
                raise UserError(f"{annotations}: question {key!r} of {questions} is not annotated")
            note = notes[key]
            kind = note.get("answer_type")
            yield Item(
                key,
                f"{row['question']}{SHORT}",
                (image_path(images, f"COCO_val2014_{int(row['image_id']):012d}.jpg", questions),),
                reference=[str(each["answer"]) for each in note["answers"]],
                groups={"answer type": str(kind)} if kind else {},
            )

    def normalised(self, text: str) -> str:
        """By the official normalisation of VQAv2, which leaves out one step of the full one."""
        return normalise_vqav2(text)

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """A results file (JSON list of question_id and answer), or an answers file."""
        first = next(iterate_rows(file), {})
        return _read_results(file) if "answer" in first else read_answers(file, skip_broken=True)


def _rows(file: Path, key: str, *fields: str) -> list[dict]:
    rows = read_object(file).get(key)
    if not isinstance(rows, list):
        raise UserError(f"{file} has no list '{key}'")
    for index, row in enumerate(rows):
        missing = set(fields) - set(row if isinstance(row, dict) else ())
        if missing:
            raise UserError(f"{file}: {key}[{index}] has no field '{min(missing)}'")
    return rows
