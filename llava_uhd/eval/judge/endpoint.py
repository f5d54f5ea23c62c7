"""A chat model behind an OpenAI-compatible server: requests, retries, pauses that it asks for."""

from __future__ import annotations

import dataclasses
import email.utils
import importlib
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from llava_uhd.errors import UserError

PUBLISHED_URL = "https://api.openai.com/v1"
URL_VARIABLES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
KEY_VARIABLE = "OPENAI_API_KEY"

_PATH = "/chat/completions"
_LATER = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
# Wrong for one request only: too long, or held back by a filter.
_THIS_REQUEST = {400, 413, 422}


class NoReplyError(Exception):
    """One request got no reply; others may."""


@dataclass(frozen=True)
class Retry:
    """When a request is sent again.

    Attributes:
        retries: so often, beyond the first time.
        first_wait: seconds before the first of them; doubled each time.
        longest_wait: seconds, the doubling ends there.
        patience: seconds that the server may ask to wait; what asks for more gets no reply.
    """

    retries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    patience: float = 600.0

    def wait(self, attempt: int) -> float:
        """Seconds before retry number ``attempt`` (from 0), without the random part."""
        return min(self.first_wait * 2.0**attempt, self.longest_wait)


@dataclass(frozen=True)
class Reply:
    """What the server answered.

    Attributes:
        text: of the first choice; empty where there is none.
        model: as the server names it.
        prompt_tokens: as the server counts, 0 where it does not.
        new_tokens: likewise.
        finish: why the text ended there, for instance "stop" or "length".
    """

    text: str
    model: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    finish: str = ""


@dataclass(frozen=True)
class _Trouble:
    reason: str
    again: bool = True
    after: float | None = None


class Endpoint:
    """Sends requests from any number of threads.

    The key comes from the environment and goes into the header of requests, nowhere else.

    Args:
        base_url: up to the version, for instance ``http://localhost:8000/v1``.
        key_variable: environment variable of the key; unset means no key.
        timeout: seconds for one request.
        retry: see there.

    Raises:
        UserError: an address that cannot be used, or no library for HTTP.
    """

    def __init__(
        self,
        base_url: str,
        key_variable: str = KEY_VARIABLE,
        timeout: float = 300.0,
        retry: Retry | None = None,
    ) -> None:
        self.url, self.shown = _addresses(base_url)
        self.retry = retry or Retry()
        self.requests = 0
        self._key = read_key(key_variable)
        self._key_variable = key_variable
        self._http = _library()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # A proxy that the environment names does not see this machine.
        elsewhere = urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1")
        self._client = self._http.Client(headers=headers, timeout=timeout, trust_env=elsewhere)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._not_before = 0.0

    def close(self) -> None:
        """Ends waits and connections."""
        self._ended.set()
        self._client.close()

    def ask(self, body: Mapping[str, Any]) -> Reply:
        """The reply to one request.

        Args:
            body: of the request.

        Raises:
            NoReplyError: this request got none, after all retries.
            UserError: no request can get one: key, address or model are wrong, or the quota is
                used up.
        """
        trouble = _Trouble("not asked")
        for attempt in range(self.retry.retries + 1):
            self._hold()
            outcome = self._once(body)
            if isinstance(outcome, Reply):
                return outcome
            trouble = outcome
            if not trouble.again:
                raise NoReplyError(trouble.reason)
            if trouble.after is not None and trouble.after > self.retry.patience:
                raise NoReplyError(f"{trouble.reason}; it asks to wait {trouble.after:.0f} s")
            if attempt < self.retry.retries:
                self._wait(attempt, trouble.after)
        times = self.retry.retries + 1
        raise NoReplyError(f"{trouble.reason} (asked {times} times)")

    def _wait(self, attempt: int, after: float | None) -> None:
        if after is None:
            self._sleep(self.retry.wait(attempt) * (1 + random.random() / 4))
            return
        # The server is busy for everyone: all threads wait.
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + after)

    def _hold(self) -> None:
        while (left := self._not_before - time.monotonic()) > 0:
            self._sleep(left)

    def _sleep(self, seconds: float) -> None:
        if self._ended.wait(seconds):
            raise NoReplyError("stopped")

    def _once(self, body: Mapping[str, Any]) -> Reply | _Trouble:
        if self._ended.is_set():
            raise NoReplyError("stopped")
        with self._lock:
            self.requests += 1
        try:
            response = self._client.post(self.url, json=dict(body))
        except self._http.TransportError as error:
            return _Trouble(self._clean(f"{type(error).__name__}: {error}".rstrip(": ")))
        except RuntimeError:  # the client was closed meanwhile
            raise NoReplyError("stopped") from None
        if response.status_code == 200:
            reply = _read_reply(response)
            if reply is None:
                text = self._clean(response.text[:200])
                return _Trouble(f"the reply is no chat completion ({text!r})")
            return dataclasses.replace(reply, text=self._hidden(reply.text))
        return self._refusal(response)

    def _refusal(self, response: Any) -> _Trouble:
        status, code, said = response.status_code, *_read_error(response)
        reason = self._clean(f"status {status}: {said}" if said else f"status {status}")
        if status in _THIS_REQUEST:
            return _Trouble(reason, again=False)
        if status in _LATER and code != "insufficient_quota":
            return _Trouble(reason, after=retry_after(response.headers))
        advice = "look at --base-url"
        if status in (401, 403):
            advice = f"set the environment variable {self._key_variable} to a valid key"
        elif status == 404:
            advice = "look at --base-url and --model"
        elif code == "insufficient_quota":
            advice = "the quota of this key is used up"
        raise UserError(f"the judge at {self.shown} refuses: {reason}; {advice}")

    def _clean(self, text: str) -> str:
        """For messages of one line."""
        return " ".join(self._hidden(text).split())

    def _hidden(self, text: str) -> str:
        """Some servers repeat the key."""
        return text.replace(self._key, "***") if self._key else text


def read_key(variable: str) -> str:
    """The key in an environment variable, or an empty text.

    Raises:
        UserError: it has characters that a header cannot hold.
    """
    key = os.environ.get(variable, "").strip()
    if not all(" " < character < "\x7f" for character in key):
        raise UserError(f"the environment variable {variable} holds no key: spaces or odd letters")
    return key


def default_url() -> str:
    """The server that the environment names, or OpenAI's."""
    named = (os.environ.get(name, "").strip() for name in URL_VARIABLES)
    return next(filter(None, named), PUBLISHED_URL)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: ``Retry-After`` in seconds or as a date.

    Example: ``{"retry-after": "2"}`` gives 2.0.
    """
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):
            continue
    try:
        when = email.utils.parsedate_to_datetime(headers["retry-after"])
    except (KeyError, ValueError, TypeError):
        return None
    return max(0.0, when.timestamp() - time.time())


def _addresses(base_url: str) -> tuple[str, str]:
    """Where to send requests, and what may be shown of it."""
    try:
        parts = urlsplit(base_url)
        host = parts.hostname
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise UserError(
            f"--base-url {base_url!r} is no address: write for instance http://localhost:8000/v1"
        )
    if "@" in parts.netloc:
        raise UserError("--base-url must not hold a user or a password: a key in the environment")
    path = parts.path.rstrip("/").removesuffix(_PATH)
    shown = urlunsplit((parts.scheme, parts.netloc, path, "", ""))
    return urlunsplit((parts.scheme, parts.netloc, path + _PATH, parts.query, "")), shown


def _library() -> Any:
    # The hub's client brings one of the two, by its version; their interfaces are the same.
    for name in ("httpx2", "httpx"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError("the judge needs a library for HTTP: pip install httpx")


def _read_reply(response: Any) -> Reply | None:
    """The reply, or None where the body is no chat completion."""
    try:
        value = response.json()
        choice = value["choices"][0]
        text = choice["message"].get("content")
        if text is not None and not isinstance(text, str):
            return None
        usage = value.get("usage") or {}
        return Reply(
            text or "",
            str(value.get("model") or ""),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
            str(choice.get("finish_reason") or ""),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _read_error(response: Any) -> tuple[str, str]:
    """Code and message of a refusal."""
    try:
        error = response.json()["error"]
        if isinstance(error, str):
            return "", error[:300]
        return str(error.get("code") or ""), str(error.get("message") or "")[:300]
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", response.text[:200]
