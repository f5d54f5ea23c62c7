"""Referring expressions: RefCOCO, RefCOCO+ and RefCOCOg as LLaVA-UHD v2 asks and scores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.published import iterate_rows
from llava_uhd.eval.scoring.boxes import THRESHOLD, Box, box_totals, overlap, parse_box
from llava_uhd.eval.task import Item, Mode, Scored, Task
from llava_uhd.eval.tasks.question_file import QuestionFileTask, first_of, image_path


class REC(QuestionFileTask):
    """A box is asked for; it is right where it overlaps the labelled one by more than a half.

    ``accuracy`` is over all questions. The published scorer leaves answers out that hold no box:
    ``accuracy_of_parsed``.
    """

    name = "rec"
    title = "REC (RefCOCO, RefCOCO+, RefCOCOg)"
    folder = "rec"
    source = (
        "get llava_ref3_test_2017.jsonl and llava_ref3_labels.jsonl of the LLaVA-UHD v2 evaluation "
        "and COCO train2017 from cocodataset.org, to playground/data/coco/train2017"
    )
    questions = "llava_ref3_test_2017.jsonl"
    labels = "llava_ref3_labels.jsonl"
    images = "train2017"
    main_metric = "accuracy"
    unanswered = "wrong"
    # The mean overlap is a sum in single precision: its last digits depend on the order.
    in_answer_order = True

    def in_mode(self, mode: Mode) -> Task:
        """In the mode "published" unreadable answers do not count."""
        other = super().in_mode(mode)
        if mode == "published":
            other.main_metric, other.unanswered = "accuracy_of_parsed", "skip"
        return other

    def files(self, root: Path) -> list[Path]:
        """Questions, labels, images."""
        images = first_of(root / "../../coco/train2017", root / self.images)
        return [root / self.questions, root / self.labels, images]

    def items(self, root: Path) -> Iterator[Item]:
        """One item per question, with the label of its id."""
        file = root / self.labels
        labels = {
            row["question_id"]: self._box(row["label"], index, file)
            for index, row in enumerate(iterate_rows(file, "question_id", "label"))
        }
        file, folder = root / self.questions, self.files(root)[-1]
        for row in iterate_rows(file, "question_id", "image", "text"):
            key = row["question_id"]
            if key not in labels:
                raise UserError(f"{root / self.labels} has no label of question {key!r}")
            image = image_path(folder, row["image"], file)
            groups = {"split": str(row.get("category", "all"))}
            yield Item(key, row["text"], (image,), labels[key], groups=groups)

    def _box(self, label: Any, index: int, file: Path) -> Box:
        box = parse_box(str(label))
        if box is None:
            raise UserError(
                f"{file}, record {index}: the label {label!r} is no box of four numbers"
            )
        return box

    def parse(self, item: Item, answer: str) -> str:
        """The box, or an empty text."""
        box = parse_box(answer)
        return "" if box is None else str(list(box))

    def score(self, item: Item, parsed: str) -> dict[str, float]:
        """Whether the box is right, and its overlap if there is one."""
        box = parse_box(parsed)
        if box is None:
            return {"accuracy": 0.0}
        value = overlap(box, item.reference)
        return {"accuracy": float(value > THRESHOLD), "iou": value}

    def aggregate(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Accuracies in percent and the mean overlap, over whatever splits there are."""
        totals = box_totals([each.metrics.get("iou") for each in scored])
        return {
            "accuracy": 100 * totals.accuracy,
            "accuracy_of_parsed": 100 * totals.accuracy_of_parsed,
            "mean_iou_of_parsed": totals.mean_iou_of_parsed,
            "parsed": float(totals.parsed),
        }
