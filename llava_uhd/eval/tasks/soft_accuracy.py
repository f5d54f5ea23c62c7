"""What the tasks with ten human answers a question share: soft accuracy (VQA, arXiv 1505.00468)."""

from __future__ import annotations

from collections.abc import Sequence

from llava_uhd.eval.metrics import percent_of_each
from llava_uhd.eval.scoring.vqa import agreement, normalise
from llava_uhd.eval.task import Item, Scored, Task


class SoftAccuracyTask(Task):
    """Answers against human ones, both normalised."""

    def normalised(self, text: str) -> str:
        """By the full normalisation, unless a benchmark has its own."""
        return normalise(text)

    def parse(self, item: Item, answer: str) -> str:
        """The normalised answer."""
        return self.normalised(answer)

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Soft accuracy."""
        return {"accuracy": agreement(parsed, [self.normalised(text) for text in item.reference])}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Mean soft accuracy in percent."""
        return percent_of_each([each.metrics for each in scored])
