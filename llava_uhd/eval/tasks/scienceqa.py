"""ScienceQA: the test split, and its questions with an image."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import mean
from llava_uhd.eval.published import answer_row, read_object, read_rows
from llava_uhd.eval.scoring import scienceqa
from llava_uhd.eval.task import Answers, Item, Scored, Task
from llava_uhd.eval.tasks.question_file import LETTER, image_path
from llava_uhd.text.templates import IMAGE_MARKER

_QUESTIONS = "llava_test_CQM-A.json"


class ScienceQA(Task):
    """Letters; an answer without one is wrong. ``img_accuracy`` is what papers call SQA-I."""

    name = "scienceqa"
    title = "ScienceQA test"
    folder = "scienceqa"
    source = (
        "get images (as images/test), problems.json and pid_splits.json from the data folder of "
        "the ScienceQA repository and llava_test_CQM-A.json from eval.zip of the LLaVA-1.5 "
        "evaluation guide"
    )
    main_metric = "img_accuracy"
    published_size = 4_241
    max_new_tokens = 1024
    unanswered = "wrong"
    missing_text = scienceqa.FAILED

    def files(self, root: Path) -> list[Path]:
        """Questions, problems, splits, images."""
        return [root / _QUESTIONS, *self.gold_files(root), root / "images/test"]

    def gold_files(self, root: Path) -> list[Path]:
        """Problems and splits."""
        return [root / "problems.json", root / "pid_splits.json"]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per entry of the question file."""
        problems, file = read_object(root / "problems.json"), root / _QUESTIONS
        for row in read_rows(file, "id", "conversations"):
            key = row["id"]
            if key not in problems:
                raise UserError(f"{file}: question {key!r} is not in problems.json")
            images: tuple[Path, ...] = ()
            if "image" in row:
                images = (image_path(root / "images/test", row["image"], file),)
            yield _item(key, _text(row), problems[key], bool(images), images)

    def gold_items(self, root: Path) -> Iterator[Item]:
        """One item per problem of the test split."""
        problems = read_object(root / "problems.json")
        splits = read_object(root / "pid_splits.json")
        asked = {}
        if (root / _QUESTIONS).is_file():
            rows = read_rows(root / _QUESTIONS, "id", "conversations")
            asked = {row["id"]: row for row in rows}
        for key in splits.get("test", ()):
            if key not in problems:
                raise UserError(f"{root / 'problems.json'} has no problem {key!r} of the split")
            problem, row = problems[key], asked.get(key)
            image = problem.get("image") is not None if row is None else "image" in row
            text = problem["question"] if row is None else _text(row)
            yield _item(key, text, problem, image, ())

    def published_row(self, item: Item, answer: str, model: str) -> dict[str, Any]:
        """Prompts with an image begin with its marker."""
        return answer_row(item.question_id, _prompt(item), answer, model)

    def parse(self, item: Item, answer: str) -> str:
        """A letter or "FAILED"."""
        return scienceqa.read_answer(answer)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """1 if the letter is that of the right choice."""
        index = scienceqa.choice_index(parsed, item.extra["choices"])
        return {"accuracy": float(index == item.reference)}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Accuracy in percent: with image, of all, and both by the more forgiving reading.

        Without an answer a question is wrong; in the published program it does not belong to the
        questions with image either.
        """
        seen = [each for each in scored if each.item.extra["image"] and each.answered]
        scores = {}
        for name, rows in (("img_accuracy", seen), ("accuracy", scored)):
            if rows:
                scores[name] = 100 * mean(each.metrics["accuracy"] for each in rows)
        for name, rows in (("img_accuracy", seen), ("accuracy", scored)):
            if rows:
                scores[f"lenient_{name}"] = 100 * mean(map(_lenient, rows))
        return scores

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """The two result files of the published scorer, over the test split in its order."""
        found: dict[str, list[dict[str, Any]]] = {"correct": [], "incorrect": []}
        indices, outputs = {}, {}
        gold = list(self.gold_items(root))
        for item in gold:
            answered = item.id in answers
            text = answers.get(item.id, scienceqa.FAILED)
            letter = scienceqa.read_answer(text)
            index = scienceqa.choice_index(letter, item.extra["choices"])
            indices[item.id], outputs[item.id] = index, text
            prompt = _prompt(item) if answered else "Unknown"
            row = {
                "question_id": item.id,
                "parsed_ans": letter,
                "ground_truth": scienceqa.LETTERS[item.reference],
                "question": prompt,
                "pred": text,
                "is_multimodal": IMAGE_MARKER in prompt,
            }
            found["correct" if index == item.reference else "incorrect"].append(row)
        right = len(found["correct"])
        result = {
            "acc": right / len(gold) * 100,
            "correct": right,
            "count": len(gold),
            "results": indices,
            "outputs": outputs,
        }
        # The first is one JSON object, whatever its name says.
        files = {"scienceqa_output.jsonl": found, "scienceqa_result.json": result}
        return [(name, json.dumps(value, indent=2).encode()) for name, value in files.items()]

    def check_submission(self, root: Path, file: Path) -> None:
        """Either result file: every question of the test split."""
        content, wanted = read_object(file), {item.id for item in self.gold_items(root)}
        if "results" in content:
            found = set(content["results"]) & set(content.get("outputs", {}))
        else:
            rows = [*content.get("correct", ()), *content.get("incorrect", ())]
            found = {row.get("question_id") for row in rows}
        if found != wanted:
            raise UserError(
                f"{file}: {len(wanted - found)} questions of the test split are missing and "
                f"{len(found - wanted)} are foreign"
            )


def _item(
    key: str, text: str, problem: dict[str, Any], image: bool, images: tuple[Path, ...]
) -> Item:
    return Item(
        key,
        text,
        images,
        problem["answer"],
        groups={"subject": str(problem["subject"])} if "subject" in problem else {},
        extra={"choices": len(problem["choices"]), "image": image},
    )


def _text(row: dict[str, Any]) -> str:
    return row["conversations"][0]["value"].replace(IMAGE_MARKER, "").strip() + LETTER


def _prompt(item: Item) -> str:
    return f"{IMAGE_MARKER}\n{item.question}" if item.extra["image"] else item.question


def _lenient(each: Scored) -> float:
    letter = scienceqa.read_leniently(each.answer) if each.answered else scienceqa.FAILED
    index = scienceqa.choice_index(letter, each.item.extra["choices"])
    return float(index == each.item.reference)
