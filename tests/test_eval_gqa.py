"""GQA: exact answers and the official report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_eval import answers_file, golden_scores, lines, same, scored, submitted, whole

from llava_uhd.errors import UserError
from llava_uhd.eval.scoring import gqa
from llava_uhd.eval.tasks import TASKS

ANSWERS = "answers/llava_gqa_testdev_balanced/toy-model/merge.jsonl"
PREDICTIONS = "data/testdev_balanced_predictions.json"


@pytest.mark.parametrize("file", [PREDICTIONS, ANSWERS])
@pytest.mark.parametrize("compatible", [False, True])
def test_scores_are_the_official_ones(golden: Path, file: str, compatible: bool) -> None:
    folder = golden / "evaluation/gqa"
    expected = golden_scores(folder)
    found = scored("gqa", folder.parent, folder / file, compatible)
    scores = found["scores"]
    for name in ("binary", "open", "accuracy", "validity", "plausibility"):
        assert round(scores[name], 2) == expected[name]
    assert round(scores["distribution"], 2) == expected["distribution_lower_is_better"]
    rows = {row["questionId"]: row for row in expected["per_item"]}
    assert [row["id"] for row in found["items"]] == list(rows)
    same([row["score"] for row in found["items"]], [float(r["correct"]) for r in rows.values()])
    assert [row["parsed"] for row in found["items"]] == [r["prediction"] for r in rows.values()]
    assert report(found) == expected["report"]


def report(found: Any) -> str:
    """The official report, printed from our numbers."""
    scores, text = found["scores"], ""
    for name in ("Binary", "Open", "Accuracy", "Validity", "Plausibility"):
        text += f"{name}: {scores[name.lower()]:.2f}%\n"
    text += f"Distribution: {scores['distribution']:.2f} (lower is better)\n"
    for name, table in found["breakdown"].items():
        text += f"\nAccuracy / {name}:\n"
        for value, row in table.items():
            text += f"  {value}: {row['accuracy']:.2f}% ({row['items']} questions)\n"
    return text


def test_predictions_are_the_published_ones(golden: Path) -> None:
    folder = golden / "evaluation/gqa"
    [(name, content)] = submitted("gqa", folder.parent, folder / ANSWERS).items()
    assert content == (folder / "data" / name).read_bytes()
    TASKS.get("gqa").check_submission(folder, folder / "data" / name)


def question(answer: str, structural: str = "query", balanced: bool = True, **more: Any) -> Any:
    return {
        "answer": answer,
        "isBalanced": balanced,
        "types": {"structural": structural, "semantic": "obj"},
        "groups": {"global": "colour"},
        "semantic": [
            {"operation": "select", "argument": "x"},
            {"operation": "exist", "argument": "?"},
            {"operation": "query", "argument": "name"},
            {"operation": "choose name", "argument": "a|b"},
        ],
        "question": "What is that there?",
        **more,
    }


def make(root: Path) -> Path:
    folder = root / "gqa"
    whole(
        folder / "data/testdev_balanced_questions.json",
        {"1": question("red"), "2": question("red"), "3": question("yes", "verify", False)},
    )
    rows = [{"question_id": str(n), "image": f"{n}.jpg", "text": "T"} for n in (1, 2)]
    lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    return folder


def test_small_files(tmp_path: Path) -> None:
    folder = make(tmp_path)
    task = TASKS.get("gqa")
    message = task.missing(folder)
    assert message and str(folder / "data/images") in message and "stanford.edu" in message
    (folder / "data/images").mkdir()
    assert [item.images[0] for item in task.load(folder)] == [
        folder / "data/images/1.jpg",
        folder / "data/images/2.jpg",
    ]
    found = scored("gqa", tmp_path, answers_file(tmp_path / "a.jsonl", {"1": "Red.", "2": "blue"}))
    # (1 - 2)² / 2 / 100: the group has red twice, and once it was found.
    assert found["scores"] == {
        "accuracy": 50.0,
        "open": 50.0,
        "validity": 0,
        "plausibility": 0,
        "distribution": 0.005,
    }
    assert found["breakdown"]["steps number"] == {"1": {"accuracy": 50.0, "items": 2}}
    assert found["missing"] == ["3"]
    # A file of predictions is taken as it is: "Red." is not converted any more.
    rows = [{"questionId": str(n), "prediction": "Red."} for n in (1, 2)]
    file = whole(tmp_path / "p.json", rows)
    assert scored("gqa", tmp_path, file)["scores"]["accuracy"] == 0
    with pytest.raises(UserError, match="1 balanced questions of gqa have no answer"):
        scored("gqa", tmp_path, whole(file, rows[:1]))
    with pytest.raises(UserError, match="belong to no question"):
        more = [*rows, {"questionId": "9", "prediction": "x"}]
        scored("gqa", tmp_path, whole(file, more))
    with pytest.raises(UserError, match="list of questionId"):
        task.check_submission(folder, whole(file, more))
    with pytest.raises(UserError, match="question '1' has no field 'types'"):
        whole(
            folder / "data/testdev_balanced_questions.json", {"1": {"answer": "", "isBalanced": 1}}
        )
        scored("gqa", tmp_path, file)


@pytest.mark.parametrize(
    ("answer", "converted"), [("Cat.", "cat"), ("cat. ", "cat. "), ("A...", "a"), ("", "")]
)
def test_conversion(answer: str, converted: str) -> None:
    assert gqa.convert(answer) == converted


def test_no_groups_no_distance() -> None:
    outcomes = [gqa.Outcome("a", question("a", groups={"global": None}))]
    assert gqa.distribution(outcomes) is None
    assert "distribution" not in gqa.scores(outcomes)
    assert json.dumps(gqa.tables(outcomes)["structural type"]) == (
        '{"query": {"accuracy": 100.0, "items": 1}}'
    )
