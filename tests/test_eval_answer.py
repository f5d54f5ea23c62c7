"""``answer``: any question file in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_eval import lines
from fixtures_tiny import picture

from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main

ROWS: list[dict[str, Any]] = [
    {"question_id": 7, "image": "a.png", "text": "What?", "category": "conv"},
    {"question_id": 7, "image": "a.png", "text": "And why?"},
    {"question_id": "x", "text": "Hello?"},
    {"question_id": 8, "image": ["a.png", "b.png"], "text": "Compare."},
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, name in enumerate("ab"):
        picture(40 + 30 * seed, 30, seed=seed).save(folder / f"{name}.png")
    return folder


def answer(checkpoint: Path, questions: Path, images: Path | None, out: Path, *more: str) -> int:
    words = [str(checkpoint), "--question-file", str(questions), "--answers-file", str(out)]
    words += [] if images is None else ["--image-folder", str(images)]
    return main(["answer", *words, "--device", "cpu", "--max-new-tokens", "4", *more])


def test_answers_in_the_published_layout(
    tiny_checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, out = lines(tmp_path / "q.jsonl", ROWS), tmp_path / "new/a.jsonl"
    assert answer(tiny_checkpoint, questions, images, out) == 0
    assert f"{out}: 4 of 4 questions answered" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["question_id"] for row in rows] == [7, 7, "x", 8]
    assert [row["prompt"] for row in rows] == [row["text"] for row in ROWS]
    assert list(rows[0]) == "question_id prompt text answer_id model_id metadata".split()
    assert rows[0]["model_id"] == tiny_checkpoint.name
    written = out.read_bytes()

    # A run that was killed goes on with what is missing, and writes the same.
    out.unlink()
    log = out.with_name("a.jsonl.work") / "log.rank0.jsonl"
    log.write_bytes(log.read_bytes().split(b"\n")[0] + b"\n" + b'{"id": "cut')
    assert answer(tiny_checkpoint, questions, images, out, "--batch-size", "1") == 0
    assert "going on, 3 of 4 items to do" in capsys.readouterr().err
    assert out.read_bytes() == written
    with pytest.raises(UserError, match=r"beams was 1, is 2"):
        answer(tiny_checkpoint, questions, images, out, "--num_beams", "2")
    assert out.read_bytes() == written
    assert answer(tiny_checkpoint, questions, images, out, "--overwrite", "--limit", "1") == 0
    assert "1 of 4 questions answered" in capsys.readouterr().out
    assert out.read_text("utf-8").count("\n") == 1


def test_a_question_that_fails_is_named(
    tiny_checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "b.png").write_bytes(b"no picture")
    questions, out = lines(tmp_path / "q.jsonl", ROWS), tmp_path / "a.jsonl"
    assert answer(tiny_checkpoint, questions, images, out) == 1
    told = capsys.readouterr()
    assert "failed: 8: image" in told.err and "3 of 4 questions answered" in told.out
    found = [json.loads(line)["question_id"] for line in out.read_text("utf-8").splitlines()]
    assert found == [7, 7, "x"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": None, "text": "?"}, "record 0: question_id must be"),
        ({"question_id": True, "text": "?"}, "record 0: question_id must be"),
        ({"question_id": [1], "text": "?"}, "record 0: question_id must be"),
        ({"question_id": 1, "text": 5}, "record 0: question_id must be"),
        ({"question_id": 1}, "record 0: has no field 'text'"),
        ({"question_id": 1, "text": "?", "image": "../q.jsonl"}, "must stay inside"),
        ({"question_id": 1, "text": "?", "image": 5}, "must stay inside"),
    ],
)
def test_damaged_questions(
    tiny_checkpoint: Path, images: Path, tmp_path: Path, row: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        questions = lines(tmp_path / "q.jsonl", [row])
        answer(tiny_checkpoint, questions, images, tmp_path / "a.jsonl")


def test_what_is_missing_is_told(tiny_checkpoint: Path, images: Path, tmp_path: Path) -> None:
    questions, out = lines(tmp_path / "q.jsonl", ROWS), tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="name their folder with --image-folder"):
        answer(tiny_checkpoint, questions, None, out)
    with pytest.raises(UserError, match=r"no\.jsonl is missing; name it with --question-file"):
        answer(tiny_checkpoint, tmp_path / "no.jsonl", images, out)
    with pytest.raises(UserError, match="is a folder: name a file"):
        answer(tiny_checkpoint, questions, images, tmp_path)
    with pytest.raises(UserError, match="--limit 0"):
        answer(tiny_checkpoint, questions, images, out, "--limit", "0")
