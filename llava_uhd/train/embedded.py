"""Data sets that the package draws itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llava_uhd.config.training import Recipe


def use_embedded(recipe: Recipe) -> Recipe:
    """Draws the recipe's embedded data set if it is not there yet, and points the recipe at it."""
    name = recipe.data.embedded
    if name is None:
        return recipe
    from llava_uhd.data.synthetic import embedded_split

    split = embedded_split(name, recipe.stage.name, Path("playground/data"))
    data = dataclasses.replace(
        recipe.data,
        embedded=None,
        path=str(split.file),
        image_folder=str(split.image_folder),
        video_folder=None if split.video_folder is None else str(split.video_folder),
    )
    return dataclasses.replace(recipe, data=data)


def demo_tokenizer() -> PreTrainedTokenizerBase:
    """Tokenizer for language models that start from nothing."""
    from llava_uhd.data.demo_tokenizer import build_demo_tokenizer

    return build_demo_tokenizer()
