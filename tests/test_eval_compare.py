"""Results side by side: same items only, exact tests, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_results import HOSTILE, make_rows, put_problem, put_settings, put_task

from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.answers import write_json
from llava_uhd.eval.compare import as_markdown, compare, read_results
from llava_uhd.eval.statistics import mcnemar, paired

FIRST = [1, 1, 0, 0, 1, 0, 1, 1, 0, 1]
SECOND = [1, 1, 1, 1, 1, 0, 0, 1, 1, 1]


def rows(values: list[float], metric: str = "accuracy", units: list[int] | None = None) -> Any:
    """Items with these values."""
    units = units or list(range(len(values)))
    return [
        {"id": n, "unit": unit, "question": "?", "answer": HOSTILE, "metrics": {metric: value}}
        for n, (value, unit) in enumerate(zip(values, units))
    ]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three models; the second and the third have the same answers."""
    found = [tmp_path / name / "eval" for name in ("old", "new", "same")]
    for folder, values in zip(found, (FIRST, SECOND, SECOND)):
        put_task(folder, "gqa", rows(values))
        put_task(folder, "docvqa", rows([0.6 * v + 0.05 * n for n, v in enumerate(values)], "anls"))
        put_task(folder, "synthetic", rows(values, "sign_exact"), percent=False)
    return found


def test_scores_and_tests(folders: list[Path]) -> None:
    found = read_results(folders)
    assert [each.name for each in found] == ["old", "new", "same"]
    lines = {line.task: line for line in compare(found)}
    gqa = lines["gqa"]
    assert gqa.values == pytest.approx([60.0, 80.0, 80.0]) and gqa.main and not gqa.note
    test = gqa.tests[0]
    assert test is not None and test == gqa.tests[1]
    assert (test.test, test.gained, test.lost, test.items) == ("McNemar", 3, 1, 10)
    assert test.p == pytest.approx(mcnemar(3, 1)) == pytest.approx(0.625)
    assert gqa.unit * test.difference == pytest.approx(20)
    soft = lines["docvqa"].tests[0]
    assert soft is not None and soft.test == "bootstrap"
    values = [[row["metrics"]["anls"] for row in each.items("docvqa").values()] for each in found]
    assert soft == paired(values[0], values[1], range(10))
    assert lines["synthetic"].unit == 1 and lines["synthetic"].values[0] == pytest.approx(0.6)
    (same,) = compare(read_results(folders[1:]), ["gqa"])
    assert same.tests[0] is not None and same.tests[0].p == 1


def test_command(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders[2] / "gqa/scores.json").unlink()
    words = ["compare", *map(str, folders), "--output", str(tmp_path / "made")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "left out, gqa: only in old, new" in shown and "docvqa" in shown
    text = (tmp_path / "made/compare.md").read_text("utf-8")
    assert "left out, gqa" in text and "fixed seed" in text and "DocVQA val | anls (main)" in text
    with (tmp_path / "made/compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["task"], line["second"]) for line in lines] == [
        ("docvqa", "new"),
        ("docvqa", "same"),
        ("synthetic", "new"),
        ("synthetic", "same"),
    ]
    assert float(lines[2]["difference"]) == pytest.approx(0.2)
    assert float(lines[2]["low"]) <= 0.2 <= float(lines[2]["high"])
    assert (lines[2]["better"], lines[2]["worse"], lines[2]["test"]) == ("3", "1", "McNemar")
    assert float(lines[0]["p"]) == float(lines[1]["p"])  # a fixed seed


def test_failed_tasks_are_seen(folders: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    put_problem(folders[1], "docvqa")
    found = read_results(folders[:2])
    (line,) = compare(found, ["docvqa"])
    assert line.values[0] is not None and line.values[1] is None and line.tests == [None]
    assert line.note.startswith("new: 1 of 2 items have no answer")
    table = [row for row in as_markdown(found, [line]).split("\n") if row.startswith("| DocVQA")]
    assert len(table) == 1 and "\\|" in table[0]
    assert main(["compare", *map(str, folders[:2])]) == 1
    assert "no answer" in capsys.readouterr().out.replace("\n", " ")


def test_tasks_of_servers_are_no_failure(folders: list[Path]) -> None:
    for folder in folders[:2]:
        put_problem(folder, "vizwiz")
        scores = json.loads((folder / "vizwiz/scores.json").read_text())
        scores |= {"problem": "", "remark": "upload it"}
        write_json(folder / "vizwiz/scores.json", scores)
    assert main(["compare", *map(str, folders[:2])]) == 0
    (line,) = compare(read_results(folders[:2]), ["vizwiz"])
    assert line.note == "old: upload it; new: upload it" and line.values == [None, None]


def test_copies_are_one_question(tmp_path: Path) -> None:
    for name, values in (("a", FIRST), ("b", SECOND)):
        put_task(tmp_path / name, "mmbench", rows(values, "copy", [n // 2 for n in range(10)]))
        scores = json.loads((tmp_path / name / "mmbench/scores.json").read_text())
        scores["scores"] = {"accuracy": 40.0 if name == "a" else 60.0}
        write_json(tmp_path / name / "mmbench/scores.json", scores)
    lines = {line.metric: line for line in compare(read_results([tmp_path / "a", tmp_path / "b"]))}
    assert lines["accuracy"].main and lines["accuracy"].tests == [None]
    assert lines["accuracy"].note == "no mean of items: no test"
    copies = lines["copy"]
    assert copies.values == [0.6, 0.8] and copies.note == "mean of items"
    test = copies.tests[0]
    assert test is not None and test.test == "bootstrap"
    assert (test.items, test.gained, test.lost) == (10, 2, 1)  # of questions


def test_same_items_only(folders: list[Path]) -> None:
    put_task(folders[1], "gqa", rows(SECOND)[:6], of=10)
    (line,) = compare(read_results(folders[:2]), ["gqa"])
    assert line.note == "6 items that all have; scores are their means; mean of items"
    assert line.values == pytest.approx([0.5, 5 / 6])
    test = line.tests[0]
    assert test is not None and (test.items, test.gained, test.lost) == (6, 2, 0)
    put_task(folders[0], "gqa", rows(FIRST)[:6], of=10)
    (line,) = compare(read_results(folders[:2]), ["gqa"])
    assert line.note == "first 6 of 10 only" and line.values[0] == pytest.approx(50)


def test_zero_beside_a_percentage(tmp_path: Path) -> None:
    """A score of 0 does not tell its unit; the other one does."""
    for name, values in (("a", [0.0] * 10), ("b", SECOND)):
        put_task(tmp_path / name, "gqa", rows(values))
    (line,) = compare(read_results([tmp_path / "a", tmp_path / "b"]))
    assert line.unit == 100 and line.tests[0] is not None
    assert line.tests[0].p == pytest.approx(2 / 2**8)


def test_refusals(folders: list[Path], tmp_path: Path) -> None:
    def refuses(message: str, *words: object) -> None:
        with pytest.raises(UserError, match=message) as caught:
            main(["compare", *map(str, words)])
        assert "\n" not in str(caught.value)

    refuses("two or more different", folders[0])
    refuses("two or more different", folders[0], folders[0] / "../eval")
    refuses("holds no results", folders[0], tmp_path)
    refuses("has no results of pope", folders[0], folders[1], "--tasks", "pope")
    refuses("task", folders[0], folders[1], "--tasks", "nonsense")
    put_settings(folders[1] / "gqa", {"questions": "other", "task_version": 1})
    refuses("gqa: .*cannot be compared: the questions or pictures differ", *folders[:2])
    put_settings(folders[1] / "gqa", {"questions": "abc", "task_version": 2})
    refuses("the task has changed between them", *folders[:2])
    put_task(folders[1], "gqa", [{**row, "id": f"x{row['id']}"} for row in rows(SECOND)])
    refuses("gqa: the folders share no item", *folders[:2])
    with (folders[1] / "gqa/items.jsonl").open("a") as file:
        file.write('{"id": "x1", "metrics": {"accuracy": 1}}\n')
    refuses("an item is there twice", *folders[:2])
    (folders[1] / "gqa/items.jsonl").unlink()
    refuses("items.jsonl does not exist", *folders[:2])
    (folders[1] / "gqa/settings.json").write_text("{")
    refuses("settings.json cannot be read", *folders[:2])
    (folders[1] / "gqa/scores.json").write_text("[]")
    refuses("scores.json is damaged", *folders[:2])
    for name in ("gqa", "docvqa", "synthetic"):
        (folders[2] / name / "scores.json").unlink()
    put_task(folders[2], "pope", make_rows("pope", 4, 0.5, 1, tmp_path / "images"))
    refuses("no task is in all of the folders", folders[0], folders[2])
