"""GQA testdev balanced."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.published import add_answer, iterate_rows, read_answers, read_object, read_rows
from llava_uhd.eval.scoring import gqa
from llava_uhd.eval.task import Answers, Item, Parsed, Scored
from llava_uhd.eval.tasks.question_file import QuestionFileTask, image_path

_FIELDS = ("answer", "isBalanced", "types", "groups", "semantic", "question")


class GQA(QuestionFileTask):
    """Exact answers, over the balanced questions."""

    name = "gqa"
    title = "GQA testdev balanced"
    folder = "gqa"
    source = (
        "get questions and images from cs.stanford.edu/people/dorarad/gqa (into gqa/data) and the "
        "question file from eval.zip of the LLaVA-1.5 evaluation guide"
    )
    questions = "llava_gqa_testdev_balanced.jsonl"
    published_size = 12_578
    annotations = "data/testdev_balanced_questions.json"
    images = "data/images"
    main_metric = "accuracy"

    def files(self, root: Path) -> list[Path]:
        """Also the official questions."""
        return [*super().files(root), root / self.annotations]

    def gold_files(self, root: Path) -> list[Path]:
        """The official questions."""
        return [root / self.annotations]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line of the question file."""
        gold, file = self._gold(root), root / self.questions
        for row in iterate_rows(file, "question_id", "image", "text"):
            key = row["question_id"]
            if key not in gold:
                raise UserError(f"{file}: question {key!r} is not in {self.annotations}")
            image = image_path(root / self.images, row["image"], file)
            yield _item(key, row["text"], gold[key], image)

    def gold_items(self, root: Path) -> Iterator[Item]:
        """One item per official question."""
        for key, question in self._gold(root).items():
            yield _item(key, question["question"], question)

    def _gold(self, root: Path) -> dict[str, Any]:
        file = root / self.annotations
        questions = read_object(file)
        for key, question in questions.items():
            missing = [field for field in _FIELDS if field not in question]
            if missing:
                raise UserError(f"{file}: question {key!r} has no field '{missing[0]}'")
        return questions

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """The converted predictions (questionId, prediction), or an answers file."""
        if "questionId" not in next(iterate_rows(file), {}):
            answers = read_answers(file)
        else:
            answers = {}
            for row in read_rows(file, "questionId", "prediction"):
                add_answer(answers, row["questionId"], row["prediction"], file)
            answers = {key: Parsed(text) for key, text in answers.items()}
        # Only balanced questions have to be answered, as in the official scorer.
        gold = self._gold(root)
        missing = [key for key in gold if gold[key]["isBalanced"] and key not in answers]
        if missing:
            raise UserError(
                f"{file}: {len(missing)} balanced questions of gqa have no answer, first "
                f"{missing[0]!r}: finish the answers first"
            )
        return answers

    # What is missing then is not balanced, and does not count.
    unanswered = "skip"

    def parse(self, item: Item, answer: str) -> str:
        """The published conversion."""
        return gqa.convert(answer)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Exact equality; questions that are not balanced do not count."""
        name = "accuracy" if item.extra["isBalanced"] else "not balanced"
        return {name: float(parsed == item.reference)}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Accuracy in percent, of all, binary and open questions, and the official distance."""
        return gqa.scores(_outcomes(scored))

    def breakdown(self, scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
        """The tables of the official report."""
        return gqa.tables(_outcomes(scored))

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """Predictions as the official scorer reads them."""
        rows = [
            {"questionId": item.id, "prediction": gqa.convert(answers[item.id])}
            for item in items
            if item.id in answers
        ]
        return [("testdev_balanced_predictions.json", json.dumps(rows).encode())]

    def check_submission(self, root: Path, file: Path) -> None:
        """Known questions, once each, and every balanced one."""
        gold, found = self._gold(root), self.read_published(root, file)
        foreign = [key for key in found if key not in gold]
        if foreign or not all(isinstance(text, Parsed) for text in found.values()):
            raise UserError(
                f"{file} must be a list of questionId and prediction of known questions"
            )


def _item(key: str, text: str, question: Mapping[str, Any], *images: Path) -> Item:
    return Item(key, text, images, question["answer"], extra=question)


def _outcomes(scored: Sequence[Scored]) -> list[gqa.Outcome]:
    return [
        gqa.Outcome(each.parsed, each.item.extra)
        for each in scored
        if each.item.extra["isBalanced"]
    ]
