"""AI2D: diagrams with options, scored by equality as LLaVA-UHD v2 did."""

from __future__ import annotations

from llava_uhd.eval.task import Item
from llava_uhd.eval.tasks.joined import JoinedTask


class AI2D(JoinedTask):
    """The test split with the annotations of MoVA."""

    name = "ai2d"
    title = "AI2D test"
    folder = "ai2d"
    source = (
        "get ai2d_images of AI2D (prior.allenai.org/projects/diagram-understanding), test.jsonl "
        "and test_from_mova.jsonl of the LLaVA-UHD v2 evaluation"
    )
    questions = "test.jsonl"
    annotations = "test_from_mova.jsonl"
    images = "ai2d_images"
    main_metric = "accuracy"
    published_metric = "accuracy"

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Equality with one of the accepted answers, in lower case and without outer space."""
        said = parsed.strip().lower()
        return {"accuracy": float(any(said == each.strip().lower() for each in item.reference))}
