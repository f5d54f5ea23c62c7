"""Soft accuracy over human answers: VQAv2, VizWiz, TextVQA."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from fixtures_eval import (
    answers_file,
    golden_scores,
    lines,
    make_textvqa,
    same,
    scored,
    submitted,
    whole,
)

from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.scoring import vqa
from llava_uhd.eval.tasks import TASKS
from llava_uhd.eval.tasks.question_file import SHORT
from llava_uhd.eval.tasks.textvqa import question_of


@pytest.mark.parametrize(
    ("raw", "full", "official"),
    [
        ("The  Two cats, OK?", "2 cats ok", "2 cats ok"),
        ("5.", "5", "5"),
        ("a.5", "a.5", "a.5"),
        ("3. 14", "3 14", "3 14"),
        ("K-9", "k 9", "k 9"),
        ("K-9 - x", "k9 x", "k9 x"),
        ("jay's", "jay 's", "jay's"),
        ("dont", "don't", "don't"),
        ("1,000-x", "1000 x", "1000x"),
        ("Im", "im", "im"),
        ("eleven", "eleven", "eleven"),
        ("a an the", "", ""),
        ("x" + "." * 40, "x" + "." * 8, "x" + "." * 8),
    ],
)
def test_normaliser(raw: str, full: str, official: str) -> None:
    assert vqa.normalise(raw) == full
    assert vqa.normalise_vqav2(raw) == official


def test_normaliser_equals_the_published_one(golden: Path) -> None:
    cases = json.loads((golden / "evaluation/answer_normalisation/cases.json").read_text("utf-8"))
    assert len(cases) > 100
    for case in cases:
        words = vqa.split_words(case["raw"])
        assert words == case["tokenized"]
        assert vqa.strip_punctuation(words) == case["after_punctuation"]
        assert vqa.normalise(case["raw"]) == case["normalised"]
        assert vqa.normalise_vqav2(case["raw"]) == case["vqav2_official"]


def test_soft_accuracy() -> None:
    for count, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1]):
        assert vqa.soft_accuracy("Two.", ["2"] * count + ["3"] * (10 - count)) == pytest.approx(
            expected, abs=1e-12
        )
    with pytest.raises(ValueError, match="no human answers"):
        vqa.agreement("2", [])


@pytest.mark.parametrize(
    ("task", "answers", "part"),
    [
        ("vqav2", "vqav2/val_results.json", "val_local"),
        ("vqav2_val", "vqav2/val_results.json", "val_local"),
        ("vizwiz", "vizwiz/answers/toy-model.jsonl", "val_local"),
        ("vizwiz", "vizwiz/answers_upload/toy-model.json", "val_local"),
        ("textvqa", "textvqa/answers/toy-model.jsonl", None),
        ("textvqa_no_ocr", "textvqa/answers/toy-model.jsonl", None),
    ],
)
@pytest.mark.parametrize("compatible", [False, True])
def test_scores_are_the_published_ones(
    golden: Path, task: str, answers: str, part: str | None, compatible: bool
) -> None:
    root = golden / "evaluation"
    expected = golden_scores(root / answers.split("/")[0])
    expected = expected[part] if part else expected
    found = scored(task, root, root / answers, compatible)
    assert found["task"] == task
    assert found["scores"]["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-9)
    same([row["score"] for row in found["items"]], [row["score"] for row in expected["per_item"]])
    rows = expected["per_item"]
    assert [row["id"] for row in found["items"]] == [row["question_id"] for row in rows]
    if "upload" not in answers:  # it holds normalised answers
        texts = [row.get("normalised", row.get("pred_normalised")) for row in rows]
        assert [row["parsed"] for row in found["items"]] == texts


def test_textvqa_questions_are_found_in_prompts(golden: Path) -> None:
    folder = golden / "evaluation/textvqa"
    rows = (folder / "answers/toy-model.jsonl").read_text("utf-8").splitlines()
    found = [question_of(json.loads(row)["prompt"]).lower() for row in rows]
    assert found == [row["question_key"] for row in golden_scores(folder)["per_item"]]


def test_submissions_are_the_published_ones(golden: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = golden / "evaluation"
    split = "llava_vqav2_mscoco_test-dev2015"
    answers = root / f"vqav2/answers/{split}/toy-model/merge.jsonl"
    with caplog.at_level(logging.WARNING):
        files = submitted("vqav2", root, answers)
    assert "1 broken lines were left out" in caplog.text
    upload = root / f"vqav2/answers_upload/{split}/toy-model.json"
    assert files == {f"{split}.json": upload.read_bytes()}
    TASKS.get("vqav2").check_submission(root / "vqav2", upload)
    upload = root / "vizwiz/answers_upload/toy-model.json"
    files = submitted("vizwiz", root, root / "vizwiz/answers/toy-model.jsonl")
    assert files == {"vizwiz.json": upload.read_bytes()}
    TASKS.get("vizwiz").check_submission(root / "vizwiz", upload)


def test_textvqa_on_small_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_textvqa(tmp_path)
    task = TASKS.get("textvqa")
    message = task.missing(folder)
    assert message and str(folder / "train_images") in message and "textvqa.org" in message
    (folder / "train_images").mkdir()
    items = task.load(folder)
    assert [item.id for item in items] == ["a what is it?", "a who?", "b who?"]
    assert [item.question_id for item in items] == ["a", "a", "b"]
    assert "Reference OCR" in items[0].question
    plain = TASKS.get("textvqa_no_ocr").load(folder)
    assert [item.question for item in plain[:2]] == [f"What Is It?{SHORT}", f"Who?{SHORT}"]
    rows = [task.published_row(item, "Bob.", "m") for item in items[:2]]
    assert list(rows[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert len(rows[0]["answer_id"]) == 22 and rows[0]["answer_id"] != rows[1]["answer_id"]
    with caplog.at_level(logging.WARNING):
        found = scored("textvqa", tmp_path, lines(tmp_path / "a.jsonl", rows))
    assert [row["score"] for row in found["items"]] == pytest.approx([0, 0.6])
    assert found["scores"] == {"accuracy": pytest.approx(30)}
    assert found["missing"] == ["b who?"]
    assert "2 of 2 prompts hold OCR tokens" in caplog.text and "1 questions" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question_id": "a", "prompt": f"Else?{SHORT}", "text": "x"}], "belong to no question"),
        ([{"question_id": "a", "prompt": "Who?", "text": "x"}], "is no prompt of TextVQA"),
        ([{"question_id": "a", "text": "x"}], "no field 'prompt'"),
        ([{"question_id": "a", "prompt": f"Who?{SHORT}", "text": 3}], "must be a text"),
        ([], "no answer"),
    ],
)
def test_wrong_answers_files(tmp_path: Path, rows: list[Any], message: str) -> None:
    make_textvqa(tmp_path)
    with pytest.raises(UserError, match=message):
        scored("textvqa", tmp_path, lines(tmp_path / "a.jsonl", rows))


def make_vqav2(root: Path) -> Path:
    folder = root / "vqav2"
    questions = [{"question_id": n, "image_id": n, "question": f"Q{n}?"} for n in (7, 8)]
    notes = [
        {"question_id": n, "answer_type": "number", "answers": [{"answer": "2"}] * 10}
        for n in (7, 8)
    ]
    whole(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    whole(folder / "v2_mscoco_val2014_annotations.json", {"annotations": notes})
    rows = [{"question_id": n, "image": f"{n}.jpg", "text": f"Q{n}?{SHORT}"} for n in (1, 2, 3)]
    lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows[::2])
    return folder


def test_vqav2_on_small_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = make_vqav2(tmp_path)
    (folder / "val2014").mkdir()
    items = TASKS.get("vqav2_val").load(folder)
    assert items[0].question == f"Q7?{SHORT}"
    assert items[0].images == (folder / "val2014/COCO_val2014_000000000007.jpg",)
    results = whole(tmp_path / "r.json", [{"question_id": n, "answer": "two"} for n in (7, 8)])
    out = tmp_path / "new/out.json"
    words = ["score", "--task", "VQAv2", "--data-root", str(tmp_path), "--answers", str(results)]
    assert main([*words, "--output", str(out)]) == 0
    found = json.loads(out.read_text("utf-8"))
    assert found["scores"] == {"accuracy": 100.0} and found["task"] == "vqav2"
    assert found["breakdown"]["answer type"]["number"] == {"accuracy": 100.0, "items": 2}
    assert "100" in capsys.readouterr().out
    half = whole(tmp_path / "h.json", [{"question_id": 7, "answer": "two"}])
    with pytest.raises(UserError, match="1 of 2 questions of vqav2_val have no answer"):
        scored("vqav2", tmp_path, half)
    with pytest.raises(UserError, match="7 is answered twice"):
        scored(
            "vqav2", tmp_path, lines(tmp_path / "d.jsonl", [{"question_id": 7, "text": "2"}] * 2)
        )


def test_uploads_are_checked(tmp_path: Path) -> None:
    folder = make_vqav2(tmp_path)
    task = TASKS.get("vqav2")
    file = answers_file(tmp_path / "a.jsonl", {1: "The cat.", 3: "No"})
    with file.open("a") as stream:
        stream.write('{"question_id": 9, "te')
    [(name, content)] = submitted("vqav2", tmp_path, file).items()
    assert json.loads(content) == [
        {"question_id": 1, "answer": "cat"},
        {"question_id": 2, "answer": ""},
        {"question_id": 3, "answer": "no"},
    ]
    upload = tmp_path / name
    upload.write_bytes(content)
    task.check_submission(folder, upload)
    for rows, message in (
        ([{"question_id": 1, "answer": "x"}], "2 questions .* are missing"),
        ([{"question_id": n, "answer": ""} for n in (1, 2, 3)], "every answer is empty"),
        ([{"question_id": 1}], "needs question_id and answer"),
        ({}, "must be a JSON list"),
    ):
        with pytest.raises(UserError, match=message):
            task.check_submission(folder, whole(upload, rows))


def test_vizwiz_on_small_files(tmp_path: Path) -> None:
    folder = tmp_path / "vizwiz"
    names = [f"VizWiz_test_{n:08d}.jpg" for n in range(2)]
    rows = [{"question_id": n, "image": names[n], "text": f"Q{n}"} for n in range(2)]
    lines(folder / "llava_test.jsonl", rows)
    notes = [
        {"image": f"VizWiz_val_{n:08d}.jpg", "question": "Q?", "answers": [{"answer": "No"}] * 10}
        for n in range(2)
    ]
    whole(folder / "val.json", notes)
    [item, _] = list(TASKS.get("vizwiz_val").items(folder))
    assert item.question.startswith("Q?\nWhen the provided information is insufficient, respond ")
    assert item.question.endswith(f"'Unanswerable'.{SHORT}")
    half = answers_file(tmp_path / "h.jsonl", {0: "no."})
    with pytest.raises(UserError, match="1 questions have no answer"):
        submitted("vizwiz", tmp_path, half)
    full = answers_file(tmp_path / "f.jsonl", {0: "no.", 1: "yes"})
    assert scored("vizwiz", tmp_path, full)["scores"] == {"accuracy": 50}
    [(_, content)] = submitted("vizwiz", tmp_path, full).items()
    task, upload = TASKS.get("vizwiz"), tmp_path / "u.json"
    upload.write_bytes(content)
    task.check_submission(folder, upload)
    assert scored("vizwiz", tmp_path, upload)["scores"] == {"accuracy": 50}
    with pytest.raises(UserError, match="in the same order"):
        task.check_submission(folder, whole(upload, json.loads(content)[::-1]))
    with pytest.raises(UserError, match="record 0: needs the texts"):
        task.check_submission(folder, whole(upload, [{"image": "a"}]))
