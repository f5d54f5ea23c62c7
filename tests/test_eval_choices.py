"""Options: MMBench, SEED-Bench, Q-Bench."""

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
    make_mmbench,
    same,
    scored,
    submitted,
    whole,
)

from llava_uhd.errors import UserError
from llava_uhd.eval.tables import read_table
from llava_uhd.eval.task import Scored
from llava_uhd.eval.tasks import TASKS
from llava_uhd.eval.tasks.mmbench import is_empty
from llava_uhd.eval.tasks.qbench import is_right
from llava_uhd.eval.tasks.question_file import LETTER
from llava_uhd.eval.workbook import column_name, workbook
from llava_uhd.images.pixels import open_image

TABLES = {"mmbench": "mmbench_dev_20230712", "mmbench_cn": "mmbench_dev_cn_20231003"}
SHORT_NAMES = {
    "AR": "attribute_reasoning",
    "CP": "coarse_perception",
    "LR": "logic_reasoning",
}


@pytest.mark.parametrize("task", TABLES)
@pytest.mark.parametrize("kind", ["answers", "upload"])
@pytest.mark.parametrize("compatible", [False, True])
def test_mmbench_is_the_published_one(golden: Path, task: str, kind: str, compatible: bool) -> None:
    folder, table = golden / "evaluation" / task, TABLES[task]
    files = {"answers": f"answers/{table}/toy-model.jsonl"}
    files["upload"] = f"answers_upload/{table}/toy-model.xlsx"
    expected = golden_scores(folder)
    found = scored(task, folder.parent, folder / files[kind], compatible)
    for name in ("circular_accuracy", "vanilla_first_round_accuracy"):
        assert found["scores"][name] == pytest.approx(expected[name], abs=1e-9)
    assert found["scores"]["accuracy"] == pytest.approx(100 * expected["circular_accuracy"])
    rows = {row["index"]: row for row in expected["per_row"]}
    items = {row["id"]: row for row in found["items"]}
    assert set(items) == set(rows)
    for key, row in rows.items():
        assert items[key]["parsed"] == row["extracted"] and items[key]["reference"] == row["gold"]
        assert items[key]["score"] == float(row["extracted"] == row["gold"])
    for name, report in (
        ("circular_accuracy", expected["circular_report"]),
        ("vanilla_first_round_accuracy", expected["vanilla_report"]),
    ):
        parts = {**found["breakdown"]["l2-category"], **found["breakdown"]["category"]}
        values = {key: table[name] for key, table in parts.items()}
        wanted = {
            SHORT_NAMES.get(key, key): value[0]
            for key, value in report.items()
            if key not in ("split", "Overall")
        }
        assert values == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("task", TABLES)
def test_mmbench_uploads_are_the_published_ones(golden: Path, task: str, tmp_path: Path) -> None:
    folder, table = golden / "evaluation" / task, TABLES[task]
    answers = folder / f"answers/{table}/toy-model.jsonl"
    [(name, content)] = submitted(task, folder.parent, answers).items()
    assert name == f"{table}.xlsx"
    upload = tmp_path / name
    upload.write_bytes(content)
    TASKS.get(task).check_submission(folder, upload)
    published = folder / f"answers_upload/{table}/toy-model.xlsx"
    rows = read_table(upload)
    assert rows == read_table(published) and list(rows[0]) == list(read_table(published)[0])
    wanted = json.loads(published.with_name("toy-model_as_json.json").read_text("utf-8"))
    assert list(rows[0]) == wanted["columns"]
    assert [list(row.values()) for row in rows] == wanted["rows"]


def test_mmbench_on_small_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = TASKS.get("mmbench")
    folder = tmp_path / "mmbench"
    message = task.missing(folder)
    assert message and str(folder / "mmbench_dev_20230712.tsv") in message
    assert "MMBench repository" in message
    make_mmbench(tmp_path, "mmbench", "mmbench_dev_20230712")
    with caplog.at_level(logging.WARNING):
        items = task.load(folder)
    assert "in 1 questions an option such as 'None' ends the list" in caplog.text
    assert [item.id for item in items] == [3, 1_000_003]
    assert items[0].question == f"What?\nA. red\nB. a cup{LETTER}"
    assert items[1].question == f"Look.\nWhat?\nA. a cup\nB. red{LETTER}"
    # The second copy names the row that holds the picture.
    assert [open_image(item.images[0]).size for item in items] == [(20, 12)] * 2
    row = task.published_row(items[1], "A", "m")
    assert list(row) == [
        "question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id",
        "model_id", "metadata",
    ]  # fmt: skip
    assert row["prompt"] == "Look.\nWhat?\nA. a cup\nB. red"
    assert (row["options"], row["option_char"]) == (["a cup", "red"], ["A", "B"])
    both = answers_file(tmp_path / "a.jsonl", {3: "B. a cup", 1_000_003: "it is a cup"})
    assert scored("mmbench", tmp_path, both)["scores"]["accuracy"] == 100
    one = answers_file(tmp_path / "b.jsonl", {3: "B"})
    found = scored("mmbench", tmp_path, one)
    assert found["scores"] == {
        "accuracy": 0, "circular_accuracy": 0, "vanilla_first_round_accuracy": 1
    }  # fmt: skip
    assert found["missing"] == [1_000_003]
    upload = tmp_path / "u.xlsx"
    upload.write_bytes(submitted("mmbench", tmp_path, one)["mmbench_dev_20230712.xlsx"])
    assert read_table(upload)[0]["C"] is None and read_table(upload)[0]["D"] == "blue"
    with pytest.raises(UserError, match="1 rows have no prediction"):
        task.check_submission(folder, upload)
    upload.write_bytes(workbook(["index", "prediction"], [[3, "A"]]))
    with pytest.raises(UserError, match="its columns must be index, question, A, B, C, D, pred"):
        task.check_submission(folder, upload)


def test_mmbench_cn_has_two_places(tmp_path: Path) -> None:
    task = TASKS.get("mmbench_cn")
    assert task.root(tmp_path) == tmp_path / "mmbench_cn"
    make_mmbench(tmp_path, "mmbench", "mmbench_dev_cn_20231003")
    assert task.root(tmp_path) == tmp_path / "mmbench"
    assert task.load(task.root(tmp_path))[0].question.endswith("\n请直接回答选项字母。")
    make_mmbench(tmp_path, "mmbench_cn", "mmbench_dev_cn_20231003")
    assert task.root(tmp_path) == tmp_path / "mmbench_cn"


def test_empty_cells() -> None:
    assert all(map(is_empty, [None, "", "nan", "NONE", "None", "NA", "n/a"]))
    assert not any(map(is_empty, ["0", 0, "na", "none of these"]))


def test_workbooks(tmp_path: Path) -> None:
    rows: list[list[Any]] = [[1, "a & <b>\n é \t", None], [2.5, "", "\x07x\ud800 "]]
    content = workbook(["index", "text", "more"], rows)
    assert content == workbook(["index", "text", "more"], rows)
    file = tmp_path / "a.xlsx"
    file.write_bytes(content)
    assert read_table(file) == [
        {"index": 1, "text": "a & <b>\n é \t", "more": None},
        {"index": 2.5, "text": None, "more": "x "},
    ]
    assert [column_name(place) for place in (0, 25, 26, 701, 702)] == ["A", "Z", "AA", "ZZ", "AAA"]


@pytest.mark.parametrize("compatible", [False, True])
def test_seed_bench_is_the_published_one(golden: Path, compatible: bool) -> None:
    folder = golden / "evaluation/seed_bench"
    answers, expected = folder / "answers/toy-model/merge.jsonl", golden_scores(folder)
    found = scored("seed", folder.parent, answers, compatible)
    for name in ("total_accuracy", "image_accuracy", "video_accuracy"):
        assert found["scores"][name] == pytest.approx(expected[name], abs=1e-9)
    types = {name: row["accuracy"] for name, row in found["breakdown"]["type"].items()}
    assert {name: round(value, 2) for name, value in types.items()} == {
        name: value for name, value in expected["by_type"].items() if "ccuracy" not in name
    }
    rows = expected["per_item"]
    items = {row["id"]: row["score"] for row in found["items"]}
    same([items[row["question_id"]] for row in rows], [float(row["correct"]) for row in rows])
    images = scored("seed_bench_img", folder.parent, answers)
    assert images["scores"] == {"image_accuracy": found["scores"]["image_accuracy"]}
    upload = folder / "answers_upload/toy-model.jsonl"
    assert submitted("seed", folder.parent, answers) == {"seed_bench.jsonl": upload.read_bytes()}
    TASKS.get("seed_bench").check_submission(folder, upload)


def make_seed(root: Path) -> Path:
    folder = root / "seed_bench"
    questions = [
        {"question_id": "v0", "data_type": "video", "question_type_id": 10, "answer": "A"},
        {"question_id": "7", "data_type": "image", "question_type_id": 1, "answer": "B"},
        {"question_id": "8", "data_type": "image", "question_type_id": 2, "answer": "C"},
    ]
    types = {"Scene": 1, "Identity": 2, "Action": 10}
    rows = [{**row, "question": "Q?"} for row in questions]
    whole(folder / "SEED-Bench.json", {"question_type": types, "questions": rows})
    asked = [("v0", "SEED-Bench-video-image/10_v0.png"), (7, "SEED-Bench-image/a"), (8, "b")]
    lines(
        folder / "llava-seed-bench.jsonl",
        [{"question_id": key, "image": image, "text": "Q?"} for key, image in asked],
    )
    return folder


def test_seed_bench_on_small_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_seed(tmp_path)
    task, images = TASKS.get("seed_bench"), TASKS.get("seed_bench_img")
    message = task.missing(folder)
    assert message and str(folder / "SEED-Bench-image") in message and "DATASET.md" in message
    (folder / "SEED-Bench-image").mkdir()
    assert images.missing(folder) is None
    items = images.load(folder)
    assert [(item.id, item.question_id, item.reference) for item in items] == [
        (7, 7, "B"), (8, 8, "C"),
    ]  # fmt: skip
    assert items[0].images == (folder / "SEED-Bench-image/a",)
    rows = [{"question_id": key, "text": text} for key, text in ((7, "A"), ("v0", "A."), (7, "B"))]
    file = lines(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        found = scored("seed_bench", tmp_path, file)
    assert "1 questions are answered again: the last holds" in caplog.text
    assert found["scores"] == pytest.approx(
        {"total_accuracy": 100 / 3, "image_accuracy": 50, "video_accuracy": 0}
    )
    # No right answer of a type is 0, not an error; what is missing is named.
    assert found["breakdown"]["type"]["Action"] == {"accuracy": 0, "items": 1}
    assert found["missing"] == ["8"] or found["missing"] == [8]
    assert scored("seed_bench_img", tmp_path, file)["scores"] == {"image_accuracy": 50}
    upload = tmp_path / "u.jsonl"
    upload.write_bytes(submitted("seed_bench", tmp_path, file)["seed_bench.jsonl"])
    assert json.loads(upload.read_text().splitlines()[1]) == {"question_id": "7", "prediction": "B"}
    with pytest.raises(UserError, match="1 questions are missing and 0 are foreign"):
        task.check_submission(folder, upload)


def test_seed_bench_without_videos(tmp_path: Path) -> None:
    """The question file of LLaVolta has images only."""
    folder = make_seed(tmp_path)
    (folder / "SEED-Bench-image").mkdir()
    task = TASKS.get("seed_bench")
    rows = (folder / "llava-seed-bench.jsonl").read_text().splitlines(keepends=True)
    (folder / "llava-seed-bench.jsonl").unlink()
    (folder / "llava-seed-bench-img.jsonl").write_text("".join(rows[1:]))
    assert task.missing(folder) is None
    items = task.load(folder)
    assert [item.id for item in items] == [7, 8]
    done = [Scored(item, "B", "B", task.score(item, "B")) for item in items]
    assert task.aggregate(done) == {"image_accuracy": 50}


def make_qbench(root: Path) -> Path:
    folder = root / "qbench"
    row = {"question": "How?", "candidates": ["bad", "good"], "type": "0", "concern": "1"}
    dev = [{"img_path": f"{n}.jpg", **row, "correct_ans": "good"} for n in "abcd"]
    whole(folder / "llvisionqa_dev.json", dev)
    whole(folder / "llvisionqa_test.json", [{"img_path": "t.jpg", **row}])
    whole(folder / "质衡-问答-验证集.json", dev[:1])
    whole(folder / "质衡-问答-测试集.json", [{"img_path": "t.jpg", **row}])
    (folder / "images_llvisionqa").mkdir()
    return folder


def test_qbench(tmp_path: Path) -> None:
    task = TASKS.get("qbench")
    message = task.missing(tmp_path / "qbench")
    assert message and "llvisionqa_dev.json" in message and "Q-Bench repository" in message
    folder = make_qbench(tmp_path)
    items = task.load(folder)
    assert items[0].question == (
        "How?\nChoose between one of the options as follows:\nA. bad\nB. good\n"
    )
    assert items[0].images == (folder / "images_llvisionqa/a.jpg",)
    chinese = TASKS.get("qbench_zh").load(folder)[0].question
    assert chinese == "How?\\在下列选项中选择一个:\nA. bad\nB. good\n"
    texts = ["B. good", "", "good it is", "A"]
    rows = [task.published_row(item, text, "m") for item, text in zip(items, texts)]
    assert rows[0]["response"] == "B. good" and rows[0]["correct_ans"] == "good"
    file = lines(tmp_path / "a.jsonl", rows)
    found = scored("qbench", tmp_path, file)
    assert [row["score"] for row in found["items"]] == [1, 0, 1, 0]
    assert found["scores"] == {"accuracy": 50}
    # As the published program writes it: nothing between the objects.
    file.write_text("".join(json.dumps(row) for row in rows))
    assert scored("qbench", tmp_path, file) == {**found}
    file.write_text(json.dumps(rows[0]) + "{")
    with pytest.raises(UserError, match="is no JSON at character"):
        scored("qbench", tmp_path, file)


def test_qbench_test_split_is_sent_in(tmp_path: Path) -> None:
    folder = make_qbench(tmp_path)
    for name, upload in (
        ("qbench_test", "llvisionqa_test_answers.jsonl"),
        ("qbench_zh_test", "llvisionqa_zh_test_answers.jsonl"),
    ):
        task = TASKS.get(name)
        items = task.load(folder)
        [(file, content)] = task.submission(folder, items, {"t.jpg": "B"})
        assert file == upload and json.loads(content)["response"] == "B"
        (tmp_path / file).write_bytes(content)
        task.check_submission(folder, tmp_path / file)
        with pytest.raises(UserError, match="no score without its server"):
            scored(name, tmp_path, tmp_path / file)
        with pytest.raises(UserError, match="are not those of"):
            task.check_submission(
                folder, lines(tmp_path / "x", [{"img_path": "z", "response": ""}])
            )


@pytest.mark.parametrize(
    ("response", "right"),
    [("B", True), ("Bad", True), ("good.", False), ("good", True), ("", False), ("Z", False)],
)
def test_qbench_answers(response: str, right: bool) -> None:
    assert is_right(response, ["bad", "good"], "good") is right
