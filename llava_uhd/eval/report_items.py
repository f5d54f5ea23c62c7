"""The items that a report shows: wrong ones first, with small pictures, within bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.errors import UserError
from llava_uhd.eval.answers import read_lines
from llava_uhd.eval.results import ITEMS_FILE, TaskResult
from llava_uhd.images.pictures import data_uri
from llava_uhd.images.pixels import open_image

SHOWN = 120  # items of a task
WRONG = 90  # of them, if there are so many
RIGHT = 0.5  # a value from here on is shown as right
PICTURES = 2  # of an item
SIDE = 160  # longer side of a picture, pixels
MOST_PICTURES = 600  # of the page
MOST_BYTES = 8_000_000  # of all of them, as text
LONGEST = 2000  # letters of a prompt, answer or reference


class Album:
    """Small pictures, until the bounds of the page are reached."""

    def __init__(self) -> None:
        self.made: dict[str, str] = {}  # each is made once, and counts wherever it is shown
        self.count = self.size = self.left_out = 0

    def picture(self, path: str) -> str | None:
        """A data URI, or None where the file cannot be read or the page is full."""
        if self.count >= MOST_PICTURES or self.size >= MOST_BYTES:
            self.left_out += 1
            return None
        if path not in self.made:
            try:
                self.made[path] = data_uri(open_image(path), SIDE)
            except UserError:  # shown as a missing picture
                self.made[path] = ""
        self.count += bool(self.made[path])
        self.size += len(self.made[path])
        return self.made[path] or None


def value_of(row: Mapping[str, Any], metric: str) -> tuple[str, float] | None:
    """The metric that says whether an item is right: the main one, or its first."""
    known = row.get("metrics") or {}
    name = metric if metric in known else next(iter(known), None)
    return None if name is None else (name, float(known[name]))


def choose(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """At most `SHOWN` items in their order: wrong ones, spread over all, then right ones."""
    wrong: list[int] = []
    right: list[int] = []
    for index, row in enumerate(rows):
        value = value_of(row, metric)
        (wrong if value is not None and value[1] < RIGHT else right).append(index)
    first = _spread(wrong, max(WRONG, SHOWN - len(right)))
    return [rows[index] for index in sorted(first + _spread(right, SHOWN - len(first)))]


def _spread(places: Sequence[int], most: int) -> list[int]:
    if len(places) <= most:
        return list(places)
    return [places[n * len(places) // most] for n in range(most)]


def items_of(folder: Path, result: TaskResult, album: Album) -> dict[str, Any]:
    """Items of a task as the page shows them.

    Args:
        folder: of the task.
        result: its scores.
        album: of the page.

    Returns:
        ``rows``, ``total`` and ``wrong``, the numbers of all items and of the wrong ones.
    """
    path = folder / ITEMS_FILE
    rows = read_lines(path) if path.is_file() else []
    values = [value_of(row, result.metric) for row in rows]
    return {
        "total": len(rows),
        "wrong": sum(value is not None and value[1] < RIGHT for value in values),
        "rows": [_shown(row, result, album) for row in choose(rows, result.metric)],
    }


def _shown(row: Mapping[str, Any], result: TaskResult, album: Album) -> dict[str, Any]:
    value = value_of(row, result.metric)
    paths = [str(path) for path in row.get("images") or []]
    prompt = str(row.get("prompt") or row.get("question") or "")
    return {
        "task": result.task,
        "id": _text(row["id"]),
        "state": "unknown" if value is None else "right" if value[1] >= RIGHT else "wrong",
        "value": "no score" if value is None else f"{value[0]} {value[1]:.4g}",
        "pictures": [
            {"name": Path(path).name, "uri": album.picture(path)} for path in paths[:PICTURES]
        ],
        "more": max(len(paths) - PICTURES, 0),
        "question": _text(row.get("question", "")),
        "prompt": _text(prompt),
        "answer": _text(row.get("answer", "")),
        "parsed": _text(row.get("parsed", "")),
        "reference": _text(row.get("reference", "")),
        "groups": [f"{name}: {value}" for name, value in (row.get("groups") or {}).items()],
        "tokens": f"{row.get('prompt_tokens', '?')} + {row.get('new_tokens', '?')} tokens",
    }


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text)} letters)"
