"""What the tests of benchmarks share: small published files, and scores of golden ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_uhd.eval.offline import score_file
from llava_uhd.eval.tasks import find_task


def lines(path: Path, rows: list[Any]) -> Path:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def whole(path: Path, value: Any) -> Path:
    """Writes one JSON value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
    return path


def answers_file(path: Path, texts: dict[Any, str], prompt: str = "?") -> Path:
    """Writes an answers file."""
    return lines(
        path, [{"question_id": key, "prompt": prompt, "text": text} for key, text in texts.items()]
    )


def golden_scores(folder: Path) -> Any:
    """The scores of a golden folder."""
    return json.loads((folder / "scores.json").read_text("utf-8"))


def scored(task: str, root: Path, file: Path, compatible: bool = False) -> Any:
    """What ``score --task`` writes."""
    return score_file(find_task(task), root, file, "published" if compatible else "default")


def same(found: list[Any], expected: list[Any]) -> None:
    """Compares scores, item by item."""
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, abs=1e-9)


def submitted(task: str, root: Path, file: Path, compatible: bool = False) -> dict[str, bytes]:
    """Submission files made of an answers file, without images."""
    found = find_task(task).in_mode("published" if compatible else "default")
    place = found.root(root)
    items = list(found.items(place))
    return dict(found.submission(place, items, found.read_published(place, file)))
