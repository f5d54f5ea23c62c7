"""Answers on disk: logs, settings, scores; what is damaged is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_uhd.errors import UserError
from llava_uhd.eval.answers import (
    Answer,
    AnswerLog,
    check_settings,
    read_answers,
    write_json,
    write_lines,
)
from llava_uhd.eval.results import collect


def put(folder: Path, settings: dict, *ids: int, rank: int = 0) -> Path:
    with AnswerLog(folder, rank, settings) as log:
        log.append([Answer(each, "p", f"text {each}", 1, 2) for each in ids], 0.1)
    return log.path


def test_log_survives_a_cut_line(tmp_path: Path) -> None:
    path = put(tmp_path, {"a": 1}, 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    assert list(read_answers(tmp_path, {"a": 1})) == [1]
    put(tmp_path, {"a": 1}, 2, 3)
    found = read_answers(tmp_path, {"a": 1})
    assert [found[each].text for each in (1, 2, 3)] == ["text 1", "text 2", "text 3"]


def test_log_refuses(tmp_path: Path) -> None:
    path = put(tmp_path, {"a": 1}, 1, 2)
    with pytest.raises(UserError, match="other settings"):
        read_answers(tmp_path, {"a": 2})
    put(tmp_path, {"a": 1}, 2, rank=1)
    with pytest.raises(UserError, match=r"log\.rank1\.jsonl: 2 was answered twice"):
        read_answers(tmp_path, {"a": 1})
    path.write_bytes(b"{broken\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"log\.rank0\.jsonl, line 1 is not an answer"):
        read_answers(tmp_path, {"a": 1})


@pytest.mark.parametrize(
    ("field", "value"), [("text", 5), ("text", None), ("id", True), ("new_tokens", "3")]
)
def test_damaged_answers_are_told(tmp_path: Path, field: str, value: Any) -> None:
    path = put(tmp_path, {"a": 1}, 1)
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}) + "\n")
    with pytest.raises(UserError, match=rf"log\.rank0\.jsonl: .* is damaged: '{field}' is"):
        read_answers(tmp_path, {"a": 1})


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 5}', '{"settings": null}'])
def test_damaged_settings_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        check_settings(tmp_path, {"a": 1})


def test_damaged_scores_are_told(tmp_path: Path) -> None:
    known = {"task": "pope", "title": "x", "metric": "f1"}
    (tmp_path / "pope").mkdir()
    for text in ("{", "5", json.dumps({**known, "scores": 5}), json.dumps({"task": "pope"})):
        (tmp_path / "pope/scores.json").write_text(text)
        with pytest.raises(UserError, match=r"scores\.json is damaged"):
            collect(tmp_path)


def test_texts_that_are_no_unicode_are_written(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"text": "\ud800"})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"text": "?"}
    write_lines(tmp_path / "a.jsonl", [{"text": "\ud800"}])
    assert json.loads((tmp_path / "a.jsonl").read_text("utf-8")) == {"text": "?"}


def test_log_has_one_writer(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, 0, {}), pytest.raises(UserError, match="another evaluation"):
        AnswerLog(tmp_path, 0, {}).__enter__()


def test_foreign_settings_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "settings.json", {"settings": {"beams": 1, "size": (3, 4)}})
    check_settings(tmp_path, {"beams": 1, "size": (3, 4)})
    with pytest.raises(UserError, match=r"\(beams was 1, is 3\).*--overwrite"):
        check_settings(tmp_path, {"beams": 3, "size": (3, 4)})
    words = "beams was 1, is not set; compression.layer was not set, is 16"
    with pytest.raises(UserError, match=rf"\({words}\)"):
        check_settings(tmp_path, {"compression.layer": 16, "size": (3, 4)})
