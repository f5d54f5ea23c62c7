"""ChartQA: relaxed accuracy, and the ANLS that LLaVA-UHD v2 computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_uhd.eval.scoring.anls import anls_uhd_v2
from llava_uhd.eval.scoring.relaxed import relaxed_accuracy
from llava_uhd.eval.scoring.vqa import normalise
from llava_uhd.eval.task import Item
from llava_uhd.eval.tasks.joined import UREADER, JoinedTask

SETS = ("human", "augmented")


class ChartQA(JoinedTask):
    """The test split in the layout of LLaVA-UHD v2.

    Both sets are reported where a line of the questions or of the annotations tells the set, as its
    ``category``, ``type`` or ``split``: "human" or "augmented".
    """

    name = "chartqa"
    title = "ChartQA test"
    folder = "chartqa"
    source = (
        "get ChartQA of UReader's data (to playground/data/ureader; also on the hub as "
        "ahmed-masry/ChartQA) and the two JSONL files of the LLaVA-UHD v2 evaluation"
    )
    questions = "chartqa_questions.jsonl"
    annotations = "chartqa_annotations.jsonl"
    images = "test/png"
    image_places = (f"{UREADER}/ChartQA/test/png",)
    main_metric = "relaxed_accuracy"
    published_metric = "anls_uhd_v2"

    def joined(
        self,
        key: str,
        question: str,
        images: tuple[Path, ...],
        row: dict[str, Any],
        gold: dict[str, Any],
    ) -> Item:
        """With the set it belongs to."""
        item = super().joined(key, question, images, row, gold)
        told = [
            str(each.get(name)) for each in (row, gold) for name in ("category", "type", "split")
        ]
        part = next((part for part in SETS for text in told if part in text.lower()), None)
        groups = {"set": part} if part else {}
        return Item(item.id, question, images, item.reference, (), groups, item.published_id)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Relaxed accuracy, v2's ANLS, and equality after the normalisation of VQA."""
        first = item.reference[0]
        return {
            "relaxed_accuracy": relaxed_accuracy(parsed, item.reference),
            "anls_uhd_v2": anls_uhd_v2(parsed, first),
            "exact_normalised": float(normalise(parsed) == normalise(first)),
        }
