"""What the tests of benchmarks share: small published files, and scores of golden ones."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fixtures_tiny import picture

from llava_uhd.eval.offline import score_file
from llava_uhd.eval.tasks import find_task
from llava_uhd.eval.tasks.question_file import SHORT


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


def make_textvqa(root: Path) -> Path:
    """Three questions about two pictures, which are not there."""
    folder = root / "textvqa"
    data = [
        {"question": "What Is It?", "image_id": "a", "answers": ["cup"] * 10},
        {"question": "Who?", "image_id": "a", "answers": ["bob"] * 2 + ["ann"] * 8},
        {"question": "Who?", "image_id": "b", "answers": ["zoe"] * 10},
    ]
    whole(folder / "TextVQA_0.5.1_val.json", {"data": data})
    texts = [f"{row['question']}\nReference OCR token: X, Y{SHORT}" for row in data]
    rows = [
        {"question_id": row["image_id"], "image": f"{row['image_id']}.jpg", "text": text}
        for row, text in zip(data, texts)
    ]
    lines(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    return folder


def make_mmbench(root: Path, folder: str, table: str) -> Path:
    """One question in two copies; the second one names the row that holds the picture."""
    buffer = io.BytesIO()
    picture(20, 12, seed=1).save(buffer, "PNG")
    image = base64.b64encode(buffer.getvalue()).decode()
    names = "index question hint A B C D answer category image source l2-category comment split"
    options = [["red", "a cup", "None", "blue"], ["a cup", "red", "", ""]]
    rows = [names.split()]
    for copy, answer in enumerate("BA"):
        row = [str(1_000_000 * copy + 3), "What?", "Look." * copy, *options[copy], answer]
        rows.append([*row, "c", image if not copy else "3", "s", "l", "", "dev"])
    path = root / folder / f"{table}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8")
    return path.parent
