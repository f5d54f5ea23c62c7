"""Benchmarks in their published layouts through ``sh eval.sh``: whole, shared, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures_eval import lines, scored, whole
from fixtures_model import ROOT, environment
from fixtures_tiny import picture

from llava_uhd.eval.tasks.question_file import SHORT

TASKS = ("mme", "textvqa", "vizwiz")
SIZE = {"mme": 24, "textvqa": 20, "vizwiz": 16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MME in both layouts of its folders, TextVQA, and VizWiz, which is uploaded."""
    root = tmp_path_factory.mktemp("playground")
    release, rows = root / "MME/MME_Benchmark_release_version", []
    for images, texts in (
        ("landmark/images", "landmark/questions_answers_YN"),
        ("color", "color"),
    ):
        for folder in (images, texts):
            (release / folder).mkdir(parents=True, exist_ok=True)
        for n in range(6):
            picture(30 + 9 * n, 60 - 5 * n, seed=n).save(release / images / f"{n}.jpg")
            gold = [
                f"Is it {k}? Please answer yes or no.\t{a}\n" for k, a in ((1, "Yes"), (2, "No"))
            ]
            (release / texts / f"{n}.txt").write_text("".join(gold), "utf-8")
            path = f"{images}/{n}.jpg"
            rows += [
                {"question_id": path, "image": path, "text": f"Is it {k}?{SHORT}"} for k in (1, 2)
            ]
    lines(root / "MME/llava_mme.jsonl", rows)
    notes = [
        {
            "question": f"What {'very ' * (n % 5)}is {n}?",
            "image_id": f"i{n // 2}",
            "answers": ["x"] * 10,
        }
        for n in range(SIZE["textvqa"])
    ]
    whole(root / "textvqa/TextVQA_0.5.1_val.json", {"data": notes})
    asked = [
        {
            "question_id": note["image_id"],
            "image": f"{note['image_id']}.jpg",
            "text": f"{note['question']}\nReference OCR token: A, B{SHORT}",
        }
        for note in notes
    ]
    lines(root / "textvqa/llava_textvqa_val_v051_ocr.jsonl", asked)
    (root / "textvqa/train_images").mkdir()
    for n in range(SIZE["textvqa"] // 2):
        picture(90 - 6 * n, 20 + 7 * n, seed=n).save(root / f"textvqa/train_images/i{n}.jpg")
    names = [f"VizWiz_test_{n:08d}.jpg" for n in range(SIZE["vizwiz"])]
    rows = [{"question_id": n, "image": name, "text": "Q?"} for n, name in enumerate(names)]
    lines(root / "vizwiz/llava_test.jsonl", rows)
    (root / "vizwiz/test").mkdir()
    for n, name in enumerate(names):
        picture(20 + 5 * n, 50, seed=n).save(root / "vizwiz/test" / name)
    return root


def begin(
    processes: int, checkpoint: Path, data: Path, output: Path, *more: str
) -> subprocess.Popen:
    """``sh eval.sh`` in a group of processes of its own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = [str(checkpoint), ",".join(TASKS), "--data-root", str(data), "--output", str(output)]
    words += ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", "8", *more]
    return subprocess.Popen(
        ["sh", str(ROOT / "eval.sh"), *words],
        cwd=output.parent,
        env=environment(VIRTUAL_ENV="", CONDA_PREFIX="", NPROC=str(processes), PATH=path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(run: subprocess.Popen) -> str:
    """Waits, and gives what was printed."""
    try:
        out, error = run.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode == 0, error
    return out


@pytest.fixture(scope="module")
def unbroken(tiny_checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of one process."""
    output = tmp_path_factory.mktemp("unbroken") / "out"
    out = finish(begin(1, tiny_checkpoint, data, output))
    assert "perception" in out and "accuracy" in out and str(output / "results.md") in out
    return output


def logged(output: Path, task: str) -> list[str | int]:
    """Ids in the log files of a task, whole lines only."""
    found = []
    for path in sorted(output.glob(f"{task}/log.rank*.jsonl")):
        found += [json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]]
    return found


def outcome(output: Path) -> dict[str, object]:
    """Merged answers, published answers and uploads as bytes, and the scores."""
    found: dict[str, object] = {}
    for task in TASKS:
        for path in sorted((output / task).rglob("*")):
            if path.parent.name in ("published", "submission") or path.name == "answers.jsonl":
                found[f"{task}/{path.name}"] = path.read_bytes()
        found[task] = json.loads((output / task / "scores.json").read_text())["scores"]
    return found


@pytest.mark.slow
def test_one_process(unbroken: Path, data: Path) -> None:
    found = outcome(unbroken)
    assert {"mme/color.txt", "mme/landmark.txt", "vizwiz/vizwiz.json"} <= set(found)
    for task in ("mme", "textvqa"):
        again = scored(task, data, unbroken / task / "published/answers.jsonl")
        assert again["scores"] == found[task]
        assert len(again["items"]) == SIZE[task]
    assert found["vizwiz"] == {}


@pytest.mark.slow
def test_two_processes(tiny_checkpoint: Path, data: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    finish(begin(2, tiny_checkpoint, data, output, "--batch-size", "3"))
    for task in TASKS:
        parts = sorted((output / task).glob("log.rank*.jsonl"))
        assert [len(part.read_text().splitlines()) for part in parts] == [SIZE[task] // 2] * 2
    assert outcome(output) == outcome(unbroken)


@pytest.mark.slow
def test_killed(tiny_checkpoint: Path, data: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = begin(1, tiny_checkpoint, data, output, "--batch-size", "1")
    deadline = time.monotonic() + 200
    while len(logged(output, "textvqa")) < 4:  # the second task
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    kept = {task: logged(output, task) for task in TASKS}
    assert len(kept["mme"]) == SIZE["mme"] and 4 <= len(kept["textvqa"]) < SIZE["textvqa"]
    assert not (output / "results.md").exists()
    finish(begin(2, tiny_checkpoint, data, output))
    for task in TASKS:
        ids = logged(output, task)
        assert len(ids) == len(set(ids)) == SIZE[task]
        assert set(kept[task]) <= set(ids)
    assert outcome(output) == outcome(unbroken)
