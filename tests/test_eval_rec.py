"""Referring expressions: splits, unreadable boxes, and the published count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fixtures_eval import answers_file, golden_scores, lines, scored

from llava_uhd.errors import UserError
from llava_uhd.eval.tasks import TASKS


@pytest.mark.parametrize("compatible", [False, True])
def test_equal_to_the_published_scorer(golden: Path, compatible: bool) -> None:
    root = golden / "evaluation"
    answers = root / "rec/answers/llava_ref3_test_2017/toy-model/merge.jsonl"
    result = scored("rec", root, answers, compatible)
    splits = golden_scores(root / "rec")["splits"]
    assert result["breakdown"]["split"].keys() == splits.keys()
    for name, expected in splits.items():
        found = result["breakdown"]["split"][name]
        assert found["items"] == expected["samples"] and found["parsed"] == expected["parsed"]
        assert found["accuracy"] == pytest.approx(100 * expected["accuracy_over_all"], abs=1e-7)
        for metric, value in (
            ("accuracy_of_parsed", 100 * expected["accuracy_over_parsed"]),
            ("mean_iou_of_parsed", expected["mean_iou_over_parsed"]),
        ):
            assert found[metric] == pytest.approx(value, abs=1e-9)


def small(root: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"question_id": k, "image": f"{k}.jpg", "text": "Where?", "category": f"REC_{k % 2}"}
        for k in range(4)
    ]
    lines(root / "rec/llava_ref3_test_2017.jsonl", rows)
    labels = [
        {"question_id": k, "image": f"{k}.jpg", "label": "[0, 0, 1.0, 1]", "text": "Where?"}
        for k in range(4)
    ]
    lines(root / "rec/llava_ref3_labels.jsonl", labels)
    return root / "rec"


def test_unreadable_boxes_are_wrong_or_left_out(tmp_path: Path) -> None:
    small(tmp_path)
    texts = {0: "[0, 0, 1, 0.6]", 1: "[0, 0, 1, 0.5]", 2: "there"}
    answers = answers_file(tmp_path / "a.jsonl", texts)
    result = scored("rec", tmp_path, answers)
    assert result["missing"] == [3]
    assert [item["score"] for item in result["items"]] == [1, 0, 0, 0]
    assert result["scores"] == pytest.approx(
        {"accuracy": 25, "accuracy_of_parsed": 50, "mean_iou_of_parsed": 0.55, "parsed": 2}
    )
    published = scored("rec", tmp_path, answers, compatible=True)
    assert published["scores"]["accuracy_of_parsed"] == 50 and len(published["items"]) == 3


def test_images_and_labels(tmp_path: Path) -> None:
    task = TASKS.get("rec")
    root = small(tmp_path / "data/eval")
    with pytest.raises(UserError, match=r"train2017 is missing; get llava_ref3_test_2017.jsonl"):
        task.load(root)
    (tmp_path / "data/coco/train2017").mkdir(parents=True)
    items = task.load(root)
    assert items[3].groups == {"split": "REC_1"} and items[3].reference == (0, 0, 1, 1)
    assert Path(str(items[3].images[0])).resolve() == tmp_path / "data/coco/train2017/3.jpg"
    lines(root / "llava_ref3_labels.jsonl", [{"question_id": 0, "label": "[1, 2]"}])
    with pytest.raises(UserError, match=r"record 0: the label '\[1, 2\]' is no box"):
        task.load(root)
    lines(root / "llava_ref3_labels.jsonl", [{"question_id": 0, "label": "[0, 0, 1, 1]"}])
    with pytest.raises(UserError, match="has no label of question 1"):
        task.load(root)
