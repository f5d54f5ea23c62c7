"""The published review against a judge on this machine: equal files, the cache, kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fixtures_judge import (
    Review,
    golden_review,
    judge_environment,  # noqa: F401  (fixture)
    small_review,
    stub_judge,
)

from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main

GOLDEN = {
    "gpt_review_visual": (
        "caps_boxes.jsonl",
        "answer-file-ref.jsonl",
        "answer-file-our.jsonl",
        "review.jsonl",
    ),
    "llava-bench-in-the-wild": (
        "context.jsonl",
        "answers_gpt4.jsonl",
        "answers/toy-model.jsonl",
        "reviews/toy-model.jsonl",
    ),
}


@pytest.fixture(params=list(GOLDEN))
def review(request: pytest.FixtureRequest, golden: Path) -> Review:
    return golden_review(golden / "evaluation" / request.param, *GOLDEN[request.param])


def test_published_review(review: Review, tmp_path: Path) -> None:
    output = tmp_path / "made.jsonl"
    with stub_judge(review.reply) as stub:
        assert main([*review.words, "--output", f"{output}", "--base-url", stub.url]) == 0
    assert output.read_bytes() == review.lines
    assert stub.texts == review.messages
    wanted = review.scores["judge_request_settings"]
    system = review.scores.get("system_message")
    for body in stub.bodies:
        messages = body.pop("messages")
        assert body == wanted and [each["role"] for each in messages] == ["system", "user"]
        assert system in (None, messages[0]["content"])
    assert set(stub.paths) == {"/v1/chat/completions"}


def test_second_run_asks_nothing(review: Review, tmp_path: Path) -> None:
    output = tmp_path / "made.jsonl"
    words = [*review.words, "--output", f"{output}", "--cache", f"{tmp_path / 'replies'}"]
    with stub_judge(review.reply) as stub:
        assert main([*words, "--base-url", stub.url, "--concurrency", "8"]) == 0
        assert len(stub.bodies) == len(review.messages)
        assert main([*words, "--base-url", stub.url]) == 0  # nothing left to do
        output.unlink()
        assert main([*words, "--base-url", stub.url]) == 0  # all replies are known
        assert len(stub.bodies) == len(review.messages)
        assert output.read_bytes() == review.lines
        output.unlink()
        assert main([*words, "--base-url", stub.url, "--max-tokens", "9"]) == 0
        assert len(stub.bodies) == 2 * len(review.messages)


def test_published_summary(
    review: Review, golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = review.scores["summary_stdout"].split("\n")[0]
    file = tmp_path / f"{name}.jsonl"
    file.write_bytes(review.lines)
    assert main(["judge", "summarize", "--compatible", f"{file}"]) == 0
    assert capsys.readouterr().out == review.scores["summary_stdout"]
    ignored = review.scores.get("summary_ignoring_0_4_7")
    if ignored:
        words = ["judge", "summarize", "-f", f"{file}", "-i", "0", "4", "7", "--compatible"]
        assert main(words) == 0
        assert capsys.readouterr().out == ignored


def test_unreadable_replies_are_left_out_and_listed(
    golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = golden / "evaluation/llava-bench-in-the-wild/reviews/toy-model.jsonl"
    assert main(["judge", "summarize", f"{file}"]) == 0
    out, err = capsys.readouterr()
    assert "6 of 30 replies could not be read" in err and "1, 13, 17, 21, 25, 29" in err
    rows = [json.loads(line)["tuple"] for line in file.read_text("utf-8").splitlines()]
    pairs = [pair for pair in rows if pair != [-1, -1]]
    first, second = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    wanted = [100 * round(second, 3) / round(first, 3), 10 * round(first, 3), 10 * round(second, 3)]
    assert out.splitlines()[1] == " ".join(["all", *(f"{round(each, 1)}" for each in wanted)])


def test_old_reviews_and_choices_of_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for name in ("gpt4_text_a-0613", "review_b", "other"):
        row = {"question_id": 1, "score": [8, 4]}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    line = "all 50.0 80.0 40.0\n" + "=" * 33 + "\n"
    for words, names in (
        (["-d", f"{folder}"], ["a-0613", "review_b"]),
        (["-d", f"{folder}", "-v", "0613"], ["a-0613"]),
        (["-d", f"{folder}", "-v", "0314"], ["review_b"]),
        (["-d", f"{folder}", "-s", "rev", "b"], ["review_b"]),
    ):
        assert main(["judge", "summarize", *words]) == 0
        assert capsys.readouterr().out == "".join(f"{name}\n{line}" for name in names)
    with pytest.raises(UserError, match="no review file"):
        main(["judge", "summarize", "-d", f"{folder}", "-s", "zzz"])


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*small_review(tmp_path), "--output", f"{tmp_path / 'out/made.jsonl'}", "--dry-run"]
    before = sorted(tmp_path.rglob("*"))
    with stub_judge(lambda body, number: "8 6") as stub:
        assert main([*words, "--base-url", stub.url, "--price", "30", "60"]) == 0
    assert not stub.bodies and sorted(tmp_path.rglob("*")) == before
    out = capsys.readouterr().out
    assert out.startswith("gpt-4-0314: 6 requests (0 of 6 known), about ")
    sent = int(out.split("about ")[1].split()[0])
    assert 300 < sent < 700
    cost = (sent * 30 + 6 * 1024 * 60) / 1e6
    assert out.endswith(f"at most {6 * 1024} back, at most about {cost:.2f} dollars\n")


@pytest.mark.slow
def test_killed_and_run_again(golden: Path, tmp_path: Path) -> None:
    """Nothing is lost, asked twice (but for what was under way) or written twice."""
    name = "llava-bench-in-the-wild"
    review = golden_review(golden / "evaluation" / name, *GOLDEN[name])
    reached = threading.Event()

    def reply(body: dict, number: int) -> str:
        if number == 12:
            reached.set()
        if 12 <= number < 16:
            time.sleep(60)  # under way when the process is killed
        return review.reply(body, number)

    output = tmp_path / "made.jsonl"
    words = [*review.words, "--output", f"{output}", "--concurrency", "4"]
    with stub_judge(reply) as stub:
        words += ["--base-url", stub.url]
        run = subprocess.Popen(
            [sys.executable, "-m", "llava_uhd.eval", *words],
            cwd=Path(__file__).resolve().parents[1],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert reached.wait(120)
            time.sleep(0.5)
        finally:
            os.kill(run.pid, signal.SIGKILL)
            run.wait(60)
        written = output.read_bytes()
        assert 0 < len(written) < len(review.lines) and review.lines.startswith(written)
        asked = len(stub.bodies)
        assert asked <= 16
        with output.open("ab") as file:
            file.write(b'{"id": 99, "question_')  # a line that was cut off
        with (tmp_path / "made.jsonl.cache").open("ab") as file:
            file.write(b'{"id": "cut')
        assert main(words) == 0
        assert len(stub.bodies) - asked <= len(review.messages) - 12
    assert output.read_bytes() == review.lines


def test_answers_are_matched_by_id(tmp_path: Path) -> None:
    words = small_review(tmp_path)
    ours = (tmp_path / "ours.jsonl").read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "ours.jsonl").write_text("".join(reversed(ours)), "utf-8")
    output = tmp_path / "made.jsonl"
    words += ["--output", f"{output}", "--base-url"]
    with stub_judge(lambda body, number: "8 6") as stub:
        assert main([*words, stub.url]) == 0
        assert "Question 0?" in stub.texts[0] and "ours 0\n" in stub.texts[0]
        with pytest.raises(UserError, match="the review of other answers"):
            lines = [json.loads(line) for line in ours]
            changed = [{**row, "answer_id": f"n{row['question_id']}"} for row in lines]
            text = "".join(json.dumps(row) + "\n" for row in changed)
            (tmp_path / "ours.jsonl").write_text(text, "utf-8")
            main([*words, stub.url])
        (tmp_path / "ours.jsonl").write_text("".join(reversed(ours)), "utf-8")
        assert main([*words, stub.url, "--compatible", "--overwrite"]) == 0
        assert "Question 0?" in stub.texts[6] and "ours 5\n" in stub.texts[6]


def test_questions_about_text(tmp_path: Path) -> None:
    words = small_review(tmp_path)
    del words[3:5]  # no --context
    rules = {"default": {"role": "A", "prompt": "P"}, "conv": {"role": "B", "prompt": "Q"}}
    (tmp_path / "rule.json").write_text(json.dumps(rules), "utf-8")
    words += ["--output", f"{tmp_path / 'made.jsonl'}", "--model", "gpt-4"]
    with stub_judge(lambda body, number: "8 6") as stub:
        assert main([*words, "--base-url", stub.url]) == 0
    assert stub.texts[0].startswith("[Question]\nQuestion 0?\n\n[B 1]\nreference 0\n\n[End of B 1]")
    assert stub.texts[1].endswith("[End of A 2]\n\n[System]\nP\n\n")
    first = json.loads((tmp_path / "made.jsonl").read_text("utf-8").splitlines()[0])
    assert first["category"] == "conv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "rule.json").write_text("{}"), "no role and prompt"),
        (lambda folder: (folder / "context.jsonl").write_text("{}\n"), "no field 'image'"),
        (
            lambda folder: (folder / "context.jsonl").write_text('{"image": "0.jpg"}\n'),
            "needs captions and instances",
        ),
        (
            lambda folder: (folder / "context.jsonl").write_text('{"image": [1]}\n'),
            "not in the published form",
        ),
        (lambda folder: (folder / "reference.jsonl").unlink(), "does not exist"),
        (
            lambda folder: (folder / "ours.jsonl").write_text('{"question_id": 9, "text": ""}\n'),
            "6 questions of .* have no answer, 1 answers belong to none",
        ),
        (lambda folder: (folder / "made.jsonl").write_text("x\n"), "line 1 is no review"),
        (lambda folder: (folder / "made.jsonl.cache").write_text("x\n"), "line 1 is not an"),
    ],
)
def test_damaged_files(change: object, message: str, tmp_path: Path) -> None:
    words = small_review(tmp_path)
    change(tmp_path)  # type: ignore[operator]
    with stub_judge(lambda body, number: "8 6") as stub, pytest.raises(UserError, match=message):
        main([*words, "--output", f"{tmp_path / 'made.jsonl'}", "--base-url", stub.url])
    assert not stub.bodies


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a results folder"),
        (["a", "b"], "name a results folder"),
        (["nowhere"], "needs --model"),
        (["nowhere", "--model", "m"], "holds no answers to a judged task"),
        (["summarize"], "no review file"),
        (["--question", "q", "--rule", "r", "--output", "o"], "needs --answer-list"),
        (["--question", "q", "--answer-list", "a", "b", "--rule", "r"], "needs --output"),
        (["x", "--concurrency", "0"], "--concurrency 0: must be at least 1"),
        (["x", "--model", "m", "--parameters", "[]"], "--parameters must be a JSON object"),
        (["x", "--model", "m", "--parameters", '{"model": 1}'], "without model"),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(["judge", *words])
