"""Samples of realistic lengths, drawn from a seed: for measuring training, and for estimates.

The distributions are assumptions, named in `Mix`; they stand in for mixtures that are not at hand.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.images.geometry import Size, num_schema_tokens
from llava_uhd.images.maps import image_maps, uses_maps
from llava_uhd.images.strategies import plan_image
from llava_uhd.images.tokens import view_token_shapes
from llava_uhd.model.visual_runs import runs_of_maps, runs_of_views
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import Turn
from llava_uhd.train.counting import Facts

# One token each in the demonstration's tokenizer.
WORD, QUESTION = "sign", "What does the sign say"
PICTURES = 48

# (width, height) and weight: about what COCO, Visual Genome, GQA, TextVQA and OCR-VQA have.
SIZES: tuple[tuple[Size, float], ...] = (
    ((640, 480), 0.45),
    ((480, 640), 0.15),
    ((500, 375), 0.15),
    ((1024, 768), 0.10),
    ((768, 1024), 0.05),
    ((350, 500), 0.10),
)


@dataclass(frozen=True)
class Mix:
    """Lengths of samples, an assumption.

    Attributes:
        text: mean number of text tokens, log-normal.
        sigma: of its logarithm.
        most: it is cut there.
        text_only: share of samples without an image.
        answers: share of the text that is learned.
    """

    text: float
    sigma: float
    most: int
    text_only: float
    answers: float

    @property
    def described(self) -> str:
        """In words."""
        return (
            f"text tokens log-normal, mean {self.text:g}, sigma {self.sigma:g}, cut at "
            f"{self.most}, {self.answers:.0%} of them learned; {self.text_only:.0%} of the samples "
            "without an image; image sizes as in photographs and scans of 0.2 to 0.8 megapixels"
        )


# Instructions like the 665K mixture of LLaVA-1.5, and captions like its 558K.
INSTRUCTIONS = Mix(250, 1.0, 2048, 0.06, 0.5)
CAPTIONS = Mix(30, 0.5, 128, 0.0, 1.0)


@dataclass(frozen=True)
class Drawn:
    """A sample.

    Attributes:
        text: its text tokens.
        size: of its image, None without one.
    """

    text: int
    size: Size | None


def draw(mix: Mix, count: int, seed: int = 0) -> list[Drawn]:
    """Draws samples.

    Args:
        mix: of their lengths.
        count: of samples.
        seed: of the draws.
    """
    generator = random.Random(f"samples {seed}")
    sizes, weights = [size for size, _ in SIZES], [weight for _, weight in SIZES]
    middle = math.log(mix.text) - mix.sigma**2 / 2
    found = []
    for _ in range(count):
        text = round(generator.lognormvariate(middle, mix.sigma))
        size = generator.choices(sizes, weights)[0]
        alone = generator.random() < mix.text_only
        found.append(Drawn(min(max(text, 4), mix.most), None if alone else size))
    return found


def facts_of_sample(
    config: LlavaUHDConfig,
    sample: Drawn,
    mix: Mix,
    overview_only: bool = False,
    max_length: int | None = None,
) -> Facts:
    """What a model sees of a sample, by arithmetic alone.

    Args:
        config: of the model.
        sample: drawn.
        mix: it was drawn from.
        overview_only: drop the slices.
        max_length: it is cut there.
    """
    learned = max(round(sample.text * mix.answers), 1)
    if sample.size is None:
        return Facts((sample.text,), sample.text, 0, learned, ())
    plan = plan_image(config.image, *sample.size, overview_only)
    grids = plan.view_grids
    shapes = view_token_shapes(config.projector, grids)
    maps = list(image_maps(config.image, plan, shapes))
    visual = sum(each.tokens for each in maps)
    per_view = shapes[0][0] * shapes[0][1]
    schema = num_schema_tokens(plan, config.image.layout, per_view)
    joined = uses_maps(config.image, config.video)
    runs = (
        runs_of_maps(maps, config.image.layout == "rows") if joined else runs_of_views(list(shapes))
    )
    length = sample.text + visual + schema
    if max_length is not None and length > max_length:
        learned = max(learned - (length - max_length), 0)
        length = max_length
    return Facts((length,), length, visual, learned, tuple(grids), (tuple(runs),))


def write_data(folder: Path, samples: list[Drawn], mix: Mix, processor: LlavaUHDProcessor) -> Path:
    """Writes samples as a LLaVA file with pictures beside it.

    Pictures are few and used again and again; each is read and decoded every time.

    Args:
        folder: to write into.
        samples: drawn.
        mix: they were drawn from.
        processor: whose template takes part of each text.

    Returns:
        The JSON file; its image folder is ``folder``.
    """
    taken = _template_tokens(processor)
    names: dict[Size, list[str]] = {}
    records: list[dict[str, Any]] = []
    for number, sample in enumerate(samples):
        left = max(sample.text - taken, 2)
        answer = max(round(left * mix.answers), 1)
        question = " ".join([QUESTION, *[WORD] * max(left - answer, 0)])
        record: dict[str, Any] = {"id": f"{number:06d}"}
        if sample.size is not None:
            record["image"] = _picture(folder, sample.size, names, number)
            question = f"<image>\n{question}"
        turns = (("human", question), ("gpt", " ".join([WORD] * answer)))
        record["conversations"] = [{"from": role, "value": text} for role, text in turns]
        records.append(record)
    file = folder / "samples.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def _template_tokens(processor: LlavaUHDProcessor) -> int:
    """Text tokens of a sample with the shortest answer."""
    turns = [Turn("human", f"<image>\n{QUESTION}"), Turn("gpt", WORD)]
    text = "".join(span.text for span in processor.template.spans(turns))
    return len(processor.tokenizer(text.replace("<image>", ""))["input_ids"]) - 1


def _picture(folder: Path, size: Size, names: dict[Size, list[str]], number: int) -> str:
    """Name of a picture of a size; the first ones are drawn, then they come again."""
    known = names.setdefault(size, [])
    most = -(-PICTURES // len(SIZES))
    if len(known) == most:
        return known[number % most]
    name = f"{size[0]}x{size[1]}_{len(known)}.jpg"
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 256, (size[1] // 24 + 2, size[0] // 24 + 2, 3), np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(folder / name, "JPEG", quality=90)
    known.append(name)
    return name
