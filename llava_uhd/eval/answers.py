"""Answers on disk: one JSON line each, written as they come, never lost, never mixed.

Every process appends to its own file ``log.rankN.jsonl`` in the task's folder. A line carries the
hash of the settings it was made with. Whoever starts later reads all files, whatever the number of
processes was, and goes on with what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llava_uhd.errors import UserError

SETTINGS_FILE = "settings.json"
MERGED_FILE = "answers.jsonl"
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "str | int": (str, int)}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said to one question.

    Attributes:
        id: of the item.
        prompt: as sent, each image still a marker.
        text: generated, without special tokens, stripped.
        prompt_tokens: length of the prompt, images included.
        new_tokens: generated tokens, the end token included.
    """

    id: str | int
    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int


def settings_hash(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of everything that can change an answer."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one piece: readers see the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    partial.write_bytes(text.encode("utf-8", "replace"))
    partial.replace(path)


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes JSON lines in one piece."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="replace") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    partial.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file; a last line without its newline was cut off and is left out.

    Raises:
        UserError: any other line that is not a JSON object with an id.
    """
    rows = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
            raise UserError(
                f"{path}, line {number} is not an answer: the file was damaged; remove the line, "
                "or start again with --overwrite"
            )
        rows.append(row)
    return rows


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a folder whose answers were made in another way.

    Raises:
        UserError: names the settings that differ.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return
    try:
        found = dict(json.loads(path.read_text("utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: start again with --overwrite") from None
    if settings_hash(found) == settings_hash(settings):
        return
    now = json.loads(json.dumps(settings, default=str))  # tuples become lists, as on disk
    differing = [
        f"{key} was {_short(found.get(key))}, is {_short(now.get(key))}"
        for key in sorted({*found, *now})
        if found.get(key) != now.get(key)
    ]
    raise UserError(
        f"{folder} holds answers made with other settings ({'; '.join(differing)}): start again "
        "with --overwrite, or keep them and pass another --output"
    )


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else text[:40] + "..."


def read_answers(folder: Path, settings: Mapping[str, Any]) -> dict[str | int, Answer]:
    """Answers of all log files of a task.

    Raises:
        UserError: damaged lines, foreign settings, or an id answered twice.
    """
    expected = settings_hash(settings)
    answers: dict[str | int, Answer] = {}
    for path in sorted(folder.glob("log.rank*.jsonl")):
        for row in read_lines(path):
            if row.get("settings") != expected:
                raise UserError(
                    f"{path}: the answer to {row['id']!r} was made with other settings: start "
                    "again with --overwrite, or pass another --output"
                )
            if row["id"] in answers:
                raise UserError(
                    f"{path}: {row['id']!r} was answered twice: start again with --overwrite"
                )
            answers[row["id"]] = make_answer(row, path)
    return answers


def make_answer(row: Mapping[str, Any], path: Path) -> Answer:
    """An answer from its JSON line.

    Raises:
        UserError: a field is missing, or has another type.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Answer):
        if field.name not in row:
            raise UserError(f"{path}: the answer to {row['id']!r} has no field '{field.name}'")
        value, kinds = row[field.name], _KINDS[str(field.type)]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise UserError(
                f"{path}: the answer to {row['id']!r} is damaged: '{field.name}' is "
                f"{_short(value)}; remove the line, or start again with --overwrite"
            )
        values[field.name] = value
    return Answer(**values)


class AnswerLog:
    """The log file of one process, as a context manager.

    Args:
        folder: of the task.
        rank: number of this process.
        settings: see `settings_hash`.

    Raises:
        UserError: another process writes the same file.
    """

    def __init__(self, folder: Path, rank: int, settings: Mapping[str, Any]) -> None:
        self.path = folder / f"log.rank{rank}.jsonl"
        self.hash = settings_hash(settings)
        self._file = self.path.open("a+b")

    def __enter__(self) -> AnswerLog:
        self._lock()
        # A line that a kill cut off would merge with the next one.
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, answers: Sequence[Answer], seconds: float) -> None:
        """Writes answers to disk; ``seconds`` is the time the batch took."""
        lines = [
            {**dataclasses.asdict(answer), "seconds": round(seconds, 4), "settings": self.hash}
            for answer in answers
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._file.write(text.encode("utf-8", "replace"))
        self._file.flush()

    def _lock(self) -> None:
        lock_file(
            self._file,
            f"{self.path} is being written by another evaluation: wait for it, or pass another "
            "--output",
        )


def lock_file(file: IO[bytes], message: str) -> None:
    """Locks an open file until it is closed, where the system has locks.

    Raises:
        UserError: with the message, where another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(message) from None
    except OSError:
        return  # a file system without locks
