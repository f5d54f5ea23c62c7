"""What the document tasks of LLaVA-UHD v2 share: answers joined by id and question, one scorer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import percent_of_each
from llava_uhd.eval.published import add_answer, iterate_rows
from llava_uhd.eval.scoring.anls import anls, anls_uhd_v2
from llava_uhd.eval.task import Item, Mode, Scored, Task
from llava_uhd.eval.tasks.question_file import QuestionFileTask, first_of, image_path, numbered

UREADER = "../../ureader"
"""Folder of UReader's data beside that of the evaluation, seen from a task's folder."""


def join_key(question_id: Any, question: str) -> str:
    """What the published scorers join by: id and the whole prompt in lower case."""
    return f"{question_id} {question.lower()}"


def accepted(row: dict[str, Any]) -> list[str]:
    """Accepted answers of an annotation: one text, or a list of them."""
    answer = row["answer"]
    return [str(each) for each in answer] if isinstance(answer, list) else [str(answer)]


class JoinedTask(QuestionFileTask):
    """Questions in one file, answers in another with the same id and the whole prompt.

    Attributes:
        annotations: lines ``{"question_id", "question", "answer"}``, below the task's folder; of
            lines with the same id and question the last one holds.
        image_places: further places of the images, tried before `images`.
        published_metric: the metric that the published scorer reports.
    """

    annotations: str
    image_places: tuple[str, ...] = ()
    published_metric: str
    # The published score is a mean over the file of answers.
    unanswered = "skip"

    def in_mode(self, mode: Mode) -> Task:
        """In the mode "published" the main metric is the published one."""
        other = super().in_mode(mode)
        if mode == "published":
            other.main_metric = self.published_metric
        return other

    def image_folder(self, root: Path) -> Path:
        """Where the images are."""
        return first_of(*(root / place for place in (*self.image_places, self.images)))

    def files(self, root: Path) -> list[Path]:
        """Questions, annotations, images."""
        return [root / self.questions, root / self.annotations, self.image_folder(root)]

    def gold_files(self, root: Path) -> list[Path]:
        """Annotations only."""
        return [root / self.annotations]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line of the question file, joined with its annotation."""
        file, gold, seen = root / self.questions, self._gold(root), Counter[str]()
        folder = self.image_folder(root)
        for index, row in enumerate(iterate_rows(file, "question_id", "image", "text")):
            key = join_key(row["question_id"], row["text"])
            if key not in gold:
                raise UserError(
                    f"{file}, record {index}: no line of {self.annotations} has the id "
                    f"{row['question_id']!r} and this question"
                )
            image = image_path(folder, row["image"], file)
            yield self.joined(numbered(key, seen), row["text"], (image,), row, gold[key])

    def gold_items(self, root: Path) -> Iterator[Item]:
        """One item per annotation, or as many as the question file, if it is there, has of it."""
        asked: dict[str, list[dict[str, Any]]] = {}
        file, seen = root / self.questions, Counter[str]()
        for row in iterate_rows(file, "question_id", "text") if file.is_file() else ():
            asked.setdefault(join_key(row["question_id"], row["text"]), []).append(row)
        for key, note in self._gold(root).items():
            for row in asked.get(key, [note]):
                yield self.joined(numbered(key, seen), note["question"], (), row, note)

    def joined(
        self,
        key: str,
        question: str,
        images: tuple[Path, ...],
        row: dict[str, Any],
        gold: dict[str, Any],
    ) -> Item:
        """An item from its row of questions (or again its annotation) and its annotation."""
        return Item(key, question, images, accepted(gold), published_id=row["question_id"])

    def _gold(self, root: Path) -> dict[str, dict[str, Any]]:
        rows = iterate_rows(root / self.annotations, "question_id", "question", "answer")
        return {join_key(row["question_id"], row["question"]): row for row in rows}

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """Answers, joined by id and prompt."""
        answers: dict[str | int, str] = {}
        seen = Counter[str]()
        for row in iterate_rows(file, "question_id", "prompt", "text"):
            key = numbered(join_key(row["question_id"], row["prompt"]), seen)
            add_answer(answers, key, row["text"], file)
        return answers

    def parse(self, item: Item, answer: str) -> str:
        """The text as it is: the scorers strip it in their own ways."""
        return answer

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Means in percent."""
        return percent_of_each([each.metrics for each in scored])


class DocumentTask(JoinedTask):
    """Scored by ANLS: the standard one over all accepted answers, and as LLaVA-UHD v2 did."""

    main_metric = "anls"
    published_metric = "anls_uhd_v2"

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Both similarities; the published scorer knows one accepted answer, the first here."""
        return {
            "anls": anls(parsed, item.reference),
            "anls_uhd_v2": anls_uhd_v2(parsed, item.reference[0]),
        }
