r"""Embedded data: pictures drawn from a seed, with questions that need native resolution.

A picture carries one sign of three digits, a coloured mark and some grey strokes. The sign is
legible at native size and lost when the whole picture is shrunk to one small square view; the mark
survives that, so questions about it tell a model that sees too little from one that sees nothing.

The answers of the held-out questions are held out too: the strings that `is_held_out` names never
stand on a training picture, so a right answer was read, not remembered.

::

    python -m llava_uhd.data.synthetic --out DIR [--train N] [--tiles N] [--eval N] [--seed S]

writes ``pretrain.json`` and ``finetune.json`` (LLaVA JSON), ``eval.jsonl`` (questions with answers)
and the PNG files under ``images/``. What is there already is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_uhd.data.drawing import (
    CELL,
    PITCH,
    Box,
    Scene,
    Sign,
    draw_background,
    draw_lines,
    draw_mark,
    overlaps,
    render,
)
from llava_uhd.data.synthetic_mixed import write_mixed
from llava_uhd.errors import UserError, command, make_folder
from llava_uhd.images.geometry import SlicePlan, plan_slices

logger = logging.getLogger(__name__)

TILE = 64  # side in pixels of the views these data are made for
PATCH = 8
MAX_SLICES = 7

# Cut by `plan_slices` into slices of native size or a little (at most 5 %) above it.
TRAIN_SIZES = (
    (192, 128),
    (128, 192),
    (184, 112),
    (112, 184),
    (128, 128),
    (256, 64),
    (64, 256),
    (384, 64),
    (64, 384),
    (160, 96),
    (96, 160),
)
# The largest areas, two of them no multiple of the tile, and the longest shapes.
EVAL_SIZES = ((192, 128), (128, 192), (184, 112), (112, 184), (384, 64), (64, 384))

SIGN_QUESTION = "What does the sign say?"
MARK_QUESTIONS = {
    "colour": "What colour is the mark?",
    "shape": "What shape is the mark?",
}
CAPTION_REQUEST = "Read the picture."

# One stream of random numbers per kind of picture.
STREAMS = {"pretrain": 1, "finetune": 2, "eval": 3}
FORMAT = 2  # raise when the same parameters would draw something else


@dataclass(frozen=True)
class SyntheticConfig:
    """Size of a data set.

    Attributes:
        tiles: pictures of one view for the first stage.
        train: large pictures for the second stage.
        eval: held-out pictures, each with a question about the sign and one about the mark.
        seed: of everything.
        mixed: the second stage has records of every kind, see `llava_uhd.data.synthetic_mixed`.
    """

    tiles: int = 8000
    train: int = 4800
    eval: int = 200
    seed: int = 0
    mixed: bool = False

    def __post_init__(self) -> None:
        for name in ("tiles", "train", "eval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


# Sets that recipes name under ``data.embedded``.
EMBEDDED = {
    "quickstart": SyntheticConfig(),
    "debug": SyntheticConfig(tiles=16, train=16, eval=4),
    "debug_mixed": SyntheticConfig(tiles=16, train=16, eval=4, mixed=True),
}


@dataclass(frozen=True)
class Split:
    """One written part of a data set.

    Attributes:
        file: LLaVA JSON, or JSONL of questions.
        image_folder: its image paths are relative to it.
        video_folder: the same for videos; None without any.
    """

    file: Path
    image_folder: Path
    video_folder: Path | None = None


def is_held_out(text: str) -> bool:
    """Whether a string of three digits is kept for evaluation.

    A tenth of all strings; every digit is equally frequent at every place among them.
    """
    first, second, third = (int(digit) for digit in text)
    return (first + 2 * second + 3 * third) % 10 == 7


def draw_text(rng: np.random.Generator, length: int, held_out: bool = False) -> str:
    """Random digits; three of them are held out or not, as asked."""
    while True:
        text = "".join(str(digit) for digit in rng.integers(0, 10, length))
        if length != 3 or is_held_out(text) == held_out:
            return text


def place_sign(
    rng: np.random.Generator, size: tuple[int, int], text: str, avoid: list[Box]
) -> Sign | None:
    """A sign at a random place, no closer than 7 rows to others; None if 30 tries fail."""
    width = PITCH * (len(text) - 1) + CELL[0]
    for _ in range(30):
        left = int(rng.integers(0, size[0] - width + 1))
        top = int(rng.integers(0, size[1] - CELL[1] + 1))
        sign = Sign(text, left, top)
        if not any(overlaps((0, top, size[0], sign.box[3]), box, 7) for box in avoid):
            return sign
    return None


def draw_scene(rng: np.random.Generator, size: tuple[int, int], texts: list[str]) -> Scene:
    """A scene with signs of the given texts (as many as fit), a mark and strokes.

    Signs are sorted from top to bottom; no two share a row.
    """
    background, ink = draw_background(rng)
    signs: list[Sign] = []
    for text in texts:
        sign = place_sign(rng, size, text, [other.box for other in signs])
        if sign is not None:
            signs.append(sign)
    signs.sort(key=lambda sign: sign.top)
    boxes = [sign.box for sign in signs]
    mark = draw_mark(rng, size, boxes)
    marks = [] if mark is None else [mark]
    lines = draw_lines(rng, size, int(rng.integers(0, 4)), boxes + [mark.box for mark in marks])
    return Scene(size, background, ink, signs, marks, lines)


def tile_scene(seed: int, index: int) -> Scene:
    """A first-stage picture: one to three signs of one to three digits on one tile."""
    rng = np.random.default_rng([seed, STREAMS["pretrain"], index])
    lengths = rng.integers(1, 4, int(rng.integers(1, 4)))
    return draw_scene(rng, (TILE, TILE), [draw_text(rng, int(length)) for length in lengths])


def large_scene(seed: int, index: int, stream: str) -> Scene:
    """A picture with one sign of three digits and a mark; ``stream`` is "finetune" or "eval"."""
    sizes = EVAL_SIZES if stream == "eval" else TRAIN_SIZES
    for attempt in range(100):
        rng = np.random.default_rng([seed, STREAMS[stream], index, attempt])
        size = sizes[int(rng.integers(len(sizes)))]
        scene = draw_scene(rng, size, [draw_text(rng, 3, held_out=stream == "eval")])
        if scene.signs and scene.marks:
            return scene
    raise AssertionError("no room for a sign and a mark in 100 tries")


def caption(scene: Scene) -> str:
    """What the first stage learns to say: the signs from top to bottom, then the mark.

    Example: ``347,12 red circle``.
    """
    signs = ",".join(sign.text for sign in scene.signs)
    marks = [f" {mark.colour} {mark.shape}" for mark in scene.marks]
    return "".join([signs, *marks])


def plan_scene(scene: Scene) -> SlicePlan:
    """How the slicer cuts the picture with the settings that these data are made for."""
    return plan_slices(*scene.size, MAX_SLICES, TILE, PATCH, bounded=True)


def sign_cut(scene: Scene) -> str:
    """How the borders between slices meet the sign.

    Returns:
        "whole" (in one slice), "between" (a border runs between two digits) or "through" (a border
        runs through the pixels of a digit, so that no slice shows all of it).
    """
    plan = plan_scene(scene)
    if plan.grid is None or plan.refine_size is None:
        return "whole"
    sign = scene.signs[0]
    borders_x = [scene.size[0] * k / plan.grid[0] for k in range(1, plan.grid[0])]
    borders_y = [scene.size[1] * k / plan.grid[1] for k in range(1, plan.grid[1])]

    def crossed(box: Box) -> bool:
        # The last column of a glyph cell is empty.
        inside_x = any(box[0] < border < box[2] - 1 for border in borders_x)
        return inside_x or any(box[1] < border < box[3] for border in borders_y)

    if any(crossed(box) for box in sign.glyph_boxes):
        return "through"
    return "between" if crossed(sign.box) else "whole"


def finetune_turns(scene: Scene, index: int) -> list[dict[str, str]]:
    """Conversation about a picture: the sign; for every second picture also its mark.

    Colour and shape alternate, and so does the order of the two questions.
    """
    rounds = [(SIGN_QUESTION, scene.signs[0].text)]
    if index % 2 == 0:
        kind = "colour" if index // 2 % 2 == 0 else "shape"
        about_mark = (MARK_QUESTIONS[kind], getattr(scene.marks[0], kind))
        rounds.insert(index // 4 % 2, about_mark)
    turns = []
    for number, (question, answer) in enumerate(rounds):
        prefix = "<image>\n" if number == 0 else ""
        turns += [
            {"from": "human", "value": prefix + question},
            {"from": "gpt", "value": answer},
        ]
    return turns


def eval_questions(scene: Scene, index: int, image: str) -> Iterator[dict[str, Any]]:
    """Questions about a held-out picture, one per kind, with what the analysis needs."""
    kind = "colour" if index % 2 == 0 else "shape"
    rows = [
        ("sign", SIGN_QUESTION, scene.signs[0].text),
        (kind, MARK_QUESTIONS[kind], getattr(scene.marks[0], kind)),
    ]
    for name, question, answer in rows:
        yield {
            "question_id": f"{index}-{name}",
            "image": image,
            "text": question,
            "answer": answer,
            "category": name,
            "sign_cut": sign_cut(scene),
            "sign_box": list(scene.signs[0].box),
        }


def write_picture(scene: Scene, path: Path) -> None:
    """Saves a scene as PNG, fast rather than small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene)).save(path, compress_level=1)


def _write_stage(
    out: Path,
    name: str,
    scenes: Iterator[Scene],
    turns: Callable[[Scene, int], list[dict[str, str]]],
) -> None:
    records = []
    for index, scene in enumerate(scenes):
        image = f"{name}/{index // 1000:03d}/{index:06d}.png"
        write_picture(scene, out / "images" / image)
        records.append(
            {"id": f"{name}-{index}", "image": image, "conversations": turns(scene, index)}
        )
    text = json.dumps(records, indent=0)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def _caption_turns(scene: Scene, index: int) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": f"<image>\n{CAPTION_REQUEST}"},
        {"from": "gpt", "value": caption(scene)},
    ]


def generate(out: Path, config: SyntheticConfig) -> bool:
    """Writes a data set.

    Args:
        out: folder; made if missing.
        config: how much of what.

    Returns:
        False if the folder held this very data set already, and nothing was done.
    """
    stamp = {"format": FORMAT, **dataclasses.asdict(config)}
    if not config.mixed:
        del stamp["mixed"]  # sets drawn before there were mixed ones stay as they are
    stamp_file = out / "synthetic.json"
    if stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == json.dumps(stamp):
        return False
    make_folder(out, "folder of the data")
    # Written last: an interrupted run leaves no stamp and is repeated.
    stamp_file.unlink(missing_ok=True)
    seed = config.seed
    tiles = (tile_scene(seed, index) for index in range(config.tiles))
    _write_stage(out, "pretrain", tiles, _caption_turns)
    train = (large_scene(seed, index, "finetune") for index in range(config.train))
    if config.mixed:
        write_mixed(out, list(train), SIGN_QUESTION, write_picture)
    else:
        _write_stage(out, "finetune", train, finetune_turns)
    with (out / "eval.jsonl").open("w", encoding="utf-8") as stream:
        for index in range(config.eval):
            scene = large_scene(seed, index, "eval")
            image = f"eval/{index:06d}.png"
            write_picture(scene, out / "images" / image)
            for row in eval_questions(scene, index, image):
                stream.write(json.dumps(row) + "\n")
    stamp_file.write_text(json.dumps(stamp), encoding="utf-8")
    logger.info("drew %d pictures into %s", config.tiles + config.train + config.eval, out)
    return True


def embedded_split(name: str, part: str, root: Path) -> Split:
    """A part of a data set that recipes name, drawn now if it is not there yet.

    Args:
        name: key of `EMBEDDED`.
        part: "pretrain", "finetune" or "eval".
        root: folder of data sets; the set stands in ``root / name``.

    Raises:
        UserError: unknown name or part.
    """
    if name not in EMBEDDED:
        raise UserError(f"data.embedded '{name}' is not one of {', '.join(sorted(EMBEDDED))}")
    if part not in STREAMS:
        raise UserError(
            f"the embedded data have no part '{part}' (known: {', '.join(STREAMS)}): a stage that "
            "reads them is named pretrain or finetune"
        )
    out = root / name
    generate(out, EMBEDDED[name])
    suffix = "jsonl" if part == "eval" else "json"
    videos = out / "videos" if part == "finetune" and EMBEDDED[name].mixed else None
    return Split(out / f"{part}.{suffix}", out / "images", videos)


def main() -> None:
    """Command line, see the module's first lines."""
    default = SyntheticConfig()
    parser = argparse.ArgumentParser(prog="python -m llava_uhd.data.synthetic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=default.train, help="large pictures")
    parser.add_argument("--tiles", type=int, default=default.tiles, help="first-stage pictures")
    parser.add_argument("--eval", type=int, default=default.eval, help="held-out pictures")
    parser.add_argument("--seed", type=int, default=default.seed)
    given = parser.parse_args()
    config = SyntheticConfig(given.tiles, given.train, given.eval, given.seed)
    made = generate(given.out, config)
    print(f"{given.out}: {'written' if made else 'is complete, nothing to do'}")


if __name__ == "__main__":
    command(main)
