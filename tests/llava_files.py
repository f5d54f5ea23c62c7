"""Small data files in the LLaVA format, shared by tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

SIZES = {"a.png": (60, 40), "sub/b.png": (200, 120), "textvqa/c.png": (90, 140)}


def turn(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def talk(question: str = "<image>\nWhat?", answer: str = "A sign.") -> list[dict[str, str]]:
    return [turn("human", question), turn("gpt", answer)]


def write(path: Path, rows: Any, lines: bool = False) -> Path:
    text = "\n\n".join(map(json.dumps, rows)) if lines else json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def draw_images(root: Path) -> Path:
    """Writes the pictures of `SIZES` and one that is cut off."""
    for number, (name, size) in enumerate(SIZES.items()):
        (root / name).parent.mkdir(exist_ok=True)
        Image.radial_gradient("L").resize(size).rotate(90 * number).save(root / name)
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:90])
    return root


ROWS: list[dict[str, Any]] = [
    {"id": "one", "image": "a.png", "conversations": talk("What is it?\n<image>")},
    {"id": 2, "conversations": [*talk("Hello.", "Hi."), turn("human", "No answer")]},
    {
        "id": "three",
        "images": ["a.png", "sub/b.png"],
        "conversations": [
            turn("gpt", "Welcome."),
            *talk("<image> and <image>: which?", "Both."),
            *talk("Why?", ""),
        ],
    },
    {"id": "four", "image": "textvqa/c.png", "conversations": talk()},
]
