"""A judge on this machine: a server with the chat protocol that remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fixtures_eval import lines

KEY = "sk-not-to-be-seen"


@pytest.fixture(autouse=True)
def judge_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and no server that the user's environment names."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # is not asked about this machine


class Answer(NamedTuple):
    """What the server sends: a reply as text, or a status with whatever belongs to it."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = {}
    body: Any = None


class StubJudge:
    """The server; ``reply`` maps a request body and its number (from 0) to an answer."""

    def __init__(self, reply: Callable[[dict, int], str | Answer]) -> None:
        self.reply = reply
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub.lock:
                    number = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.keys.append(self.headers.get("Authorization"))
                    stub.paths.append(self.path)
                    stub.times.append(time.monotonic())
                answer = stub.reply(body, number)
                answer = Answer(answer) if isinstance(answer, str) else answer
                message = {"role": "assistant", "content": answer.text}
                value = {
                    "object": "chat.completion",
                    "model": f"{body['model']}-here",
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105},
                }
                content = json.dumps(value if answer.body is None else answer.body).encode()
                self.send_response(answer.status)
                for name, text in answer.headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @property
    def texts(self) -> list[str]:
        """Last message of each request."""
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def stub_judge(reply: Callable[[dict, int], str | Answer]) -> Iterator[StubJudge]:
    """A running judge."""
    stub = StubJudge(reply)
    thread = threading.Thread(target=stub.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.server.shutdown()
        stub.server.server_close()
        thread.join(10)


def error(status: int, message: str = "no", code: str | None = None, **headers: str) -> Answer:
    """A refusal as OpenAI words it."""
    body = {"error": {"message": message, "type": "x", "code": code}}
    return Answer("", status, {k.replace("_", "-"): v for k, v in headers.items()}, body)


class Review(NamedTuple):
    """Files of a review, and what they should give."""

    words: list[str]
    replies: dict[str, str]
    messages: list[str]
    lines: bytes
    scores: dict[str, Any]

    def reply(self, body: dict, number: int) -> str:
        """The canned reply to a question, whatever the order."""
        return self.replies[body["messages"][-1]["content"]]


def golden_review(folder: Path, context: str, reference: str, ours: str, review: str) -> Review:
    """The review of a golden folder."""
    scores = json.loads((folder / "scores.json").read_text("utf-8"))
    rules = json.loads((folder / "rule.json").read_text("utf-8"))
    content = (folder / review).read_bytes()
    categories = [json.loads(line)["category"] for line in content.splitlines()]
    messages = [
        text.replace("<RULE PROMPT>", rules[category]["prompt"])
        for text, category in zip(scores["request_user_messages_without_rule_text"], categories)
    ]
    replies = json.loads((folder / "judge_replies.json").read_text("utf-8"))
    words = ["judge", "--question", f"{folder / 'questions.jsonl'}", "--context"]
    words += [f"{folder / context}", "--answer-list", f"{folder / reference}", f"{folder / ours}"]
    words += ["--rule", f"{folder / 'rule.json'}"]
    return Review(words, dict(zip(messages, replies)), messages, content, scores)


def small_review(folder: Path, count: int = 6) -> list[str]:
    """Words of a review of ``count`` made-up questions about two pictures."""
    kinds = ("conv", "detail", "complex")
    lines(folder / "questions.jsonl", [
        {
            "question_id": n,
            "image": f"{n % 2}.jpg",
            "text": f"Question {n}?",
            "category": kinds[n % 3],
        }
        for n in range(count)
    ])  # fmt: skip
    lines(folder / "context.jsonl", [
        {"id": n, "image": f"{n}.jpg", "caption": f"Picture {n}."} for n in range(2)
    ])  # fmt: skip
    for name in ("reference", "ours"):
        lines(folder / f"{name}.jsonl", [
            {"question_id": n, "text": f"{name} {n}", "answer_id": f"{name[0]}{n}"}
            for n in range(count)
        ])  # fmt: skip
    rules = {f"llava_bench_{kind}": {"role": "Helper", "prompt": f"Rate {kind}."} for kind in kinds}
    (folder / "rule.json").write_text(json.dumps(rules), "utf-8")
    words = ["judge", "--question", f"{folder}/questions.jsonl", "--context"]
    words += [f"{folder}/context.jsonl", "--answer-list", f"{folder}/reference.jsonl"]
    return [*words, f"{folder}/ours.jsonl", "--rule", f"{folder}/rule.json"]
