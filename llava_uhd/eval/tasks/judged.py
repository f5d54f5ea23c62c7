"""What a judge scores: LLaVA-Bench-in-the-Wild and MM-Vet. Here the answers are made."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.metrics import percent_of_each
from llava_uhd.eval.published import read_object
from llava_uhd.eval.scoring.reviews import summarise
from llava_uhd.eval.task import Answers, Item, Scored
from llava_uhd.eval.tasks.question_file import QuestionFileTask


class LlavaBench(QuestionFileTask):
    """LLaVA-Bench-in-the-Wild: 60 open questions on 24 images; the judge compares with GPT-4's."""

    name = "llava_bench"
    title = "LLaVA-Bench (In-the-Wild)"
    folder = "llava-bench-in-the-wild"
    source = (
        "get the data set llava-bench-in-the-wild of LLaVA's authors: questions.jsonl, "
        "context.jsonl, answers_gpt4.jsonl and images"
    )
    questions = "questions.jsonl"
    published_size = 60
    images = "images"
    main_metric = "relative"
    max_new_tokens = 1024
    local = False

    def files(self, root: Path) -> list[Path]:
        """Also what the judge reads."""
        return [*super().files(root), root / "context.jsonl", root / "answers_gpt4.jsonl"]

    def item(self, root: Path, row: dict[str, Any]) -> Item:
        """With the category that chooses the judge's prompt."""
        item = super().item(root, row)
        category = str(row.get("category", ""))
        return Item(item.id, item.question, item.images, groups={"category": category})

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Nothing: a judge scores."""
        return {}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """The published summary of the pairs that a judge gave; nothing without them."""
        pairs = [
            (each.metrics["reference"], each.metrics["model"])
            for each in scored
            if "reference" in each.metrics
        ]
        if not pairs:
            return {}
        found = summarise(pairs)._asdict()
        return {name: value for name, value in found.items() if math.isfinite(value)}


class MMVet(QuestionFileTask):
    """MM-Vet: 218 open questions; graded with GPT-4 from the result file."""

    name = "mmvet"
    title = "MM-Vet"
    folder = "mm-vet"
    source = (
        "get mm-vet.zip (its folder images) from the MM-Vet repository and llava-mm-vet.jsonl from "
        "eval.zip of the LLaVA-1.5 evaluation guide"
    )
    questions = "llava-mm-vet.jsonl"
    published_size = 218
    images = "images"
    main_metric = "total"
    max_new_tokens = 1024
    local = False

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Nothing: a judge scores."""
        return {}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Mean grades out of 100, of all questions and for each ability."""
        return percent_of_each([each.metrics for each in scored])

    def submission(
        self, root: Path, items: Sequence[Item], answers: Answers
    ) -> list[tuple[str, bytes]]:
        """The result file that the official notebook and its server read."""
        found = {f"v1_{key}": text for key, text in answers.items()}
        return [("mm-vet.json", json.dumps(found, indent=2).encode())]

    def check_submission(self, root: Path, file: Path) -> None:
        """Every question with a text."""
        found, wanted = read_object(file), {f"v1_{item.id}" for item in self.items(root)}
        absent, foreign = wanted - set(found), set(found) - wanted
        if absent or foreign or not all(isinstance(text, str) for text in found.values()):
            raise UserError(
                f"{file}: {len(absent)} questions are missing, {len(foreign)} are foreign, or an "
                "answer is no text"
            )
