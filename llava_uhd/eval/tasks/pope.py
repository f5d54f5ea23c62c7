"""POPE: is an object there, asked about adversarial, popular and random objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import grouped, mean
from llava_uhd.eval.published import iterate_rows, read_answers
from llava_uhd.eval.scoring import pope
from llava_uhd.eval.task import Item, Scored
from llava_uhd.eval.tasks.question_file import QuestionFileTask, image_path

CATEGORIES = ("adversarial", "popular", "random")


class POPE(QuestionFileTask):
    """Labels have other ids than questions: they belong together by their place in a category."""

    name = "pope"
    title = "POPE"
    folder = "pope"
    source = (
        "get the folder coco from the POPE repository's output folder, COCO val2014 images (as "
        "val2014) and llava_pope_test.jsonl from eval.zip of the LLaVA-1.5 evaluation guide"
    )
    questions = "llava_pope_test.jsonl"
    published_size = 8_910
    images = "val2014"
    main_metric = "f1"

    def files(self, root: Path) -> list[Path]:
        """Also the three files of labels."""
        return [*super().files(root), *(self._labels_file(root, each) for each in CATEGORIES)]

    def _labels_file(self, root: Path, category: str) -> Path:
        return root / "coco" / f"coco_pope_{category}.json"

    def items(self, root: Path) -> Iterator[Item]:
        """One item per line of the question file, with the label of the same place."""
        file = root / self.questions
        rows = list(iterate_rows(file, "question_id", "image", "text", "category"))
        labels = {}
        for category in dict.fromkeys(row["category"] for row in rows):
            if category not in CATEGORIES:
                raise UserError(f"{file}: category {category!r} must be one of {CATEGORIES}")
            labels[category] = self._labels(root, category)
            asked = sum(row["category"] == category for row in rows)
            if asked != len(labels[category]):
                raise UserError(
                    f"{file} asks {asked} {category} questions, "
                    f"{self._labels_file(root, category)} has {len(labels[category])} labels: "
                    "take both from the same release"
                )
        places = {category: iter(found) for category, found in labels.items()}
        for row in rows:
            label, category = next(places[row["category"]]), row["category"]
            image = image_path(root / self.images, row["image"], file)
            groups = {"category": category}
            yield Item(row["question_id"], row["text"], (image,), label, groups=groups)

    def _labels(self, root: Path, category: str) -> list[str]:
        file = self._labels_file(root, category)
        labels = [row["label"] for row in iterate_rows(file, "label")]
        if not set(labels) <= {"yes", "no"}:
            raise UserError(f"{file}: every label must be 'yes' or 'no'")
        return labels

    def read_published(self, root: Path, file: Path) -> dict[str | int, str]:
        """An answers file; in published mode its order decides which label an answer meets."""
        answers = read_answers(file)
        if self.mode == "default":
            return answers
        category = {
            row["question_id"]: row["category"]
            for row in iterate_rows(root / self.questions, "question_id", "category")
        }
        moved: dict[str | int, str] = {}
        for name in CATEGORIES:
            asked = [key for key in category if category[key] == name]
            given = [text for key, text in answers.items() if category.get(key) == name]
            moved |= dict(zip(asked, given))
        return moved

    def parse(self, item: Item, answer: str) -> str:
        """Either "yes" or "no"."""
        return pope.read_answer(answer)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Right or wrong."""
        return {"accuracy": float(parsed == item.reference)}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """``f1``: mean F1 of the categories, in percent; the rest as the published program has it.

        ``average_f1`` is the same mean as a share.
        """
        tables = {
            name: _measures(rows)
            for name, rows in grouped(scored, lambda each: each.item.groups["category"]).items()
        }
        average = mean(table["f1"] for table in tables.values())
        return {
            "f1": 100 * average,
            "average_f1": average,
            **{
                f"{category} {name}": value
                for category, table in tables.items()
                for name, value in table.items()
            },
        }

    def breakdown(self, scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
        """Measures and counts by category."""
        parts = grouped(scored, lambda each: each.item.groups["category"])
        return {
            "category": {
                name: {
                    **_measures(rows),
                    **pope.counts(_parsed(rows), _labels(rows)),
                    "items": len(rows),
                }
                for name, rows in parts.items()
            }
        }


def _parsed(scored: Sequence[Scored]) -> list[str]:
    return [each.parsed for each in scored]


def _labels(scored: Sequence[Scored]) -> list[str]:
    return [each.item.reference for each in scored]


def _measures(scored: Sequence[Scored]) -> dict[str, float]:
    return pope.measures(_parsed(scored), _labels(scored))
