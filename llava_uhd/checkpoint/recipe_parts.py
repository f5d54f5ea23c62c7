"""Configuration, tokenizer and processor of a recipe's model, without its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llava_uhd.checkpoint.load import open_checkpoint
from llava_uhd.checkpoint.parts import read_language_config, read_tokenizer, read_tower_config
from llava_uhd.checkpoint.sources import resolve_folder
from llava_uhd.config.model import (
    ImageConfig,
    LlavaUHDConfig,
    ProjectorConfig,
    VideoConfig,
    make_config,
)
from llava_uhd.config.training import ModelSection
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import TEMPLATES

Options = TypeVar("Options")
TokenizerMaker = Callable[[], PreTrainedTokenizerBase]

# Sections whose values a recipe lays over those of a checkpoint.
PART_NAMES: dict[type, str] = {
    ImageConfig: "image",
    ProjectorConfig: "projector",
    VideoConfig: "video",
}


def read_processor(
    section: ModelSection, demo_tokenizer: TokenizerMaker | None = None
) -> LlavaUHDProcessor:
    """The processor that a recipe trains with.

    Args:
        section: of the recipe.
        demo_tokenizer: see `llava_uhd.checkpoint.assemble.assemble`.

    Raises:
        UserError: see there, as far as it shows without weights.
    """
    if section.checkpoint is not None:
        folder = resolve_folder(section.checkpoint, "checkpoint")
        config, _, made = open_checkpoint(folder, vision_tower=named_tower(section))
        lay_over(config, made.image_config, section)
        tokenizer = made.tokenizer
    else:
        text, tokenizer = language_config(section, demo_tokenizer)
        config = parts_config(section, text, tower_config(section))
    processor = LlavaUHDProcessor.from_parts(tokenizer, config)
    processor.template_mode = section.template_mode
    return processor


def language_config(
    section: ModelSection, demo_tokenizer: TokenizerMaker | None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of the language model; a new one's gets the template's marks."""
    source = section.language_model
    if isinstance(source, dict):
        if section.tokenizer is not None:
            tokenizer = read_tokenizer(resolve_folder(section.tokenizer, "tokenizer"))
        elif demo_tokenizer is not None:
            tokenizer = demo_tokenizer()
        else:
            raise UserError("model.tokenizer is missing: a new language model needs one")
        marks = list(TEMPLATES.get(section.template).special_tokens)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": marks}, replace_extra_special_tokens=False
        )
        ids = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return make_config({**ids, **source}, "model.language_model"), tokenizer
    folder = resolve_folder(str(source), "language model")
    config = read_language_config(folder)
    tokenizer_folder = (
        resolve_folder(section.tokenizer, "tokenizer") if section.tokenizer is not None else folder
    )
    return config, read_tokenizer(tokenizer_folder)


def tower_config(section: ModelSection) -> PreTrainedConfig:
    """Configuration of the vision tower."""
    source = section.vision_tower
    if source is None:
        raise UserError("model.vision_tower is missing: name a CLIP or SigLIP folder or hub id")
    if isinstance(source, dict):
        return make_config(source, "model.vision_tower")
    return read_tower_config(resolve_folder(source, "vision tower"))


def parts_config(
    section: ModelSection, text: PreTrainedConfig, vision: PreTrainedConfig
) -> LlavaUHDConfig:
    """Configuration of a model that is put together from parts.

    Raises:
        UserError: the recipe's patches are not the tower's.
    """
    image = dataclasses.replace(section.image)
    if image.patch_size != vision.patch_size:
        raise UserError(
            f"model.image.patch_size is {image.patch_size}, but the vision tower's patches have "
            f"{vision.patch_size} pixels: set it to that"
        )
    return LlavaUHDConfig(
        vision_config=vision,
        text_config=text,
        image=image,
        projector=dataclasses.replace(section.projector),
        video=dataclasses.replace(section.video),
        template=section.template,
        select_layer=section.select_layer,
    )


def named_tower(section: ModelSection) -> str | None:
    """The vision tower that replaces a checkpoint's own.

    Raises:
        UserError: it is a configuration.
    """
    if isinstance(section.vision_tower, dict):
        raise UserError("model.vision_tower beside model.checkpoint must be a folder or hub id")
    return section.vision_tower


def lay_over(config: LlavaUHDConfig, image: ImageConfig, section: ModelSection) -> None:
    """Changes a checkpoint's configuration to what the recipe sets.

    Args:
        config: of the checkpoint.
        image: of its processor, with the ids of separators.
        section: of the recipe.
    """
    config.image = overlay(image, section.image, section.given)
    config.projector = overlay(config.projector, section.projector, section.given)
    config.video = overlay(config.video, section.video, section.given)
    config.template = section.template


def overlay(own: Options, wanted: Options, given: frozenset[str] | None = None) -> Options:
    """The checkpoint's options with those that the recipe sets.

    Args:
        own: of the checkpoint.
        wanted: of the recipe, ``image``, ``projector`` or ``video``.
        given: keys of the model section that the recipe sets (`ModelSection.given`). None: what is
            not at its default counts as set.
    """
    default = type(wanted)()
    part = PART_NAMES[type(wanted)]

    def is_set(name: str) -> bool:
        if given is not None:
            return f"{part}.{name}" in given
        return bool(getattr(wanted, name) != getattr(default, name))

    names = [item.name for item in dataclasses.fields(wanted)]  # type: ignore[arg-type]
    changes: dict[str, Any] = {name: getattr(wanted, name) for name in names if is_set(name)}
    return dataclasses.replace(own, **changes)  # type: ignore[type-var]
