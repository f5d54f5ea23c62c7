"""Embedded records of every kind: one image, two images, a video, no image at all.

They let runs of debug size go through every way of reading a sample. Nothing is to be learned from
them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_uhd.data.drawing import Scene, Sign

KINDS = ("image", "images", "video", "text")
FRAMES = 5

PAIR_QUESTION = "What do the two signs say?"
VIDEO_QUESTION = "What does the sign say at the end?"

PictureWriter = Callable[[Scene, Path], None]


def write_mixed(
    out: Path, scenes: Sequence[Scene], question: str, write_picture: PictureWriter
) -> None:
    """Writes ``finetune.json`` with records of every kind in turn, and their files.

    Args:
        out: folder of the data set; images go to ``images/``, folders of frames to ``videos/``.
        scenes: one per record, with one sign each; the second picture of a pair is the scene of the
            record after it.
        question: about the sign of one picture.
        write_picture: draws a scene into a file.
    """
    records = []
    for index, scene in enumerate(scenes):
        kind = KINDS[index % len(KINDS)]
        answer, record = scene.signs[0].text, {"id": f"mixed-{index}"}
        if kind == "image":
            media: dict[str, Any] = {"image": _picture(out, scene, index, write_picture)}
            turns = _turns(f"<image>\n{question}", answer)
        elif kind == "images":
            other = scenes[(index + 1) % len(scenes)]
            names = [
                _picture(out, each, f"{index}-{i}", write_picture)
                for i, each in enumerate((scene, other))
            ]
            media = {"image": names}
            turns = _turns(f"<image>\n<image>\n{PAIR_QUESTION}", f"{answer},{other.signs[0].text}")
        elif kind == "video":
            frames = turning_sign(scene)
            for number, frame in enumerate(frames):
                write_picture(frame, out / f"videos/{index:06d}/{number}.png")
            media = {"video": f"{index:06d}"}
            # Published data write <image> for a video.
            turns = _turns(f"<image>\n{VIDEO_QUESTION}", frames[-1].signs[0].text)
        else:
            media = {}
            turns = _turns(f"Repeat: {answer}", answer)
        records.append({**record, **media, "conversations": turns})
    text = json.dumps(records, indent=0)
    (out / "finetune.json").write_text(text + "\n", encoding="utf-8")


def turning_sign(scene: Scene) -> list[Scene]:
    """Frames of a video: the digits of the sign go round, one place per frame.

    Example: the sign 347 shows 347, 473, 734, 347, 473.
    """
    frames = []
    for number in range(FRAMES):
        signs = [
            Sign(_rotated(sign.text, number % len(sign.text)), sign.left, sign.top)
            for sign in scene.signs
        ]
        frames.append(dataclasses.replace(scene, signs=signs))
    return frames


def _rotated(text: str, places: int) -> str:
    return text[places:] + text[:places]


def _picture(out: Path, scene: Scene, name: int | str, write_picture: PictureWriter) -> str:
    image = f"mixed/{name}.png"
    write_picture(scene, out / "images" / image)
    return image


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
