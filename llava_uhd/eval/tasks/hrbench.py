"""HR-Bench: 200 questions on pictures of 4K and 8K, each with its options in four orders."""

from __future__ import annotations

from collections.abc import Sequence

from llava_uhd.eval.metrics import grouped, mean
from llava_uhd.eval.task import Scored
from llava_uhd.eval.tasks.kit import ChoiceTask


class HRBench4K(ChoiceTask):
    """Accuracy of each order of the options, averaged over the orders."""

    name = "hrbench4k"
    title = "HR-Bench 4K"
    folder = "hrbench"
    source = "get hr_bench_4k.tsv from the hub (DreamMr/HR-Bench) and name it HRBench4K.tsv"
    table = "HRBench4K"
    columns = ("index", "question", "answer", "category", "cycle_category")
    grouped_by = ("category", "cycle_category")
    published_size = 800

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """In percent: over all, and for the categories there are (``single``, ``cross``)."""
        parts = grouped(scored, lambda each: each.item.groups.get("category"))
        return {"accuracy": _average(scored)} | {
            f"accuracy_{name}": _average(rows) for name, rows in sorted(parts.items())
        }


def _average(scored: Sequence[Scored]) -> float:
    cycles = grouped(scored, lambda each: each.item.groups.get("cycle_category", ""))
    return 100 * mean(mean(each.metrics["accuracy"] for each in rows) for rows in cycles.values())


class HRBench8K(HRBench4K):
    """The same on the pictures of 8K."""

    name = "hrbench8k"
    title = "HR-Bench 8K"
    source = "get hr_bench_8k.tsv from the hub (DreamMr/HR-Bench) and name it HRBench8K.tsv"
    table = "HRBench8K"
