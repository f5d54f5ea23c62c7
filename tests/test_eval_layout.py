"""Runs on data in the published layouts: answers and uploads beside the results, missing data."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from fixtures_eval import answers_file, lines, make_mmbench, make_textvqa, scored, whole
from fixtures_tiny import picture
from rich.console import Console

from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.check_data import check_data
from llava_uhd.eval.choose import choose_tasks
from llava_uhd.eval.tasks import TASKS
from llava_uhd.eval.tasks.question_file import SHORT


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TextVQA, VizWiz, MMBench and LLaVA-Bench, a few questions each."""
    root = tmp_path_factory.mktemp("playground")
    folder = make_textvqa(root)
    (folder / "train_images").mkdir()
    for number, name in enumerate("ab"):
        picture(40 + number, 30, seed=number).save(folder / f"train_images/{name}.jpg")
    make_mmbench(root, "mmbench", "mmbench_dev_20230712")
    for place, images, file in (
        ("vizwiz", "test", "llava_test.jsonl"),
        ("llava-bench-in-the-wild", "images", "questions.jsonl"),
    ):
        rows = [
            {"question_id": n, "image": f"{n}.png", "text": "Q?", "category": "conv"}
            for n in range(2)
        ]
        lines(root / place / file, rows)
        (root / place / images).mkdir()
        for n in range(2):
            picture(30, 20 + n, seed=n).save(root / place / images / f"{n}.png")
    lines(root / "llava-bench-in-the-wild/context.jsonl", [])
    lines(root / "llava-bench-in-the-wild/answers_gpt4.jsonl", [])
    return root


def run(checkpoint: Path, data: Path, out: Path, *words: str) -> int:
    places = [str(checkpoint), "--data-root", str(data), "--output", str(out)]
    small = ["--max-new-tokens", "6", "--device", "cpu", "--dtype", "float32"]
    return main(["run", *places, *small, *words])


def test_a_run_writes_the_published_layout(
    tiny_checkpoint: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "eval"
    with caplog.at_level(logging.WARNING):
        assert run(tiny_checkpoint, data, out) == 0
    names = {"textvqa", "mmbench", "vizwiz", "llava_bench"}
    assert {path.name for path in out.iterdir() if path.is_dir()} == names
    for name in names:
        answers = (out / name / "answers.jsonl").read_text("utf-8").splitlines()
        published = (out / name / "published/answers.jsonl").read_text("utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in answers]
        assert [json.loads(line)["text"] for line in published] == texts
        assert {json.loads(line)["model_id"] for line in published} == {"model"}
        scores = json.loads((out / name / "scores.json").read_text("utf-8"))
        assert scores["items"] == len(answers) and not scores["problem"]
    # What a published program would score has the score of the run.
    for name in ("textvqa", "mmbench"):
        found = scored(name, data, out / name / "published/answers.jsonl")
        scores = json.loads((out / name / "scores.json").read_text("utf-8"))
        assert found["scores"] == scores["scores"]
    upload = out / "vizwiz/submission/vizwiz.json"
    TASKS.get("vizwiz").check_submission(data / "vizwiz", upload)
    assert (out / "mmbench/submission/mmbench_dev_20230712.xlsx").is_file()
    assert not (out / "textvqa/submission").exists()
    table = (out / "results.md").read_text("utf-8")
    assert "no score here: upload submission/vizwiz.json" in table
    assert "no score here: a judge reads published/answers.jsonl" in table
    shutil.rmtree(out / "vizwiz/submission")
    assert main(["score", str(out)]) == 0
    assert upload.is_file()


def test_a_trial_is_not_for_upload(tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval"
    assert run(tiny_checkpoint, data, out, "--tasks", "vizwiz", "--limit", "1") == 0
    assert not (out / "vizwiz/submission").exists()
    assert len((out / "vizwiz/published/answers.jsonl").read_text().splitlines()) == 1
    assert run(tiny_checkpoint, data, out, "--tasks", "vizwiz") == 0
    assert (out / "vizwiz/submission/vizwiz.json").is_file()


def test_a_run_asks_nothing_twice(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = choose_tasks(None, data, Console())
    assert {task.name for task in tasks} == {"textvqa", "mmbench", "vizwiz", "llava_bench"}
    out = capsys.readouterr().out
    assert "textvqa_no_ocr asks what textvqa asks" in out
    assert [task.name for task in choose_tasks("textvqa_no_ocr", data, Console())] == [
        "textvqa_no_ocr"
    ]


def test_check_data(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    assert main(["check-data", "--data-root", str(data), "--output", str(out)]) == 0
    text = capsys.readouterr().out
    for name in TASKS.names():
        assert f"{name} (" in text
    assert "textvqa (TextVQA val (OCR tokens in the prompt)): 3 of 5000 questions, 2 of 2" in text
    assert f"{data / 'gqa/llava_gqa_testdev_balanced.jsonl'}: MISSING" in text
    assert TASKS.get("gqa").source in text
    assert f"5 of {len(TASKS.names())} tasks can be run" in text
    reports = {row["task"]: row for row in json.loads(out.read_text("utf-8"))}
    assert reports["textvqa"]["complete"] and len(reports["textvqa"]["files"][0]["digest"]) == 16
    assert not reports["gqa"]["complete"] and reports["gqa"]["state"].startswith("missing: ")
    # Whoever names a task wants to hear of it.
    assert main(["check-data", "--data-root", str(data), "--tasks", "gqa"]) == 1
    assert main(["check-data", "--data-root", str(data), "--tasks", "textvqa,vizwiz"]) == 0


def test_check_data_finds_gaps(data: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "vizwiz/test/1.png").unlink()
    report = check_data(TASKS.get("vizwiz"), root)
    assert (report.questions, report.media, report.absent) == (
        2,
        2,
        [str(root / "vizwiz/test/1.png")],
    )
    assert report.state.startswith("1 of 2 images are missing") and not report.complete
    shutil.rmtree(root / "vizwiz/test")
    report = check_data(TASKS.get("vizwiz"), root)
    assert report.questions == 2 and report.missing == [str(root / "vizwiz/test")]
    (root / "textvqa/llava_textvqa_val_v051_ocr.jsonl").write_text("{")
    report = check_data(TASKS.get("textvqa"), root)
    assert "is not valid JSON" in report.state and report.questions is None


def test_check_submission(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"image": f"{n}.png", "answer": "x"} for n in range(2)]
    words = ["check-submission", "--task", "vizwiz", "--data-root", str(data)]
    assert main([*words, str(whole(tmp_path / "u.json", rows))]) == 0
    assert "a sound submission of VizWiz test" in capsys.readouterr().out
    with pytest.raises(UserError, match="in the same order"):
        main([*words, str(whole(tmp_path / "u.json", rows[:1]))])
    with pytest.raises(UserError, match="does not exist"):
        main([*words, str(tmp_path / "no.json")])
    with pytest.raises(UserError, match="textvqa has no file to upload"):
        words[2] = "textvqa"
        main([*words, str(tmp_path / "u.json")])


def test_uploads_of_answers_files(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = answers_file(tmp_path / "a.jsonl", {0: "The Cat.", 1: "no"})
    words = ["submission", "--task", "vizwiz", "--data-root", str(data), "--output"]
    out = tmp_path / "new"
    assert main([*words, str(out), "--answers", str(answers)]) == 0
    assert json.loads((out / "vizwiz.json").read_text()) == [
        {"image": "0.png", "answer": "cat"},
        {"image": "1.png", "answer": "no"},
    ]
    assert "vizwiz.json" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 questions have no answer"):
        half = answers_file(tmp_path / "h.jsonl", {0: "x"})
        main([*words, str(out), "--answers", str(half)])
    with pytest.raises(UserError, match="llava_bench has no file to upload"):
        words[2] = "llava_bench"
        main([*words, str(out), "--answers", str(answers)])


def test_the_published_mode_has_a_switch(data: Path, tmp_path: Path) -> None:
    answers = answers_file(tmp_path / "a.jsonl", {3: "B", 1_000_003: "A"})
    words = ["--task", "mmbench", "--data-root", str(data), "--answers", str(answers)]
    for more, mode in (([], "default"), (["--compatible"], "published")):
        assert main(["score", *words, "--output", str(tmp_path / "o.json"), *more]) == 0
        found = json.loads((tmp_path / "o.json").read_text())
        assert found["mode"] == mode and found["scores"]["accuracy"] == 100


def test_every_task_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMUData", str(tmp_path / "kit"))
    for name in TASKS.names():
        task = TASKS.get(name)
        root = task.root(tmp_path)
        message = task.missing(root)
        assert message is not None
        assert message.startswith(f"{name}: {task.files(root)[0]}") and task.source in message
        with pytest.raises(UserError, match="is missing"):
            task.load(root)


def test_score_needs_its_words(data: Path, tmp_path: Path) -> None:
    for words, message in (
        ([], "name a results folder, or --task"),
        (["--task", "textvqa"], "needs --answers"),
        (["--task", "textvqa", "--answers", str(tmp_path / "no")], "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            main(["score", *words, "--data-root", str(data)])


def test_files_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    words = ["score", "--task", "textvqa", "--answers", str(file), "--data-root", str(data)]
    lines(file, [{"question_id": "a", "prompt": f"Who?{SHORT}", "text": "x"}])
    with pytest.raises(UserError, match="is a folder: name a file"):
        main([*words, "--output", str(tmp_path)])
    with pytest.raises(UserError, match="cannot be made"):
        main([*words, "--output", str(file / "out.json")])
    assert main([*words, "--output", str(tmp_path / "out.json")]) == 0
    # What the system refuses is one line, too.
    with pytest.raises(UserError, match=r"x{300}.*: File name too long"):
        main([*words, "--output", str(tmp_path / ("x" * 300))])
