"""SEED-Bench: images, and videos by their middle frame."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import grouped, mean
from llava_uhd.eval.published import add_answer, iterate_rows, json_lines, read_object
from llava_uhd.eval.task import Answers, Item, Scored
from llava_uhd.eval.tasks.question_file import QuestionFileTask, first_of, image_path

logger = logging.getLogger(__name__)

_FRAMES = "SEED-Bench-video-image"
_PICTURES = "SEED-Bench-image"


class SeedBench(QuestionFileTask):
    """Letters, which must be the whole answer. ``image_accuracy`` is what papers call SEED-I.

    Attributes:
        kinds: of data that are asked about.
    """

    name = "seed_bench"
    title = "SEED-Bench"
    folder = "seed_bench"
    source = (
        "get SEED-Bench.json, SEED-Bench-image and the videos from SEED-Bench's DATASET.md, the "
        "middle frames with LLaVA's extract_video_frames.py, and the question file from eval.zip "
        "of the LLaVA-1.5 evaluation guide"
    )
    questions = "llava-seed-bench.jsonl"
    published_size = 19_242
    image_questions = "llava-seed-bench-img.jsonl"
    annotations = "SEED-Bench.json"
    main_metric = "total_accuracy"
    kinds: tuple[str, ...] = ("image", "video")
    unanswered = "wrong"

    def files(self, root: Path) -> list[Path]:
        """Questions, annotations, pictures, frames; none where only pictures are asked about."""
        file, folders = self._question_file(root), {"image": _PICTURES, "video": _FRAMES}
        kinds = self.kinds if file.name == self.questions else ("image",)
        return [file, root / self.annotations, *(root / folders[kind] for kind in kinds)]

    def gold_files(self, root: Path) -> list[Path]:
        """Annotations."""
        return [root / self.annotations]

    def _question_file(self, root: Path) -> Path:
        # The second is that of LLaVolta, without videos.
        return first_of(root / self.questions, root / self.image_questions)

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line of the question file."""
        gold, file = self._gold(root), self._question_file(root)
        for row in iterate_rows(file, "question_id", "image", "text"):
            key = plain_id(row["question_id"])
            if key not in gold:
                raise UserError(f"{file}: question {key!r} is not in {self.annotations}")
            item = gold[key]
            if item.extra["kind"] in self.kinds:
                image = image_path(root, row["image"], file)
                yield Item(
                    key,
                    row["text"],
                    (image,),
                    item.reference,
                    groups=item.groups,
                    published_id=row["question_id"],
                    extra=item.extra,
                )

    def gold_items(self, root: Path) -> Iterator[Item]:
        """One item per question of the annotations."""
        for item in self._gold(root).values():
            if item.extra["kind"] in self.kinds:
                yield item

    def _gold(self, root: Path) -> dict[str | int, Item]:
        file = root / self.annotations
        content = read_object(file)
        types = {number: name for name, number in content.get("question_type", {}).items()}
        items: dict[str | int, Item] = {}
        for index, row in enumerate(content.get("questions", ())):
            try:
                kind = row["data_type"]
                groups = {"type": types[row["question_type_id"]], "data": kind}
                key = plain_id(row["question_id"])
                extra = {"kind": kind, "official_id": row["question_id"]}
                if key in items:
                    raise UserError(f"{file}: question {key!r} stands there twice")
                items[key] = Item(
                    key,
                    row["question"],
                    reference=row["answer"],
                    groups=groups,
                    published_id=row["question_id"],
                    extra=extra,
                )
            except (KeyError, TypeError) as error:
                raise UserError(f"{file}: questions[{index}] lacks {error}") from None
        return items

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """An answers file; of several answers to a question the last one holds."""
        answers: dict[str | int, str] = {}
        again = 0
        left_out = {
            key for key, item in self._gold(root).items() if item.extra["kind"] not in self.kinds
        }
        for row in iterate_rows(file, "question_id", "text"):
            key = plain_id(row["question_id"])
            again += answers.pop(key, None) is not None
            if key not in left_out:
                add_answer(answers, key, row["text"], file)
        if again:
            logger.warning("%s: %d questions are answered again: the last holds", file, again)
        return answers

    def parse(self, item: Item, answer: str) -> str:
        """The text as it is."""
        return answer

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Whether the text is the right letter and nothing else."""
        return {"accuracy": float(parsed == item.reference)}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Accuracy in percent, of images, of videos and, where there are both, of all."""
        asked = {each.item.extra["kind"] for each in scored}
        scores = {"total_accuracy": _percent(scored)} if len(asked) > 1 else {}
        for kind in self.kinds:
            rows = [each for each in scored if each.item.extra["kind"] == kind]
            if rows:
                scores[f"{kind}_accuracy"] = _percent(rows)
        return scores

    def breakdown(self, scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
        """Accuracy by type of question."""
        parts = grouped(scored, lambda each: each.item.groups["type"])
        return {
            "type": {
                name: {"accuracy": _percent(rows), "items": len(rows)}
                for name, rows in parts.items()
            }
        }

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """Lines with the official ids, in the order of the annotations, of what is answered."""
        rows = [
            {"question_id": item.extra["official_id"], "prediction": answers[key]}
            for key, item in self._gold(root).items()
            if key in answers
        ]
        return [(f"{self.name}.jsonl", json_lines(rows))]

    def check_submission(self, root: Path, file: Path) -> None:
        """Every question of this task once, with a text."""
        found: dict[str | int, str] = {}
        for row in iterate_rows(file, "question_id", "prediction"):
            add_answer(found, row["question_id"], row["prediction"], file)
        wanted = {item.extra["official_id"] for item in self.gold_items(root)}
        absent, foreign = wanted - set(found), set(found) - wanted
        if absent or foreign:
            raise UserError(
                f"{file}: {len(absent)} questions are missing and {len(foreign)} are foreign or "
                "have an id of another type than in SEED-Bench.json"
            )


class SeedBenchImages(SeedBench):
    """The questions about images only."""

    name = "seed_bench_img"
    title = "SEED-Bench (images)"
    main_metric = "image_accuracy"
    kinds = ("image",)
    published_size = 14_233
    part_of = "seed_bench"


def plain_id(question_id: Any) -> str | int:
    """An id as the published scorer compares it: a number where it can be one.

    Example: "7013" and 7013 are the same, "v0" stays.
    """
    try:
        return int(question_id)
    except (TypeError, ValueError):
        return str(question_id)


def _percent(scored: Sequence[Scored]) -> float:
    return 100 * mean(each.metrics["accuracy"] for each in scored)
