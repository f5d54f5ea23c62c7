"""Many questions to one judge: how many tokens, which are answered already, several at a time."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from llava_uhd.errors import UserError
from llava_uhd.eval.judge.cache import Cache, cache_key
from llava_uhd.eval.judge.endpoint import Endpoint, NoReplyError
from llava_uhd.eval.progress import Meter

Metrics = Mapping[str, float]

# Where nothing has been answered yet, so many failures end the run.
_HOPELESS = 3
# Tokens of a reply where the request sets no limit.
_GUESSED_REPLY = 64


@dataclass(frozen=True)
class Question:
    """One thing to be judged.

    Attributes:
        id: of the item.
        messages: of the chat.
        parameters: of the request, beside model and messages.
        read: metrics in a reply, or None where it cannot be read.
        run: number of the repetition, from 0.
        reminder: put behind the last message when it is asked again because of its reply.
        fallback: metrics that the published program gives where no reply can be read, or None
            where it has none.
    """

    id: str | int
    messages: Sequence[Mapping[str, str]]
    parameters: Mapping[str, Any]
    read: Callable[[str], Metrics | None]
    run: int = 0
    reminder: str = ""
    fallback: Metrics | None = None

    def body(self, model: str, attempt: int = 0) -> dict[str, Any]:
        """The request; parameters that are None are left out."""
        messages = [dict(message) for message in self.messages]
        if attempt:
            messages[-1]["content"] += self.reminder
        known = {name: value for name, value in self.parameters.items() if value is not None}
        return {"model": model, "messages": messages, **known}


@dataclass(frozen=True)
class Verdict:
    """What came of a question.

    Attributes:
        question: that was asked.
        reply: text, of the first time it was asked where none could be read; None without a reply.
        metrics: read out of it, or None.
        problem: why there are none, or an empty text.
    """

    question: Question
    reply: str | None
    metrics: Metrics | None
    problem: str = ""


@dataclass(frozen=True)
class Estimate:
    """What questions will cost.

    Attributes:
        questions: all of them.
        cached: those whose replies are on disk.
        prompt_tokens: about so many are sent.
        new_tokens: at most (or about, where the request sets no limit) so many come back.
    """

    questions: int
    cached: int
    prompt_tokens: int
    new_tokens: int

    def text(self, prices: Sequence[float] | None = None) -> str:
        """One line.

        Args:
            prices: dollars for a million tokens sent, and for a million that come back.
        """
        line = f"{self.questions - self.cached} requests ({self.cached} of {self.questions} known)"
        line += f", about {self.prompt_tokens} tokens to send, at most {self.new_tokens} back"
        if prices:
            cost = (self.prompt_tokens * prices[0] + self.new_tokens * prices[1]) / 1e6
            line += f", at most about {cost:.2f} dollars"
        return line


def tokens_of(text: str) -> int:
    """About so many tokens: a quarter of the bytes, which is near for English."""
    return math.ceil(len(text.encode("utf-8", "replace")) / 4)


def estimate(questions: Sequence[Question], model: str, cache: Cache) -> Estimate:
    """Counts what has to be asked, each question once."""
    cached = sent = back = 0
    for question in questions:
        body = question.body(model)
        if cache.get(cache_key(body, question.run)) is not None:
            cached += 1
            continue
        sent += 3 + sum(4 + tokens_of(message["content"]) for message in body["messages"])
        limit = body.get("max_tokens") or body.get("max_completion_tokens")
        back += int(limit) if isinstance(limit, int | float) else _GUESSED_REPLY
    return Estimate(len(questions), cached, sent, back)


@dataclass
class Judge:
    """A model that answers questions.

    Attributes:
        endpoint: where it is.
        model: its name there.
        cache: of replies, entered.
        concurrency: requests at a time.
        reasks: a question whose reply cannot be read is asked so many times more.
        prompt_tokens: that the server counted so far, without those of cached replies.
        new_tokens: likewise.
    """

    endpoint: Endpoint
    model: str
    cache: Cache
    concurrency: int = 4
    reasks: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(
        self, questions: Sequence[Question], console: Console, label: str
    ) -> Iterator[tuple[int, Verdict]]:
        """Position and verdict of each question, as they come.

        Args:
            questions: to ask.
            console: for progress.
            label: what is counted there.

        Raises:
            UserError: no question can be answered; replies so far are kept.
        """
        if not questions:
            return
        left = iter(enumerate(questions))
        pending: dict[Future[Verdict], int] = {}
        answered = failed = 0
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            with Meter(console, label, len(questions)) as meter:
                while True:
                    while len(pending) < 2 * self.concurrency:
                        position, question = next(left, (-1, None))
                        if question is None:
                            break
                        pending[pool.submit(self._judge, question)] = position
                    if not pending:
                        return
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=pending.__getitem__):
                        position, verdict = pending.pop(future), future.result()
                        answered += verdict.reply is not None
                        failed += verdict.reply is None
                        if failed >= _HOPELESS and not answered:
                            where = f"the judge at {self.endpoint.shown} answers nothing"
                            raise UserError(f"{where}: {verdict.problem}")
                        meter.advance(1)
                        yield position, verdict
        except BaseException:
            self.endpoint.close()  # ends waits, so that the threads end
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _judge(self, question: Question) -> Verdict:
        first: str | None = None
        for attempt in range(self.reasks + 1):
            body = question.body(self.model, attempt)
            key = cache_key(body, question.run, attempt)
            reply = self.cache.get(key)
            if reply is None:
                try:
                    reply = self.endpoint.ask(body)
                except NoReplyError as error:
                    if first is None:
                        return Verdict(question, None, None, str(error))
                    break
                self.cache.put(key, reply)
                with self._lock:
                    self.prompt_tokens += reply.prompt_tokens
                    self.new_tokens += reply.new_tokens
            first = reply.text if first is None else first
            metrics = question.read(reply.text)
            if metrics is not None:
                return Verdict(question, reply.text, metrics)
        return Verdict(question, first, None, f"the reply cannot be read: {_short(first or '')!r}")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:60] + "..."
