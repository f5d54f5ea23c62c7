"""ScienceQA: letters, the image subset, result files."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_eval import answers_file, golden_scores, same, scored, submitted, whole

from llava_uhd.errors import UserError
from llava_uhd.eval.scoring import scienceqa
from llava_uhd.eval.tasks import TASKS
from llava_uhd.eval.tasks.question_file import LETTER


@pytest.mark.parametrize("compatible", [False, True])
def test_scores_are_the_published_ones(golden: Path, compatible: bool) -> None:
    folder = golden / "evaluation/scienceqa"
    expected = golden_scores(folder)
    found = scored("sqa", folder.parent, folder / "answers/toy-model.jsonl", compatible)
    for name in ("accuracy", "img_accuracy"):
        assert found["scores"][name] == pytest.approx(expected[name], abs=1e-9)
    rows = {row["question_id"]: row for row in expected["per_item"]}
    items = {row["id"]: row for row in found["items"]}
    assert set(items) == set(rows)
    same([items[key]["score"] for key in rows], [float(row["correct"]) for row in rows.values()])
    assert [items[key]["parsed"] for key in rows] == [row["parsed"] for row in rows.values()]


def test_result_files_are_the_published_ones(golden: Path) -> None:
    folder = golden / "evaluation/scienceqa"
    files = submitted("scienceqa", folder.parent, folder / "answers/toy-model.jsonl")
    for kind in ("output.jsonl", "result.json"):
        wanted = folder / f"answers/toy-model_{kind}"
        assert files.pop(f"scienceqa_{kind}") == wanted.read_bytes()
        TASKS.get("scienceqa").check_submission(folder, wanted)
    assert not files


@pytest.mark.parametrize(
    ("text", "letter", "lenient"),
    [
        ("B", "B", "B"),
        ("B. a cup", "B", "B"),
        ("B.", "FAILED", "B"),
        ("B ", "FAILED", "B"),
        (" (b) it is", "FAILED", "B"),
        ("The answer is B.", "B", "B"),
        ("The answer is B!", "B", "B"),
        ("The answer is B", "FAILED", "FAILED"),
        ("The answer is A. The answer is B.", "FAILED", "FAILED"),
        ("F", "FAILED", "FAILED"),
        ("Bus", "FAILED", "FAILED"),
        ("", "FAILED", "FAILED"),
    ],
)
def test_answers(text: str, letter: str, lenient: str) -> None:
    assert scienceqa.read_answer(text) == letter
    assert scienceqa.read_leniently(text) == lenient


def test_choices() -> None:
    assert [scienceqa.choice_index(letter, 2) for letter in ("A", "B", "C", "FAILED", "")] == [
        0, 1, -1, -1, -1
    ]  # fmt: skip


def make(root: Path) -> Path:
    folder = root / "scienceqa"
    problem = {"question": "Q?", "choices": ["x", "y"], "answer": 1, "subject": "art"}
    problems = {key: {**problem, "image": None} for key in "123"}
    problems["1"]["image"] = "image.png"
    whole(folder / "problems.json", problems)
    whole(folder / "pid_splits.json", {"test": ["1", "2", "3"]})
    turns = [{"from": "human", "value": "Q?\nA. x\nB. y"}, {"from": "gpt", "value": "B"}]
    first = [{"from": "human", "value": "<image>\nContext: c\nQ?\nA. x\nB. y"}, turns[1]]
    rows = [{"id": "1", "image": "1/image.png", "conversations": first}]
    rows += [{"id": key, "conversations": turns} for key in "23"]
    whole(folder / "llava_test_CQM-A.json", rows)
    return folder


def test_small_files(tmp_path: Path) -> None:
    folder = make(tmp_path)
    task = TASKS.get("scienceqa")
    message = task.missing(folder)
    assert message and str(folder / "images/test") in message and "ScienceQA repository" in message
    (folder / "images/test").mkdir(parents=True)
    items = task.load(folder)
    assert items[0].question == f"Context: c\nQ?\nA. x\nB. y{LETTER}"
    assert items[0].images == (folder / "images/test/1/image.png",) and not items[1].images
    assert [turn.text[:8] for item in items[:2] for turn in task.turns(item)] == [
        "<image>\n",
        "Q?\nA. x\n",
    ]
    assert task.published_row(items[0], "B", "m")["prompt"] == f"<image>\n{items[0].question}"
    found = scored("scienceqa", tmp_path, answers_file(tmp_path / "a.jsonl", {"1": "B.", "2": "B"}))
    assert found["scores"] == pytest.approx(
        {
            "img_accuracy": 0,
            "accuracy": 100 / 3,
            "lenient_img_accuracy": 100,
            "lenient_accuracy": 200 / 3,
        }
    )
    [(name, content), _] = submitted("scienceqa", tmp_path, tmp_path / "a.jsonl").items()
    (tmp_path / name).write_bytes(content.replace(b'"3"', b'"4"'))
    with pytest.raises(UserError, match="1 questions of the test split are missing and 1 are"):
        task.check_submission(folder, tmp_path / name)
    # Without an answer it is wrong, but not among the questions with image.
    found = scored("scienceqa", tmp_path, answers_file(tmp_path / "a.jsonl", {"2": "B"}))
    assert "img_accuracy" not in found["scores"] and found["missing"] == ["1", "3"]
    with pytest.raises(UserError, match="has no problem '9'"):
        whole(folder / "pid_splits.json", {"test": ["9"]})
        scored("scienceqa", tmp_path, tmp_path / "a.jsonl")
