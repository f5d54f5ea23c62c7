"""Replies on disk, one JSON line each: whoever asks the same again gets them from there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llava_uhd.errors import UserError, make_folder
from llava_uhd.eval.answers import lock_file, read_lines
from llava_uhd.eval.judge.endpoint import Reply


def cache_key(body: Mapping[str, Any], run: int = 0, attempt: int = 0) -> str:
    """32 hexadecimal digits of a request: model, messages, parameters, and which time it is asked.

    The address of the server and the key are no part of it.
    """
    text = json.dumps([dict(body), run, attempt], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """A file of replies, as a context manager; used by several threads of one process.

    Args:
        path: of the file; made on entry. A last line that a kill cut off is dropped.
        write: False only looks, and leaves the file as it is.

    Raises:
        UserError: a damaged file, or one that another process writes.
    """

    def __init__(self, path: Path, write: bool = True) -> None:
        self.path, self.write = path, write
        self._replies: dict[str, Reply] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Cache:
        if self.write:
            make_folder(self.path.parent, "folder of the cache")
            try:
                self._file = self.path.open("a+b")
            except OSError as error:
                raise UserError(f"{self.path} cannot be written: {error.strerror}") from error
            lock_file(self._file, f"{self.path} is being written by another judge: wait for it")
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)
        for row in read_lines(self.path) if self.path.is_file() else []:
            self._replies[row["id"]] = _reply(row, self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.write:
            self._file.close()

    def get(self, key: str) -> Reply | None:
        """The reply to a request, or None."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keeps a reply, on disk too."""
        line = json.dumps({"id": key, **dataclasses.asdict(reply)}, ensure_ascii=True) + "\n"
        with self._lock:
            self._replies[key] = reply
            self._file.write(line.encode())
            self._file.flush()


def _reply(row: Mapping[str, Any], path: Path) -> Reply:
    try:
        return Reply(**{field.name: row[field.name] for field in dataclasses.fields(Reply)})
    except KeyError as error:
        raise UserError(f"{path}: the line of {row['id']!r} has no field {error}") from None
