"""``report.html``: what the quickstart's model sees, says and gets wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llava_uhd.checkpoint.load import load_pretrained
from llava_uhd.checkpoint.manifest import read_manifest
from llava_uhd.checkpoint.pyramid import Pyramid
from llava_uhd.images.pictures import data_uri, slice_grid_picture
from llava_uhd.images.pixels import open_image
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.page import render
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import Turn
from llava_uhd.train.log import draw_loss

REPORT_FILE = "report.html"
SHOWN = 6  # right and wrong answers each
PHOTO_QUESTION = "What colour is the mark?"


@dataclass(frozen=True)
class Arm:
    """One evaluated model of the comparison.

    Attributes:
        folder: of the checkpoint.
        title: how it reads pictures.
        description: one line more.
    """

    folder: Path
    title: str
    description: str

    @property
    def scores(self) -> dict[str, float]:
        """Scores on the embedded benchmark."""
        path = self.folder / "eval" / "synthetic" / "scores.json"
        return json.loads(path.read_text(encoding="utf-8"))["scores"]

    @property
    def items(self) -> list[dict[str, Any]]:
        """Answered questions."""
        path = self.folder / "eval" / "synthetic" / "items.jsonl"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def photographs() -> dict[str, Image.Image]:
    """The two photographs that ship inside scikit-learn; empty without it."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        return {}
    return {name: Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")}


def answer(
    model: LlavaUHDForConditionalGeneration,
    processor: LlavaUHDProcessor,
    image: Image.Image,
    question: str,
) -> str:
    """Greedy answer to one question about one picture."""
    turns = [Turn("human", f"<image>\n{question}")]
    prompt = "".join(span.text for span in processor.template.spans(turns, generate=True))
    inputs = processor(text=prompt, images=[image])
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def _main_metric(item: dict[str, Any]) -> float:
    return float(next(iter(item["metrics"].values())))


def _samples(items: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Some right and some wrong answers about signs, with pictures."""
    signs = [item for item in items if "sign_exact" in item["metrics"]]
    chosen = {}
    for title, right in (("Right", 1.0), ("Wrong", 0.0)):
        rows = [item for item in signs if _main_metric(item) == right][:SHOWN]
        chosen[title] = [
            {
                "picture": data_uri(open_image(item["images"][0])),
                "question": item["question"],
                "answer": item["answer"],
                "reference": item["reference"],
                "cut": item["groups"].get("sign and slice borders", ""),
            }
            for item in rows
        ]
    return chosen


def _by_border(items: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    """Exact match of signs by how slice borders meet them: (kind, count, share)."""
    groups: dict[str, list[float]] = {}
    for item in items:
        if "sign_exact" in item["metrics"]:
            kind = item["groups"].get("sign and slice borders", "")
            groups.setdefault(kind, []).append(_main_metric(item))
    return [(kind, len(v), sum(v) / len(v)) for kind, v in sorted(groups.items())]


def write_report(
    folder: Path,
    arms: list[Arm],
    pretrained: Path,
    times: dict[str, float],
    vdim: Path | None = None,
) -> Path:
    """Writes the report into the output folder of the finished model.

    Args:
        folder: of the model that reads native slices.
        arms: all evaluated models, that one first.
        pretrained: output folder of the first stage.
        times: step -> seconds.
        vdim: output folder of the upsampler's pre-training, if there was one.

    Returns:
        The HTML file.
    """
    model, processor = load_pretrained(folder)
    main = arms[0]
    pyramid = Pyramid.of_model(model) if vdim is not None else None
    grids = []
    for path in dict.fromkeys(item["images"][0] for item in main.items[:3]):
        image = open_image(path)
        grids.append(_grid(processor, image, Path(path).name, pyramid))
    photos = []
    for name, image in photographs().items():
        shown = _grid(processor, image, name, pyramid)
        said = answer(model, processor, image, PHOTO_QUESTION)
        photos.append({**shown, "question": PHOTO_QUESTION, "answer": said})
    curve = folder / "curves.png"
    first = {"pretrain": pretrained} if vdim is None else {"VDIM": vdim, "pretrain": pretrained}
    folders = {**first, **{arm.title: arm.folder for arm in arms}}
    drawn = draw_loss(folders, curve)
    html = render(
        "report.html",
        arms=arms,
        times=times,
        grids=grids,
        photos=photos,
        samples=_samples(main.items),
        borders=_by_border(main.items),
        upsampling=read_manifest(vdim).get("measured", []) if vdim is not None else [],
        curve=data_uri(Image.open(curve)) if drawn else None,
        folder=folder,
    )
    target = folder / REPORT_FILE
    target.write_text(html, encoding="utf-8")
    return target


def _grid(
    processor: LlavaUHDProcessor, image: Image.Image, name: str, pyramid: Pyramid | None
) -> dict[str, Any]:
    plan = processor.plan(*image.size)
    return {
        "name": name,
        "size": f"{image.width} x {image.height}",
        "grid": f"{plan.grid[0]} x {plan.grid[1]} slices" if plan.grid else "not cut",
        "tokens": processor.num_image_tokens(*image.size),
        "picture": data_uri(slice_grid_picture(image, plan)),
        "maps": data_uri(pyramid.picture(image)) if pyramid is not None else None,
    }
