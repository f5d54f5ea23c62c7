"""Servers that are busy, broken or odd: retries, waits, keys, addresses, unreadable replies."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from fixtures_judge import (
    KEY,
    Answer,
    error,
    judge_environment,  # noqa: F401  (fixture)
    small_review,
    stub_judge,
)

from llava_uhd.errors import UserError
from llava_uhd.eval.__main__ import main
from llava_uhd.eval.judge.endpoint import retry_after

QUICK = ["--first-wait", "0.01", "--retries", "3"]


def number_of(body: dict) -> int:
    """Which question of `small_review` a request is about."""
    return int(body["messages"][-1]["content"].split("Question ")[1].split("?")[0])


def scores_of(output: Path) -> list[list[float]]:
    return [json.loads(line)["tuple"] for line in output.read_text("utf-8").splitlines()]


def test_waits_as_long_as_the_server_asks(tmp_path: Path) -> None:
    def reply(body: dict, number: int) -> str | Answer:
        return error(429, "slow down", Retry_After="0.7") if number == 1 else "8 6"

    output = tmp_path / "made.jsonl"
    words = [*small_review(tmp_path), "--output", f"{output}", *QUICK]
    with stub_judge(reply) as stub:
        assert main([*words, "--base-url", stub.url]) == 0
    assert len(stub.bodies) == 7 and stub.bodies[1] == stub.bodies[2]
    assert stub.times[2] - stub.times[1] >= 0.7
    assert scores_of(output) == [[8.0, 6.0]] * 6


def test_failures_are_capped_and_made_up_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [True]

    def reply(body: dict, number: int) -> str | Answer:
        return error(500) if number_of(body) == 3 and broken else f"7 {number_of(body)}"

    output = tmp_path / "made.jsonl"
    words = [*small_review(tmp_path), "--output", f"{output}", *QUICK]
    with stub_judge(reply) as stub:
        assert main([*words, "--base-url", stub.url]) == 1
        assert len(stub.bodies) == 5 + 4  # once and three retries
        assert scores_of(output) == [[7.0, n] for n in range(3)]
        err = capsys.readouterr().err
        assert "no verdict: review 3: status 500" in err and "(asked 4 times)" in err
        broken.clear()
        assert main([*words, "--base-url", stub.url]) == 0
        assert len(stub.bodies) == 9 + 1
    assert scores_of(output) == [[7.0, n] for n in range(6)]


def test_a_server_that_only_fails_ends_the_run(tmp_path: Path) -> None:
    words = [*small_review(tmp_path), "--output", f"{tmp_path / 'made.jsonl'}", *QUICK]
    with (
        stub_judge(lambda body, number: error(503)) as stub,
        pytest.raises(UserError, match=r"answers nothing: status 503: no \(asked 4 times\)"),
    ):
        main([*words, "--base-url", stub.url])
    assert 12 <= len(stub.bodies) <= 12 + 8
    with pytest.raises(UserError, match="answers nothing: ConnectError"):
        main([*words, "--base-url", stub.url])


@pytest.mark.parametrize(
    ("answer", "advice"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), "OPENAI_API_KEY"),
        (error(404, "no such model"), "--model"),
        (error(429, "over", "insufficient_quota"), "quota"),
        (Answer("", 301, {"Location": "http://127.0.0.1:1/"}, {}), "--base-url"),
    ],
)
def test_what_no_retry_mends_ends_the_run(answer: Answer, advice: str, tmp_path: Path) -> None:
    words = [*small_review(tmp_path), "--output", f"{tmp_path / 'made.jsonl'}", *QUICK]
    with (
        stub_judge(lambda body, number: answer) as stub,
        pytest.raises(UserError, match=advice) as caught,
    ):
        main([*words, "--base-url", stub.url])
    assert KEY not in str(caught.value)
    assert 1 <= len(stub.bodies) <= 2


def test_the_key_is_written_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reply(body: dict, number: int) -> str | Answer:
        wrong = error(400, f"bad request by {KEY}")
        return wrong if number_of(body) == 5 else f"8 6\nYou sent {KEY}."

    words = [*small_review(tmp_path), "--output", f"{tmp_path / 'made.jsonl'}", *QUICK]
    with stub_judge(reply) as stub:
        assert main([*words, "--base-url", f"{stub.url}?api-version=7"]) == 1
    assert set(stub.keys) == {f"Bearer {KEY}"}
    assert set(stub.paths) == {"/v1/chat/completions?api-version=7"}
    assert "You sent ***." in (tmp_path / "made.jsonl").read_text("utf-8")
    out, err = capsys.readouterr()
    assert "bad request by ***" in err and KEY not in out + err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "made.jsonl.cache" in files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_unreadable_replies_are_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(body: dict, number: int) -> str:
        seen = sum(number_of(each) == number_of(body) for each in list(stub.bodies))
        return ("8, 6" if seen == 1 else "8 6") if number_of(body) < 3 else f"{seen} of ten"

    words = [*small_review(tmp_path), "--reasks", "1", "--output", f"{tmp_path / 'made.jsonl'}"]
    with stub_judge(reply) as stub:
        assert main([*words, "--base-url", stub.url]) == 0
        assert len(stub.bodies) == 12
        (tmp_path / "made.jsonl").unlink()
        assert main([*words, "--base-url", stub.url]) == 0
        assert len(stub.bodies) == 12
    assert scores_of(tmp_path / "made.jsonl") == [[8.0, 6.0]] * 3 + [[-1, -1]] * 3
    err = capsys.readouterr().err
    assert "no verdict: review 4: the reply cannot be read: '1 of ten'" in err
    assert "review: 3 of 6 questions have no verdict" in err


def test_what_is_no_chat_completion_is_asked_again(tmp_path: Path) -> None:
    odd = [{"choices": []}, {"hello": 1}, [], {"choices": [{"message": {"content": [1]}}]}]

    def reply(body: dict, number: int) -> str | Answer:
        return Answer(body=odd[number]) if number < len(odd) else "5 4"

    words = [*small_review(tmp_path), "--output", f"{tmp_path / 'made.jsonl'}"]
    with stub_judge(reply) as stub:
        assert main([*words, "--base-url", stub.url, "--first-wait", "0.01"]) == 0
    assert len(stub.bodies) == 10
    assert scores_of(tmp_path / "made.jsonl") == [[5.0, 4.0]] * 6


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is no address"),
        ("http://", "is no address"),
        ("http://me:secret@localhost/v1", "must not hold a user or a password"),
    ],
)
def test_wrong_addresses(url: str, message: str, tmp_path: Path) -> None:
    words = [*small_review(tmp_path), "--output", f"{tmp_path / 'made.jsonl'}"]
    with pytest.raises(UserError, match=message) as caught:
        main([*words, "--base-url", url])
    assert "secret" not in str(caught.value)


def test_address_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*small_review(tmp_path), "--output", f"{tmp_path / 'made.jsonl'}"]
    monkeypatch.delenv("OPENAI_API_KEY")
    with stub_judge(lambda body, number: "8 6") as stub:
        monkeypatch.setenv("OPENAI_API_BASE", f"{stub.url}/chat/completions")
        assert main([*words, "--parameters", '{"temperature": null, "seed": 3}']) == 0
    assert set(stub.keys) == {None} and set(stub.paths) == {"/v1/chat/completions"}
    assert set(stub.bodies[0]) == {"model", "messages", "max_tokens", "seed"}


def test_retry_after() -> None:
    assert retry_after({"retry-after": "2"}) == 2
    assert retry_after({"retry-after": "2", "retry-after-ms": "250"}) == 0.25
    assert retry_after({"retry-after": "-1"}) == 0
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None
    when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    wait = retry_after({"retry-after": when})
    assert wait is not None and 27 < wait <= 30
