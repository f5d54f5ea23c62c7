"""Documents, charts and diagrams in the layout of LLaVA-UHD v2; the file for DocVQA's server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fixtures_eval import answers_file, golden_scores, lines, same, scored, submitted, whole
from fixtures_tiny import picture

from llava_uhd.errors import UserError
from llava_uhd.eval.tasks import TASKS, find_task
from llava_uhd.eval.tasks.joined import JoinedTask
from llava_uhd.eval.tasks.question_file import SHORT

DOCUMENTS = ("docvqa", "infographicvqa", "deepform", "estvqa", "chartqa", "ai2d")
ANSWERS = "docvqa/answers/val/toy-model/merge_slice.jsonl"


def as_task(golden: Path, name: str, root: Path) -> Path:
    """The golden files under the names that a task expects."""
    task = find_task(name)
    assert isinstance(task, JoinedTask)
    folder = root / task.folder
    folder.mkdir()
    shutil.copy(golden / "evaluation/docvqa/docvqa_questions.jsonl", folder / task.questions)
    shutil.copy(golden / "evaluation/docvqa/docvqa_annotations.jsonl", folder / task.annotations)
    return golden / "evaluation" / ANSWERS


@pytest.mark.parametrize("name", DOCUMENTS)
def test_equal_to_the_published_scorers(golden: Path, name: str, tmp_path: Path) -> None:
    answers = as_task(golden, name, tmp_path)
    expected = golden_scores(golden / "evaluation/docvqa")
    columns = {
        "anls": "anls_standard",
        "anls_uhd_v2": "anls_v2",
        "relaxed_accuracy": "relaxed_standard",
        "exact_normalised": "st_accuracy",
        "accuracy": "exact_match_ai2d",
    }
    result = scored(name, tmp_path, answers)
    assert len(result["items"]) == expected["samples"] and not result["missing"]
    gold = {
        (row["question_id"], row["prediction"], row["answer"]): row for row in expected["per_item"]
    }
    for item in result["items"]:
        row = gold[item["id"], item["answer"], item["reference"][0]]
        for metric, value in item["metrics"].items():
            assert value == pytest.approx(row[columns[metric]], abs=1e-9), (metric, row)
    for metric, value in result["scores"].items():
        assert value == pytest.approx(expected[columns[metric]], abs=1e-9), metric


def test_the_published_mode_reports_the_published_metric(golden: Path, tmp_path: Path) -> None:
    answers = as_task(golden, "chartqa", tmp_path)
    rows = golden_scores(golden / "evaluation/docvqa")["per_item"]
    # In the order of the file, which is the order of the golden rows.
    same([item["score"] for item in scored("chartqa", tmp_path, answers, True)["items"]],
         [row["anls_v2"] for row in rows])  # fmt: skip
    assert TASKS.get("chartqa").main_metric == "relaxed_accuracy"


def small(root: Path, **changes: Any) -> Path:
    """A ChartQA of three questions, two of them with the same id."""
    folder = root / "chartqa"
    rows: list[dict[str, Any]] = [
        {"question_id": 1, "image": "a.png", "text": "How many?\nShort.", "category": "human"},
        {"question_id": 1, "image": "a.png", "text": "Which?", "category": "human"},
        {"question_id": 2, "image": "b.png", "text": "Which?", "category": "augmented"},
    ]
    notes: list[dict[str, Any]] = [
        {"question_id": 1, "question": "how MANY?\nShort.", "answer": "99"},
        {"question_id": 2, "question": "Which?", "answer": ["Red", "blue"]},
        {"question_id": 1, "question": "Which?", "answer": "old"},
        {"question_id": 1, "question": "Which?", "answer": "50"},
    ]
    lines(folder / "chartqa_questions.jsonl", changes.get("questions", rows))
    lines(folder / "chartqa_annotations.jsonl", changes.get("annotations", notes))
    return folder


def test_items_are_joined_by_id_and_whole_prompt(tmp_path: Path) -> None:
    root = tmp_path / "data/eval"
    folder = small(root)
    task = TASKS.get("chartqa")
    place = tmp_path / "data/ureader/ChartQA/test/png"
    place.mkdir(parents=True)
    for name in "ab":
        picture(8, 8, seed=1).save(place / f"{name}.png")
    items = task.load(task.root(root))
    assert [item.id for item in items] == ["1 how many?\nshort.", "1 which?", "2 which?"]
    assert [item.question_id for item in items] == [1, 1, 2]
    # Of lines that occur twice the last one holds.
    assert [item.reference for item in items] == [["99"], ["50"], ["Red", "blue"]]
    assert items[0].question == "How many?\nShort."
    assert items[0].images[0].resolve() == place / "a.png"  # type: ignore[union-attr]
    answers = lines(
        tmp_path / "a.jsonl",
        [
            {"question_id": 2, "prompt": "which?", "text": "Blue"},
            {"question_id": 1, "prompt": "HOW MANY?\nShort.", "text": "95"},
        ],
    )
    result = scored("chartqa", root, answers)
    assert result["missing"] == ["1 which?"]
    same([result["scores"][name] for name in ("relaxed_accuracy", "anls_uhd_v2")], [100, 25])
    folder.joinpath("chartqa_annotations.jsonl").unlink()
    with pytest.raises(UserError, match="chartqa_annotations.jsonl is missing; get ChartQA of"):
        scored("chartqa", root, answers)


def test_sets_are_reported_apart(tmp_path: Path) -> None:
    task = TASKS.get("chartqa")
    items = list(task.items(small(tmp_path)))
    assert [item.groups["set"] for item in items] == ["human", "human", "augmented"]
    rows = [
        {"question_id": item.question_id, "prompt": item.question, "text": text}
        for item, text in zip(items, ("99", "51", "green"), strict=True)
    ]
    tables = scored("chartqa", tmp_path, lines(tmp_path / "a.jsonl", rows))["breakdown"]["set"]
    assert {name: row["relaxed_accuracy"] for name, row in tables.items()} == {
        "human": 100, "augmented": 0,
    }  # fmt: skip


def test_a_question_that_is_asked_twice_is_answered_twice(tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "a.png", "text": "Which?", "category": "default"}
    folder = small(tmp_path, questions=[row, row])
    items = list(TASKS.get("chartqa").items(folder))
    assert [item.id for item in items] == ["1 which?", "1 which? #2"] and not items[0].groups
    answers = [{"question_id": 1, "prompt": "Which?", "text": text} for text in ("50", "4", "50")]
    result = scored("chartqa", tmp_path, lines(tmp_path / "a.jsonl", answers[:2]))
    assert result["scores"]["relaxed_accuracy"] == 50
    with pytest.raises(UserError, match=r"belong to no question of chartqa \('1 which\? #3'\)"):
        scored("chartqa", tmp_path, lines(tmp_path / "a.jsonl", answers))


def test_mistakes_are_named(tmp_path: Path) -> None:
    task = TASKS.get("chartqa")
    lost = [{"question_id": 7, "image": "a.png", "text": "Lost?", "category": "human"}]
    with pytest.raises(UserError, match="record 0: no line of chartqa_annotations.jsonl has the"):
        list(task.items(small(tmp_path, questions=lost)))
    away = [{"question_id": 1, "image": "../a.png", "text": "Which?", "category": "human"}]
    with pytest.raises(UserError, match="must stay inside"):
        list(task.items(small(tmp_path, questions=away)))
    small(tmp_path)
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "prompt": "x", "text": "y"}])
    with pytest.raises(UserError, match="1 of 1 answers belong to no question of chartqa"):
        scored("chartqa", tmp_path, answers)


def test_docvqa_test_is_uploaded(tmp_path: Path) -> None:
    folder = tmp_path / "docvqa"
    picture(8, 8, seed=1).save(_made(folder / "test/documents") / "x.png")
    lines(
        folder / "test.jsonl",
        [
            {"question_id": 57344, "image": "data/docvqa/test/documents/x.png", "question": "Who?"},
            {"question_id": "57345", "image": "x.png", "text": "When?"},
        ],
    )
    task = TASKS.get("docvqa_test")
    items = task.load(folder)
    assert [item.question for item in items] == [f"Who?{SHORT}", "When?"]
    assert [item.images for item in items] == [(folder / "test/documents/x.png",)] * 2
    answers = answers_file(tmp_path / "a.jsonl", {57344: "Zoë", 57345: "12"})
    (name, content), = submitted("docvqa_test", tmp_path, answers).items()  # fmt: skip
    assert name == "docvqa_test.json"
    assert content.decode("ascii") == (
        '[{"questionId": 57344, "answer": "Zo\\u00eb"}, {"questionId": 57345, "answer": "12"}]'
    )
    upload = tmp_path / name
    upload.write_bytes(content)
    task.check_submission(folder, upload)
    rows = json.loads(content)
    for wrong, reason in [
        (rows[:1], "its 1 questions are not the 2"),
        ([*rows, rows[0]], "its 2 questions are not the 2 of test.jsonl, each once"),
        ([{"questionId": "57344", "answer": "x"}], "needs a whole number questionId"),
        ([{"questionId": 57344, "answer": None}], "and a text answer"),
        ({}, "must be a JSON list"),
    ]:
        with pytest.raises(UserError, match=reason):
            task.check_submission(folder, whole(upload, wrong))
    with pytest.raises(UserError, match="1 questions have no answer, first 57345"):
        submitted("docvqa_test", tmp_path, answers_file(tmp_path / "b.jsonl", {57344: "x"}))
    with pytest.raises(UserError, match="docvqa_test has no score without its server"):
        scored("docvqa_test", tmp_path, answers)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
