"""``samples.json``: the first samples of a run with their learned tokens and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.data.dataset import BrokenFileError, ConversationDataset
from llava_uhd.errors import UserError
from llava_uhd.images.pictures import data_uri, slice_grid_picture
from llava_uhd.images.pixels import open_image
from llava_uhd.train.preview import Sample, look, pieces, shorten

SAMPLES_FILE = "samples.json"
# At least so many, also where the preview shows fewer; broken ones are passed over.
SHOWN, TRIED = 2, 16
# Pictures of a sample, and the longer side of each in pixels.
PICTURES, SIDE = 2, 900


def write_samples(dataset: ConversationDataset, folder: Path) -> None:
    """Writes the first readable samples of a run.

    Args:
        dataset: of the run.
        folder: output folder.
    """
    wanted = max(dataset.config.preview, SHOWN)
    found: list[dict[str, Any]] = []
    for index in range(min(len(dataset), wanted + TRIED)):
        if len(found) == wanted:
            break
        try:
            found.append(describe(look(dataset, index), dataset))
        except BrokenFileError:
            continue  # the run itself counts them, or stops
    write_whole(folder / SAMPLES_FILE, json.dumps(found, ensure_ascii=False) + "\n")


def describe(sample: Sample, dataset: ConversationDataset) -> dict[str, Any]:
    """A sample in plain form, its pictures with their slices."""
    record, several = dataset.records[sample.index], len(dataset.records[sample.index].images) > 1
    pictures = []
    for path in record.images[:PICTURES]:
        try:
            image = open_image(path)
        except UserError:
            continue  # told by the run
        plan = dataset.processor.plan(*image.size, dataset.config.overview_only, several)
        pictures.append(
            {
                "size": f"{image.width} x {image.height}",
                "views": plan.num_views,
                "picture": small_picture(slice_grid_picture(image, plan)),
            }
        )
    return {
        "where": sample.where,
        "tokens": len(sample.encoding.input_ids),
        "learned": sample.learned,
        "pieces": [
            {"kind": piece.kind, "text": shorten(piece.text)}
            for piece in pieces(sample, dataset.processor.tokenizer)
        ],
        "pictures": pictures,
    }


def small_picture(image: Image.Image) -> str:
    """A picture of at most `SIDE` pixels as text for an HTML file."""
    return data_uri(image, SIDE)


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Samples of a run, none if there is no such file."""
    path = folder / SAMPLES_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
