"""What a run answers to samples that it never learns: a log, and a page with their pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.config.model import VideoConfig
from llava_uhd.errors import UserError
from llava_uhd.images.pixels import open_image
from llava_uhd.images.stored import MediaFile
from llava_uhd.images.video import read_video
from llava_uhd.train.report_samples import small_picture

ANSWERS_FILE = "heldout.jsonl"
PAGE_FILE = "heldout.html"
# The page shows so many evaluations, spread over the run, and the last.
SHOWN = 12
SIDE = 220  # pixels of a thumbnail

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
       padding: 0 1rem; color: #1b1b1f; background: #fff; }
h1 { font-size: 1.4rem; } section { border-top: 1px solid #dcdce2; padding: 1rem 0; }
img { max-width: 220px; max-height: 220px; vertical-align: top; margin: 0 0.5rem 0.5rem 0; }
table { border-collapse: collapse; } .scroll { overflow-x: auto; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; white-space: pre-wrap; }
th { white-space: nowrap; font-weight: 600; } .where { color: #6b6b75; font-size: 0.85rem; }
@media (prefers-color-scheme: dark) {
  body { color: #e4e4ea; background: #17171b; } section { border-color: #3a3a42; }
  .where { color: #9a9aa4; }
}
"""


class Answer(NamedTuple):
    """What the model says to a sample.

    Attributes:
        where: file, place and id.
        question: the first turn.
        expected: its answer in the data.
        generated: the model's.
        images: of the question.
        videos: of the question.
    """

    where: str
    question: str
    expected: str
    generated: str
    images: Sequence[MediaFile] = ()
    videos: Sequence[MediaFile] = ()


def append_answers(folder: Path, step: int, loss: float | None, answers: Sequence[Answer]) -> None:
    """Adds the answers of an evaluation to the log, and draws the page anew.

    What a broken run had written behind this step is dropped.

    Args:
        folder: output folder.
        step: optimizer steps before the evaluation.
        loss: of it.
        answers: of it.
    """
    kept = [entry for entry in read_answers(folder) if entry["step"] < step]
    texts = [answer._asdict() for answer in answers]
    for each in texts:
        del each["images"], each["videos"]
    kept.append({"step": step, "eval_loss": loss, "answers": texts})
    lines = "".join(json.dumps(entry, ensure_ascii=True) + "\n" for entry in kept)
    write_whole(folder / ANSWERS_FILE, lines)
    write_whole(folder / PAGE_FILE, page(kept, [_pictures(answer) for answer in answers]))


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Evaluations of a run, oldest first."""
    path = folder / ANSWERS_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page(entries: Sequence[dict[str, Any]], pictures: Sequence[Sequence[str]]) -> str:
    """The page: each sample with its picture, and the answers of the run as it went on.

    Args:
        entries: of the log; the last one has the samples that are shown.
        pictures: of each sample, as addresses of images.
    """
    last = entries[-1]["answers"]
    places = sorted({number * (len(entries) - 1) // max(SHOWN - 1, 1) for number in range(SHOWN)})
    shown = [entries[place] for place in places] if len(entries) > SHOWN else list(entries)
    sections = []
    for number, (answer, own) in enumerate(zip(last, pictures, strict=True)):
        images = "".join(f'<img alt="picture of the sample" src="{each}">' for each in own)
        rows = [("question", answer["question"]), ("expected", answer["expected"])]
        for entry in shown:
            # The data may have changed under a run that goes on: others' answers are not shown.
            texts = [each for each in entry["answers"] if each["where"] == answer["where"]]
            if texts:
                rows.append((f"step {entry['step']:,}", texts[0]["generated"]))
        cells = "\n".join(
            f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows
        )
        sections.append(
            f'<section><p class="where">{number + 1}. {escape(answer["where"])}</p>\n{images}\n'
            f'<div class="scroll"><table>{cells}</table></div></section>'
        )
    losses = ", ".join(f"step {e['step']:,}: {e['eval_loss']:.4f}" for e in shown)
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Held-out samples</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Held-out samples</h1>\n<p>Loss per learned token: {losses}</p>\n{body}\n"
        "</body>\n</html>\n"
    )


def _pictures(answer: Answer) -> list[str]:
    """Thumbnails: the images, and the first frame of each video."""
    found = []
    for file in answer.images:
        found.append(open_image(file))
    for file in answer.videos:
        try:
            found.append(read_video(file, VideoConfig(max_frames=1, force_sample=True)).frames[0])
        except UserError:
            continue
    for image in found:
        image.thumbnail((SIDE, SIDE))
    return [small_picture(image) for image in found]
