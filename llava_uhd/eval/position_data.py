"""Pictures of the position test: grids of coloured shapes, drawn from a seed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_uhd.data.drawing import COLOURS, SHAPES, Box, Mark, Scene, render
from llava_uhd.errors import UserError, make_folder
from llava_uhd.images.geometry import Size

QUESTIONS_FILE = "questions.jsonl"
STAMP_FILE = "position.json"
FORMAT = 1  # raise when the same seed would draw something else
SHARE = 0.6  # side of a shape, as a share of the shorter side of its place

# (width, height) -> (columns, rows) of shapes. Slices halve or third a side; five and seven places
# put shapes across their borders, beside them and far from them. The first is never sliced at 336.
GRIDS: dict[Size, Size] = {
    (336, 336): (4, 4),
    (672, 448): (7, 5),
    (448, 672): (5, 7),
    (672, 672): (5, 5),
    (1008, 672): (7, 5),
    (672, 1008): (5, 7),
    (1344, 336): (9, 3),
}


@dataclass(frozen=True)
class PositionConfig:
    """Size of a test.

    Attributes:
        pictures: of each size.
        seed: of everything.
    """

    pictures: int = 2
    seed: int = 0


def place_box(size: Size, grid: Size, column: int, row: int) -> Box:
    """Box (left, top, right, bottom) of the shape in a place, in pixels.

    Example: ``place_box((100, 50), (2, 1), 0, 0)`` is ``(10, 10, 40, 40)``.
    """
    width, height = size[0] / grid[0], size[1] / grid[1]
    side = round(SHARE * min(width, height))
    left = round((column + 0.5) * width - side / 2)
    top = round((row + 0.5) * height - side / 2)
    return left, top, left + side, top + side


def draw_grid(size: Size, seed: int, index: int) -> Scene:
    """A picture whose every place has a shape of random kind and colour, row by row."""
    rng = np.random.default_rng([seed, *size, index])
    columns, rows = GRIDS[size]
    colours = list(COLOURS)
    marks = [
        Mark(
            SHAPES[int(rng.integers(len(SHAPES)))],
            colours[int(rng.integers(len(colours)))],
            place_box(size, (columns, rows), column, row),
        )
        for row in range(rows)
        for column in range(columns)
    ]
    return Scene(size, marks=marks)


def questions_of(scene: Scene, name: str, image: str) -> Iterator[dict[str, Any]]:
    """A question for each place, and one for the number of each kind of shape."""
    columns, rows = GRIDS[scene.size]
    about = {"image": image, "size": list(scene.size), "grid": [columns, rows]}
    for index, mark in enumerate(scene.marks):
        row, column = divmod(index, columns)
        yield {
            "question_id": f"{name}-{row + 1}-{column + 1}",
            **about,
            "text": f"What is in row {row + 1}, column {column + 1}, counted from the top left? "
            "Answer with its colour and shape.",
            "answer": f"{mark.colour} {mark.shape}",
            "category": "place",
            "row": row,
            "column": column,
            "box": list(mark.box),
        }
    for shape in SHAPES:
        yield {
            "question_id": f"{name}-{shape}",
            **about,
            "text": f"How many {shape}s are in the picture? Answer with a number.",
            "answer": str(sum(mark.shape == shape for mark in scene.marks)),
            "category": "count",
        }


def is_drawn(folder: Path, config: PositionConfig) -> bool:
    """Whether a folder holds this very test."""
    file = folder / STAMP_FILE
    return file.is_file() and file.read_text("utf-8") == _stamp(config)


def _stamp(config: PositionConfig) -> str:
    return json.dumps({"format": FORMAT, **vars(config)})


def draw(folder: Path, config: PositionConfig) -> None:
    """Draws a test; several processes may do so at once, and nothing half is ever seen.

    Args:
        folder: made if missing; a test of other settings in it is replaced.
        config: how much.

    Raises:
        UserError: the folder cannot be written, or holds something else.
    """
    if is_drawn(folder, config):
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / STAMP_FILE).is_file():
        raise UserError(f"{folder} holds something else than a position test: move it away")
    make_folder(folder.parent, "folder of the data")
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(work, config)
        work.chmod(0o755)
        if folder.exists() and not is_drawn(folder, config):
            shutil.rmtree(folder)
        try:
            os.rename(work, folder)  # fails where another process was faster
        except OSError as error:
            if not is_drawn(folder, config):
                reason = error.strerror or error
                raise UserError(f"{folder} cannot be written ({reason})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(folder: Path, config: PositionConfig) -> None:
    (folder / "images").mkdir()
    with (folder / QUESTIONS_FILE).open("w", encoding="utf-8") as stream:
        for size in GRIDS:
            for index in range(config.pictures):
                scene = draw_grid(size, config.seed, index)
                name = f"{size[0]}x{size[1]}-{index}"
                Image.fromarray(render(scene)).save(folder / "images" / f"{name}.png")
                for row in questions_of(scene, name, f"{name}.png"):
                    stream.write(json.dumps(row) + "\n")
    (folder / STAMP_FILE).write_text(_stamp(config), "utf-8")
