"""Judged tasks of a results folder: scores in the table, several runs, prompts of one's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures_eval import lines, whole
from fixtures_judge import (
    Answer,
    error,
    golden_review,
    judge_environment,  # noqa: F401  (fixture)
    small_review,
    stub_judge,
)
from fixtures_tiny import picture

from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.judge.prompts import published_messages, published_text
from llava_uhd.eval.scoring.reviews import read_grade, read_pair, read_verdict

ABILITIES = [["rec"], ["ocr", "math"], ["rec", "ocr"], ["know"]]


def answered(results: Path, task: str, data: Path, texts: dict, limit: int | None = None) -> None:
    """A folder such as a run leaves."""
    folder = results / task
    whole(folder / "settings.json", {"hash": "0", "settings": {"task": task, "beams": 1}})
    run = {"data": str(data), "limit": limit, "checkpoint": "checkpoints/toy"}
    whole(folder / "run.json", run)
    known = {"prompt": "?", "prompt_tokens": 1, "new_tokens": 1}
    lines(folder / "answers.jsonl", [{"id": k, "text": t, **known} for k, t in texts.items()])


def wild(root: Path, results: Path, count: int = 6) -> Path:
    """LLaVA-Bench with made-up questions, answered."""
    folder = root / "llava-bench-in-the-wild"
    small_review(folder, count)
    (folder / "reference.jsonl").rename(folder / "answers_gpt4.jsonl")
    (folder / "images").mkdir()
    answered(results, "llava_bench", folder, {n: f"mine {n}" for n in range(count)})
    return folder


def vet(root: Path, results: Path) -> Path:
    """MM-Vet with four questions, answered."""
    folder = root / "mm-vet"
    rows = [{"question_id": n, "image": f"v1_{n}.png", "text": f"Q{n}?"} for n in range(4)]
    lines(folder / "llava-mm-vet.jsonl", rows)
    known = {
        f"v1_{n}": {"question": f"Q{n}?", "answer": f"a{n}<AND>b<OR>c", "capability": abilities}
        for n, abilities in enumerate(ABILITIES)
    }
    whole(folder / "mm-vet.json", known)
    (folder / "images").mkdir()
    answered(results, "mmvet", folder, {n: f"said {n}" for n in range(4)})
    return folder


def videos(root: Path, results: Path) -> Path:
    """MSVD-QA with three questions, answered; no videos are there."""
    folder = root / "GPT_Zero_Shot_QA/MSVD_Zero_Shot_QA"
    names = ("what", "who", "where")
    whole(folder / "test_q.json", [
        {"question_id": n, "question": f"{name}?", "video_name": f"v{n}"}
        for n, name in enumerate(names)
    ])  # fmt: skip
    whole(folder / "test_a.json", [{"question_id": n, "answer": f"gold{n}"} for n in range(3)])
    answered(results, "msvd_qa", folder, {0: "gold0", 1: "x$y", 2: "z"})
    return folder


def scores(results: Path, task: str) -> dict:
    return json.loads((results / task / "scores.json").read_text("utf-8"))


def place(text: str, count: int = 6) -> int:
    """Number of the question that a message is about."""
    return next(n for n in range(count) if f"Question {n}?" in text or f"said {n}" in text)


def test_llava_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "eval"
    wild(tmp_path, results)

    def reply(body: dict, number: int) -> str:
        return "no idea" if "Question 4?" in str(body) else f"8 {place(str(body))}\nFine."

    words = ["judge", f"{results}", "--model", "m", "--base-url"]
    with stub_judge(reply) as stub:
        assert main([*words, stub.url]) == 1  # one question has no verdict
        assert len(stub.bodies) == 7  # it was asked again
        first = scores(results, "llava_bench")
        assert main([*words, stub.url]) == 1
        assert len(stub.bodies) == 7 and scores(results, "llava_bench") == first
        wanted = {"relative": 27.5, "reference": 80.0, "model": 22.0}
        assert first["scores"] == pytest.approx(wanted)
        assert first["remark"] == "judged by m; without a verdict: 1 (4), left out"
        parts = first["breakdown"]["category"]
        assert parts["conv"]["relative"] == pytest.approx(100 * 1.5 / 8)
        assert "no verdict: llava_bench 4: the reply cannot be read" in capsys.readouterr().err
        table = (results / "results.md").read_text("utf-8")
        assert "relative (main) | 27.5" in table and "judged by m" in table
        review = results / "llava_bench/review.jsonl"
        heads = [json.loads(line) for line in review.read_text("utf-8").splitlines()]
        assert [row["tuple"] for row in heads][3:5] == [[8.0, 3.0], [-1, -1]]
        assert main(["judge", "summarize", f"{review}"]) == 0
        assert "all 27.5 80.0 22.0" in capsys.readouterr().out
        # Scored again without the judge, the scores stay; other answers lose them.
        assert main(["score", f"{results}"]) == 0
        assert scores(results, "llava_bench") == first
        assert main([*words, stub.url, "--compatible"]) == 1
        # Sums of 47 and 10 over six questions, each mean rounded to 3 decimals.
        assert scores(results, "llava_bench")["scores"]["relative"] == pytest.approx(
            100 * round((5 * 8 - 1) / 6, 3) ** -1 * round((11 - 1) / 6, 3)
        )
        texts = {n: f"new {n}" for n in range(6)}
        answered(results, "llava_bench", tmp_path / "llava-bench-in-the-wild", texts)
        assert main(["score", f"{results}"]) == 0
        assert scores(results, "llava_bench")["scores"] == {}
        assert "other answers: judge again" in scores(results, "llava_bench")["remark"]


def test_golden_answers_of_a_run(golden: Path, tmp_path: Path) -> None:
    """The published review file comes out of a results folder too, but for the ids of answers."""
    source = golden / "evaluation/llava-bench-in-the-wild"
    files = ("context.jsonl", "answers_gpt4.jsonl", "answers/toy-model.jsonl")
    review = golden_review(source, *files, "reviews/toy-model.jsonl")
    folder, results = tmp_path / "llava-bench-in-the-wild", tmp_path / "eval"
    folder.mkdir()
    for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "rule.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    rows = [json.loads(line) for line in (source / files[2]).read_text("utf-8").splitlines()]
    answered(results, "llava_bench", folder, {row["question_id"]: row["text"] for row in rows})
    words = ["judge", f"{results}", "--model", "gpt-4-0314", "--compatible", "--reasks", "0"]
    with stub_judge(review.reply) as stub:
        assert main([*words, "--base-url", stub.url]) == 1
    assert sorted(stub.texts) == sorted(review.messages)
    made = (results / "llava_bench/review.jsonl").read_bytes().splitlines()
    for found, wanted in zip(made, review.lines.splitlines(), strict=True):
        first, second = json.loads(found), json.loads(wanted)
        assert {**first, "answer2_id": ""} == {**second, "answer2_id": ""}
    all_line = review.scores["summary_stdout"].splitlines()[1].split()
    found = scores(results, "llava_bench")["scores"]
    assert [round(value, 1) for value in found.values()] == [float(x) for x in all_line[1:]]


def test_mmvet_by_ability_and_runs(tmp_path: Path) -> None:
    results = tmp_path / "eval"
    vet(tmp_path, results)
    grades = {0: "1.0", 1: "0.5 ", 2: "0.0", 3: "x"}

    def reply(body: dict, number: int) -> str:
        text = body["messages"][-1]["content"]
        if number < 4 and "said 2" in text:
            return "0.4"  # in the first run only
        return "0.3" if text.endswith("as a number: ") else grades[place(text, 4)]

    words = ["judge", f"{results}", "--model", "m", "--runs", "2", "--concurrency", "1"]
    with stub_judge(reply) as stub:
        assert main([*words, "--base-url", stub.url]) == 0
    assert len(stub.bodies) == 8 + 2
    assert {(body["temperature"], body["max_tokens"]) for body in stub.bodies} == {(0.0, 3)}
    assert stub.texts[0].endswith("\nQ0? | a0 <AND> b <OR> c | said 0 | ")
    found = scores(results, "mmvet")
    wanted = {"total": 50.0, "rec": 60.0, "ocr": 35.0, "math": 50.0, "know": 30.0}
    assert found["scores"] == pytest.approx(wanted)
    assert "mean of 2 runs (55.0, 45.0; deviation 5.0)" in found["remark"]
    assert "prompt of our own: not comparable" in found["remark"]


def test_mmvet_with_the_published_prompt(tmp_path: Path) -> None:
    results = tmp_path / "eval"
    folder = vet(tmp_path, results)
    source = 'import nothing_here\nprompt = """Grade this.\nA | B\n"""\nraise SystemExit\n'
    (folder / "mm-vet_evaluator.py").write_text(source, "utf-8")
    words = ["judge", f"{results}", "--model", "m", "--compatible", "--concurrency", "1"]
    with stub_judge(lambda body, number: "bad") as stub:
        assert main([*words, "--base-url", stub.url, "--reasks", "0"]) == 1
    assert stub.texts[0] == "Grade this.\nA | B\n\nQ0? | a0 <AND> b <OR> c | said 0 | "
    found = scores(results, "mmvet")
    assert found["scores"]["total"] == 0 and "(0, 1, 2, 3), counted as published" in found["remark"]
    assert "our own" not in found["remark"]


def test_questions_on_videos(tmp_path: Path) -> None:
    results = tmp_path / "eval"
    videos(tmp_path, results)
    replies = {
        "gold0": "{'pred': 'yes', 'score': 5}",
        "gold1": '```json\n{"pred": "No", "score": 1.9}\n```',
        "gold2": "maybe",
    }

    def reply(body: dict, number: int) -> str:
        text = body["messages"][-1]["content"]
        return next(said for gold, said in replies.items() if f"True answer: {gold}\n" in text)

    with stub_judge(reply) as stub:
        words = ["judge", f"{results}", "--model", "m", "--base-url", stub.url]
        assert main(words) == 1
    assert len(stub.bodies) == 4 and any("Given answer: x$y\n" in text for text in stub.texts)
    found = scores(results, "msvd_qa")
    assert found["scores"] == pytest.approx(
        {"exact_match": 1 / 3, "judged_accuracy": 50.0, "judged_score": 3.0}
    )
    assert found["counts"] == {"exact_match": 3, "judged_accuracy": 2, "judged_score": 2}


EVALUATOR = """
def annotate(question, answer, pred):
    client.ask(messages=[{"role": "user", "content": other}])
    return client.create(
        model="m",
        messages=[
            {"role": "system", "content": "Check. " "Costs $5."},
            {"role": "user", "content": "Now:\\n" f"Q: {question}\\nA: {answer}\\nP: {pred}\\n" "{'pred'}"},
        ],
    )
"""  # noqa: E501


def test_prompts_of_published_evaluators(tmp_path: Path) -> None:
    results, folder = tmp_path / "eval", videos(tmp_path, tmp_path / "eval")
    (folder / "eval_video_qa.py").write_text(EVALUATOR, "utf-8")
    words = ["judge", f"{results}", "--model", "m", "--concurrency", "1"]
    with stub_judge(lambda body, number: "{'pred': 'yes', 'score': 4}") as stub:
        assert main([*words, "--base-url", stub.url]) == 0
    system, user = stub.bodies[1]["messages"]
    assert system == {"role": "system", "content": "Check. Costs $5."}
    assert user["content"] == "Now:\nQ: who?\nA: gold1\nP: x$y\n{'pred'}"
    assert "our own" not in scores(results, "msvd_qa")["remark"]
    book = {"cells": [{"source": ["!pip install x\n"]}, {"source": ["prompt = 'a'\n", "b = 1\n"]}]}
    assert published_text(whole(tmp_path / "e.ipynb", book)) == "a"
    for name, text in (("no.py", "x = 1\n"), ("odd.py", "f(messages=[{'role': r}])\n")):
        (tmp_path / name).write_text(text, "utf-8")
        with pytest.raises(UserError, match="no evaluator that is known"):
            published_text(tmp_path / name)
        with pytest.raises(UserError, match="no evaluator that is known"):
            published_messages(tmp_path / name, ("question",))


def test_several_tasks_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "eval"
    (wild(tmp_path, results) / "rule.json").unlink()
    vet(tmp_path, results)
    videos(tmp_path, results)
    words = ["judge", f"{results}", "--model", "m", "--data-root", f"{tmp_path}"]
    with stub_judge(lambda body, number: "1") as stub:
        words += ["--base-url", stub.url]
        assert main([*words, "--dry-run"]) == 1 and not stub.bodies
        out, err = capsys.readouterr()
        assert out.startswith("m: 7 requests (0 of 7 known), about ")
        assert "left out: llava_bench:" in err and "rule.json is missing; name" in err
        assert not (results / "judge.cache").exists()
        with pytest.raises(UserError, match=r"rule.json is missing"):
            main([*words, "--tasks", "llava_bench"])
        with pytest.raises(UserError, match="holds no answers to msrvtt_qa"):
            main([*words, "--tasks", "mmvet,msrvtt_qa"])
        with pytest.raises(UserError, match="unknown judged task 'textvqa'"):
            main([*words, "--tasks", "textvqa"])
        assert main([*words, "--tasks", "mmvet"]) == 0 and len(stub.bodies) == 4
    (results / "mmvet/answers.jsonl").write_text("", "utf-8")
    with pytest.raises(UserError, match=r"4 of 4 items have no answer .* finish the run first"):
        main([*words, "--tasks", "mmvet"])


def test_a_question_without_a_reply_is_asked_by_the_next_run(tmp_path: Path) -> None:
    results, broken = tmp_path / "eval", [True]
    vet(tmp_path, results)

    def reply(body: dict, number: int) -> str | Answer:
        return error(500) if broken and "said 3" in str(body) else "1.0"

    words = ["judge", f"{results}", "--model", "m", "--retries", "1", "--first-wait", "0.01"]
    with stub_judge(reply) as stub:
        words += ["--base-url", stub.url]
        assert main(words) == 1
        assert "without a verdict: 1 (3), left out" in scores(results, "mmvet")["remark"]
        broken.clear()
        assert main(words) == 0
        assert len(stub.bodies) == 3 + 2 + 1
    assert "without" not in scores(results, "mmvet")["remark"]


def test_a_trial_is_judged(tmp_path: Path) -> None:
    results = tmp_path / "eval"
    folder = vet(tmp_path, results)
    picture(8, 8).save(folder / "images/v1_0.png")
    answered(results, "mmvet", folder, {0: "said 0", 1: "said 1"}, limit=2)
    with stub_judge(lambda body, number: "1.0") as stub:
        assert main(["judge", f"{results}", "--model", "m", "--base-url", stub.url]) == 0
    assert len(stub.bodies) == 2
    assert "first 2 of 4 only" in (results / "results.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("read", "reply", "wanted"),
    [
        (read_pair, "8 9\nBoth.", (8.0, 9.0)),
        (read_pair, "8,9", (8.0, 9.0)),
        (read_pair, "8, 9", None),
        (read_pair, "\n8 9", None),
        (read_pair, "8 9 ", None),
        (read_pair, "9/10 8", None),
        (read_pair, "nan 8", None),
        (read_pair, "", None),
        (read_grade, "0.5", 0.5),
        (read_grade, "1\n", 1.0),
        (read_grade, "0.5 of 1", 0.5),
        (read_grade, "1.1", None),
        (read_grade, "nan", None),
        (read_grade, "", None),
        (read_verdict, "{'pred': 'yes', 'score': 4.8}", (True, 4)),
        (read_verdict, 'So: {"pred": "No.", "score": "2"}', (False, 2)),
        (read_verdict, "{'pred': 'maybe', 'score': 2}", None),
        (read_verdict, "{'pred': 'yes', 'score': 6}", None),
        (read_verdict, "{'pred': 'yes'}", None),
        (read_verdict, "{'pred': 'yes', 'score': __import__('os')}", None),
        (read_verdict, "yes 5", None),
        (read_verdict, "{" * 5000, None),
    ],
)
def test_replies_are_read(read: Callable, reply: str, wanted: object) -> None:
    assert read(reply) == wanted
