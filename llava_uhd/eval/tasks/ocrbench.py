"""OCRBench: 1000 questions on text in pictures."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from llava_uhd.errors import UserError
from llava_uhd.eval.scoring.ocrbench import CATEGORIES, FORMULAS, ocrbench_hit, ocrbench_totals
from llava_uhd.eval.tables import Row
from llava_uhd.eval.task import Item, Scored
from llava_uhd.eval.tasks.kit import KitTask

# Names of the report -> names of scores.
_SCORES = {
    "Text Recognition": "text_recognition",
    "Scene Text-centric VQA": "scene_text_vqa",
    "Doc-oriented VQA": "document_vqa",
    "Key Information Extraction": "key_information",
    FORMULAS: "handwritten_formulas",
    "Final Score": "final_score",
}


class OCRBench(KitTask):
    """The score is the number of right answers; tables print a tenth of it."""

    name = "ocrbench"
    title = "OCRBench"
    folder = "ocrbench"
    source = (
        "get OCRBench.tsv of VLMEvalKit (opencompass.openxlab.space/utils/VLMEval/OCRBench.tsv)"
    )
    table = "OCRBench"
    columns = ("index", "question", "answer", "category")
    grouped_by = ("category",)
    main_metric = "final_score"
    published_size = 1_000
    scale = 0.1

    def reference(self, row: Row) -> list[str]:
        """Accepted texts: the table has a list in the notation of Python, or one text."""
        if row["category"] not in CATEGORIES:
            raise UserError(f"the category {row['category']!r} is none of OCRBench")
        answer = row["answer"]
        if isinstance(answer, str) and answer.lstrip().startswith("["):
            try:
                answer = ast.literal_eval(answer)
            except (ValueError, SyntaxError):
                raise UserError(f"the answer {answer!r} is no list") from None
        if answer is None:
            raise UserError("has no answer")
        return [str(each) for each in answer] if isinstance(answer, list) else [str(answer)]

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Whether one of the accepted texts stands in the answer."""
        return {"hit": ocrbench_hit(parsed, item.reference, item.groups["category"])}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Right answers of the five groups, and of all."""
        hits = [(each.item.groups["category"], each.metrics["hit"]) for each in scored]
        totals = ocrbench_totals(hits)
        return {name: totals[group] for group, name in _SCORES.items()}

    def breakdown(self, scored: Sequence[Scored]) -> dict[str, dict[str, dict[str, float]]]:
        """Right answers by category."""
        tables: dict[str, dict[str, float]] = {}
        for each in scored:
            row = tables.setdefault(each.item.groups["category"], {"right": 0.0, "items": 0})
            row["right"] += each.metrics["hit"]
            row["items"] += 1
        return {"category": tables}
