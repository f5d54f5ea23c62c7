"""Shapes of models without their weights: from a recipe, a folder's config.json or a known name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llava_uhd.checkpoint.parts import (
    read_language_config,
    read_model_config,
    read_tower_config,
)
from llava_uhd.checkpoint.published import KNOWN_TOWERS, find_tower
from llava_uhd.checkpoint.published_folder import published_config, stored_names
from llava_uhd.checkpoint.recipe_parts import overlay
from llava_uhd.checkpoint.weights import read_json
from llava_uhd.config.model import CompressionConfig, ImageConfig, LlavaUHDConfig, make_config
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError


def _llama(width: int, mlp_width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": 32000,
    }


def _qwen2(
    width: int, mlp_width: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, Any]:
    return {
        **_llama(width, mlp_width, layers, heads),
        "model_type": "qwen2",
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": width < 2048,
    }


KNOWN_LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "vicuna-7b-v1.5": _llama(4096, 11008, 32, 32),
    "vicuna-13b-v1.5": _llama(5120, 13824, 40, 40),
    "qwen2-0.5b": _qwen2(896, 4864, 24, 14, 2, 151936),
    "qwen2-0.5b-instruct": _qwen2(896, 4864, 24, 14, 2, 151936),
    "qwen2-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2-7b-instruct": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2-72b": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "qwen2-72b-instruct": _qwen2(8192, 29568, 80, 64, 8, 152064),
}

# Published checkpoints by the last part of their names: the recipe that makes such a model.
KNOWN_CHECKPOINTS = {
    "llava-v1.5-7b": "llava_1_5/finetune_vicuna7b",
    "llava-v1.5-13b": "llava_1_5/finetune_vicuna13b",
    **{
        f"llava-onevision-qwen2-{name}-{stage}": f"onevision/stage2_{stage}_qwen2_{size}"
        for name, size in (("0.5b", "0_5b"), ("7b", "7b"), ("72b", "72b"))
        for stage in ("si", "ov")
    },
}


def known_shape(name: str, table: dict[str, dict[str, Any]], what: str) -> PreTrainedConfig:
    """Configuration by the last part of a folder or hub name.

    Raises:
        UserError: a name that is not in the table.
    """
    last = name.rstrip("/").rpartition("/")[2].lower()
    if last not in table:
        raise UserError(
            f"{what} {name} is not here and its shape is not known "
            f"(known: {', '.join(sorted(table))}): put the folder there, its config.json is enough"
        )
    return make_config(table[last], what)


def describe_recipe(recipe: Recipe) -> LlavaUHDConfig:
    """Configuration of the model that a recipe would train; no weights are read.

    Folders that are not here are replaced by the shapes of well-known names, checkpoints also by
    the recipes that make them.

    Raises:
        UserError: a part whose shape cannot be found.
    """
    section = recipe.model
    if section.checkpoint is not None:
        maker = None
        if not Path(section.checkpoint, "config.json").is_file():
            maker = recipe_of(section.checkpoint)
        config = describe_recipe(maker) if maker else describe_checkpoint(section.checkpoint)
        config.image = overlay(config.image, section.image, section.given)
        config.video = overlay(config.video, section.video, section.given)
        config.compression = recipe.compression
        return config
    language, tower = section.language_model, section.vision_tower
    if isinstance(language, dict):
        text = make_config(language, "model.language_model")
    elif Path(str(language), "config.json").is_file():
        text = read_language_config(Path(str(language)))
    else:
        text = known_shape(str(language), KNOWN_LANGUAGE_MODELS, "language model")
    if isinstance(tower, dict):
        vision = make_config(tower, "model.vision_tower")
    elif Path(str(tower), "config.json").is_file():
        vision = read_tower_config(Path(str(tower)))
    else:
        vision = known_shape(str(tower), KNOWN_TOWERS, "vision tower")
    return LlavaUHDConfig(
        vision_config=vision,
        text_config=text,
        image=dataclasses.replace(section.image),
        projector=dataclasses.replace(section.projector),
        video=dataclasses.replace(section.video),
        compression=recipe.compression,
        template=section.template,
        select_layer=section.select_layer,
    )


def recipe_of(checkpoint: str) -> Recipe | None:
    """The recipe that makes a checkpoint: one of ours that writes the folder, or a published one's.

    Only recipes over parts with names count: what starts from nothing has no shape yet.
    """
    last = checkpoint.rstrip("/").rpartition("/")[2]
    named = KNOWN_CHECKPOINTS.get(last)
    for name in [named] if named else list_recipes():
        recipe = load_recipe(name)
        if named or Path(recipe.output_dir) == Path(checkpoint):
            return None if isinstance(recipe.model.language_model, dict) else recipe
    return None


def describe_checkpoint(path: str | Path) -> LlavaUHDConfig:
    """Configuration of a checkpoint folder, ours or published; no weights are read.

    Raises:
        UserError: no such folder, or an unknown layout.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"checkpoint {folder} is not here (no config.json): its shape is read from it; train "
            "it first (bash pretrain.sh, bash finetune.sh), or choose another recipe or folder"
        )
    values = read_json(folder / "config.json")
    if values.get("model_type") == "llava_uhd":
        return read_model_config(folder)
    tower = find_tower(values, folder)
    return published_config(folder, values, stored_names(folder), tower)[1]


def known_model(
    language_model: str,
    num_queries: int | None,
    tower: str = "clip-vit-large-patch14-336",
    scales: tuple[int, ...] | None = None,
) -> LlavaUHDConfig:
    """A published combination by name.

    Args:
        language_model: key of `KNOWN_LANGUAGE_MODELS`.
        num_queries: of the spatially constrained resampler (LLaVA-UHD); None for one square view
            and two linear layers on its patches (LLaVA-1.5).
        tower: key of `KNOWN_TOWERS`.
        scales: of the multi-scale projector (LLaVA-UHD v2), which then takes the resampler's place.
    """
    vision = known_shape(tower, KNOWN_TOWERS, "vision tower")
    projector: dict[str, Any] = {"type": "mlp2x_gelu"}
    if num_queries is not None:
        projector = {"num_queries": num_queries}
        if scales is not None:
            projector |= {"type": "hiwin", "scales": scales}
    return LlavaUHDConfig(
        vision_config=vision,
        text_config=known_shape(language_model, KNOWN_LANGUAGE_MODELS, "language model"),
        image=ImageConfig(
            strategy="squeeze" if num_queries is None else "slices",
            scale_resolution=vision.image_size,
        ),
        projector=projector,
        compression=CompressionConfig(),
    )
