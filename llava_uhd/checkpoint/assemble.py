"""Putting a model together from a recipe's parts."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llava_uhd.checkpoint.load import build_model, load_pretrained
from llava_uhd.checkpoint.named_files import read_upsampler, resolve_projector, resolve_upsampler
from llava_uhd.checkpoint.parts import (
    find_projector,
    read_language_model,
    read_projector,
    read_tower,
)
from llava_uhd.checkpoint.recipe_parts import (
    TokenizerMaker,
    language_config,
    lay_over,
    named_tower,
    overlay,
    parts_config,
    tower_config,
)
from llava_uhd.checkpoint.sources import resolve_folder
from llava_uhd.checkpoint.vdim import find_vdim
from llava_uhd.checkpoint.weights import Tensors
from llava_uhd.config.compression import after_training
from llava_uhd.config.model import (
    CompressionConfig,
    ImageConfig,
    LlavaUHDConfig,
)
from llava_uhd.config.training import ModelSection
from llava_uhd.errors import UserError
from llava_uhd.language.compressors import compressor_of
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.faithful import FAITHFUL
from llava_uhd.text.processor import LlavaUHDProcessor

logger = logging.getLogger(__name__)


@dataclass
class Assembled:
    """A model ready to train.

    Attributes:
        model: with its weights, on the CPU.
        processor: with the recipe's template.
        new_parts: parts that start from initial values.
        original: under a quantised language model that starts from initial values: those.
    """

    model: LlavaUHDForConditionalGeneration
    processor: LlavaUHDProcessor
    new_parts: tuple[str, ...]
    original: Tensors = field(default_factory=dict)


def check_parts(section: ModelSection) -> None:
    """Checks that every named folder is there, before anything large is read.

    Hub ids are fetched here.

    Raises:
        UserError: a missing folder; one line with what it is and how to get it. A template without
            faithful labels that is asked for them.
    """
    if section.template_mode == "faithful":
        FAITHFUL.get(section.template)
    for path, what in (
        (section.checkpoint, "checkpoint"),
        (section.language_model, "language model"),
        (section.tokenizer, "tokenizer"),
        (section.vision_tower, "vision tower"),
    ):
        if isinstance(path, str):
            resolve_folder(path, what)
    if section.projector_file is not None:
        find_projector(resolve_projector(section.projector_file))
    if section.upsampler_file is not None:
        find_vdim(resolve_upsampler(section.upsampler_file))


def assemble(
    section: ModelSection,
    compression: CompressionConfig,
    dtype: torch.dtype,
    demo_tokenizer: TokenizerMaker | None = None,
    **storage: Any,
) -> Assembled:
    """Builds model and processor from a whole checkpoint, or from parts.

    Args:
        section: of the recipe. With a whole checkpoint the values of ``image`` and ``projector``
            that the recipe sets (``section.given``) are laid over the checkpoint's own.
        compression: of the recipe.
        dtype: of the weights.
        demo_tokenizer: makes the tokenizer of a language model that starts from nothing and names
            none.
        **storage: ``quantization`` and ``device`` of `build_model`.

    Raises:
        UserError: a missing folder, or parts that do not fit each other.
    """
    if compression.method != "none":
        compressor_of(compression.method)  # an unknown one is told before anything is read
    if section.checkpoint is not None:
        made = _from_checkpoint(section, dtype, storage)
    else:
        made = _from_parts(section, dtype, demo_tokenizer, storage)
    config = made.model.config
    layers = config.text_config.num_hidden_layers
    config.compression = after_training(compression, config.compression, layers)
    made.processor.template_mode = section.template_mode
    _end_answers(made)
    return made


def _end_answers(made: Assembled) -> None:
    """Generation also ends at the token that ends the template's answers.

    Some language models (Qwen2 without "Instruct") know it but do not name it as an end. A mark
    that the tokenizer spells out in several tokens is told.
    """
    template, tokenizer = made.processor.template, made.processor.tokenizer
    single = tokenizer.get_added_vocab()
    for mark in template.special_tokens:
        if mark not in single:
            logger.warning(
                "template %s: the tokenizer has no token %s", made.processor.template_name, mark
            )
    settings = made.model.generation_config
    if settings is None:
        return
    ends = settings.eos_token_id
    ends = list(ends) if isinstance(ends, list) else [] if ends is None else [ends]
    ends += [
        single[stop] for stop in template.stop_strings if single.get(stop) not in (None, *ends)
    ]
    settings.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None


def _from_checkpoint(
    section: ModelSection, dtype: torch.dtype, storage: dict[str, Any]
) -> Assembled:
    model, processor = load_pretrained(
        section.checkpoint or "",
        vision_tower=named_tower(section),
        dtype=dtype,
        attn_implementation=section.attn_implementation,
        merge_lora=True,
        **storage,
    )
    config = model.config
    _check_shapes(section, config)
    lay_over(config, processor.image_config, section)
    processor = LlavaUHDProcessor.from_parts(processor.tokenizer, config)
    if section.projector_file is not None:
        found = read_projector(resolve_projector(section.projector_file), config)
        state = {key.removeprefix("projector."): tensor.to(dtype) for key, tensor in found.items()}
        model.projector.load_state_dict(state)
    if section.upsampler_file is not None:
        stack = {
            key.removeprefix("projector."): tensor.to(dtype)
            for key, tensor in read_upsampler(section.upsampler_file, config).items()
        }
        model.projector.load_state_dict(stack, strict=False)
    return Assembled(model, processor, ())


def _check_shapes(section: ModelSection, config: LlavaUHDConfig) -> None:
    """Raises UserError where a recipe asks for what would change the weights of its checkpoint."""
    given = section.given
    projector = overlay(config.projector, section.projector, given)
    wanted: dict[str, Any] = {
        f"projector.{key}": value
        for key, value in dataclasses.asdict(projector).items()
        if key not in ("train_positions", "initializer_range")
    }
    wanted["image.patch_size"] = overlay(config.image, section.image, given).patch_size
    unset = section.select_layer == ModelSection.select_layer
    if not unset if given is None else "select_layer" in given:
        wanted["select_layer"] = section.select_layer
    layout = overlay(config.image, section.image, given).layout
    if (layout == "unpad") != config.has_newline:
        raise UserError(
            f"model.image.layout is {layout}, but checkpoint {section.checkpoint} was made with "
            f"{config.image.layout}: only 'unpad' has a learned newline; leave it out, or build "
            "the model from model.language_model, model.vision_tower and model.projector_file"
        )
    for key, value in wanted.items():
        part, _, name = key.rpartition(".")
        own = getattr(getattr(config, part) if part else config, name)
        if value != own:
            raise UserError(
                f"model.{key} is {value}, but checkpoint {section.checkpoint} was made with {own}: "
                "leave it out"
            )


def _from_parts(
    section: ModelSection,
    dtype: torch.dtype,
    demo_tokenizer: TokenizerMaker | None,
    storage: dict[str, Any],
) -> Assembled:
    state: Tensors = {}
    new: list[str] = []
    text, tokenizer = _language_part(section, state, new, demo_tokenizer)
    vision = _vision_part(section, state, new)
    config = parts_config(section, text, vision)
    _compare_with_tower(config)
    if section.projector_file is not None:
        state |= read_projector(resolve_projector(section.projector_file), config)
    else:
        new.append("projector")
    if section.upsampler_file is not None:
        state |= read_upsampler(section.upsampler_file, config)
    if config.has_newline:
        new.append("image_newline")
    processor = LlavaUHDProcessor.from_parts(tokenizer, config)
    options: dict[str, Any] = {
        "what": "the recipe's model",
        "dtype": dtype,
        "attn_implementation": section.attn_implementation,
        # (The newline is a parameter, the others are modules.)
        "may_miss": tuple(part if part == "image_newline" else f"{part}." for part in new),
    }
    original: Tensors = {}
    if "quantization" in storage and "language_model" in new:
        # Its initial values are drawn before they are quantised.
        state = dict(build_model(config, state, **options).state_dict())
        original = {key: each for key, each in state.items() if key.startswith("language_model.")}
    model = build_model(config, state, **options, **storage)
    untrained = "projector" in new and section.upsampler_file is None
    if untrained and hasattr(model.projector, "upsampler"):
        logger.warning(
            "the projector's upsampler starts from initial values: name a pre-trained one with "
            "--model.upsampler_file (bash scripts/vdim_pretrain.sh makes it)"
        )
    return Assembled(model, processor, tuple(new), original)


def _compare_with_tower(config: LlavaUHDConfig) -> None:
    """Says where a recipe prepares images in another way than its tower was trained with."""
    image, vision = config.image, config.vision_config
    own = ImageConfig().filled(vision).normalisation
    if image.normalisation != own:
        logger.warning(
            "model.image.mean and std are %s, the vision tower was trained with %s: leave them out "
            "to take those",
            image.normalisation,
            own,
        )
    if image.scale_resolution != vision.image_size:
        logger.warning(
            "model.image.scale_resolution is %s, the vision tower was trained at %s",
            image.scale_resolution,
            vision.image_size,
        )


def _language_part(
    section: ModelSection,
    state: Tensors,
    new: list[str],
    demo_tokenizer: TokenizerMaker | None,
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Adds the language model's weights to ``state``, or its name to ``new``."""
    config, tokenizer = language_config(section, demo_tokenizer)
    if isinstance(section.language_model, dict):
        new.append("language_model")
    else:
        folder = resolve_folder(str(section.language_model), "language model")
        state |= read_language_model(folder)
    return config, tokenizer


def _vision_part(section: ModelSection, state: Tensors, new: list[str]) -> PreTrainedConfig:
    """Adds the tower's weights to ``state``, or its name to ``new``."""
    config = tower_config(section)
    if isinstance(section.vision_tower, str):
        folder = resolve_folder(section.vision_tower, "vision tower")
        state |= read_tower(folder, config, section.select_layer)
    else:
        new.append("vision_tower")
    return config
