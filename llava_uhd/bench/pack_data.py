"""Lengths of data for ``bench pack``: simulated ones, and those of a recipe's data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llava_uhd.checkpoint.recipe_parts import language_config, parts_config, tower_config
from llava_uhd.checkpoint.recipe_parts import read_processor as read_own_processor
from llava_uhd.checkpoint.shapes import describe_checkpoint, known_model
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.config.training import ModelSection, Recipe
from llava_uhd.data.costs import TrainingCost, VisionCost
from llava_uhd.data.dataset import ConversationDataset, open_records
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.data.lengths import CountedEpochs, count_tokens
from llava_uhd.data.synthetic import embedded_split
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor

# Records of llava_v1_5_mix665k.json; the rest of the figures below is an assumption.
SAMPLES = 665_298
IMAGE_TOKENS = 576
TEXT_ONLY, TEXT_MEAN, TEXT_SIGMA, LONGEST = 0.06, 250, 1.0, 2048

ASSUMPTION = (
    f"assumed: {TEXT_ONLY:.0%} without image, texts log-normal (mean {TEXT_MEAN} tokens, sigma "
    f"{TEXT_SIGMA}), {IMAGE_TOKENS} tokens of an image, cut at {LONGEST}"
)


@dataclass(frozen=True)
class Lengths:
    """What plans of batches are made from.

    Attributes:
        title: of the data.
        tokens: (N,) int64 of the samples.
        vision: (N,) float64 operations of tower and projector in a training pass.
        words: signed lengths that the published sampler sorts by, see `Records.modality_lengths`.
        cost: of the language model.
    """

    title: str
    tokens: np.ndarray
    vision: np.ndarray
    words: Sequence[int]
    cost: TrainingCost

    def language(self, tokens: np.ndarray) -> np.ndarray:
        """Operations of the language model in a training pass, for rows of so many tokens."""
        nothing = np.zeros(len(tokens))
        return self.cost(tokens, nothing, nothing)

    @property
    def costs(self) -> np.ndarray:
        """(N,) operations of the samples in a training pass."""
        return self.language(self.tokens) + self.vision


def text_lengths(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens (N,), and whether there is an image (N,), by `ASSUMPTION`."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(math.log(TEXT_MEAN) - TEXT_SIGMA**2 / 2, TEXT_SIGMA, count)
    text = np.minimum(np.exp(drawn).astype(np.int64) + 1, LONGEST)
    return text, rng.random(count) >= TEXT_ONLY


def simulated(count: int = SAMPLES, seed: int = 0) -> Lengths:
    """Lengths like those of LLaVA-665K, costs of LLaVA-1.5 with Vicuna-7B.

    Args:
        count: samples.
        seed: of the draw.
    """
    text, pictured = text_lengths(count, seed)
    config = known_model("vicuna-7b-v1.5", None)
    side = config.image.scale_resolution // config.image.patch_size
    tower, projector = VisionCost(config)(((side, side),))
    cost = TrainingCost.of(config.text_config, ["projector", "language_model"])
    tokens = np.minimum(text + IMAGE_TOKENS * pictured, LONGEST)
    vision = pictured * (cost.tower * tower + cost.projector * projector)
    words = np.where(pictured, text, -text).tolist()
    return Lengths(f"{count:,} simulated samples", tokens, vision, words, cost)


def of_recipe(name: str, root: Path = Path("playground/data")) -> tuple[Lengths, Recipe]:
    """Lengths of a recipe's data, counted now.

    Args:
        name: of the recipe.
        root: folder of embedded data.

    Raises:
        UserError: data or parts are missing.
    """
    recipe = load_recipe(name)
    data = recipe.data
    if data.embedded is not None:
        split = embedded_split(data.embedded, recipe.stage.name, root)
        videos = None if split.video_folder is None else str(split.video_folder)
        data = dataclasses.replace(
            data,
            embedded=None,
            path=str(split.file),
            image_folder=str(split.image_folder),
            video_folder=videos,
        )
    processor, config = read_processor(recipe.model)
    dataset = ConversationDataset(open_records(data), processor, data)
    counts = count_tokens(dataset, config)
    cost = TrainingCost.of(config.text_config, recipe.stage.learn, recipe.lora.enabled)
    tokens, costs = CountedEpochs(counts, dataset, cost)(0)
    nothing = np.zeros(len(tokens))
    vision = costs - cost(tokens, nothing, nothing)
    title = f"{len(tokens):,} samples of {name}"
    return Lengths(title, tokens, vision, dataset.modality_lengths, cost), recipe


def read_processor(section: ModelSection) -> tuple[LlavaUHDProcessor, LlavaUHDConfig]:
    """Processor and configuration of a recipe's model, without weights.

    Where the checkpoint that a recipe goes on from is not here, the recipe that makes it stands in.
    """
    if section.checkpoint is not None:
        if Path(section.checkpoint, "config.json").is_file():
            own = read_own_processor(section, build_demo_tokenizer)
            return own, describe_checkpoint(section.checkpoint)
        maker = maker_of(section.checkpoint)
        section = dataclasses.replace(
            maker, template=section.template, image=section.image, projector=section.projector
        )
    text, tokenizer = language_config(section, build_demo_tokenizer)
    config = parts_config(section, text, tower_config(section))
    return LlavaUHDProcessor.from_parts(tokenizer, config), config


def maker_of(checkpoint: str) -> ModelSection:
    """Model of the recipe that writes a checkpoint.

    Raises:
        UserError: none of ours does.
    """
    for name in list_recipes():
        recipe = load_recipe(name)
        if Path(recipe.output_dir) == Path(checkpoint):
            return recipe.model
    raise UserError(f"checkpoint {checkpoint} is not here, and no recipe makes it: choose another")
