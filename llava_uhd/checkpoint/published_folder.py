"""Folders in a published layout: configuration, weights under our names, and processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_uhd.checkpoint.parts import (
    PUBLISHED_PROJECTOR_FILE,
    find_projector,
    read_language_config,
    read_language_model,
    read_projector,
    read_tokenizer,
    read_tower,
    read_tower_config,
)
from llava_uhd.checkpoint.published import Layout, find_layout, find_tower, key_map
from llava_uhd.checkpoint.published.values import VDIM_KEYS, foreign_language_model
from llava_uhd.checkpoint.sources import resolve_folder
from llava_uhd.checkpoint.tokenizer_files import restore_word_starts
from llava_uhd.checkpoint.vdim import UPSAMPLER_PREFIX, read_vdim
from llava_uhd.checkpoint.weights import (
    Tensors,
    read_folder,
    read_shapes,
    read_tensors,
    weight_files,
    weight_names,
)
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import TEMPLATES

Opened = tuple[LlavaUHDConfig, Tensors, LlavaUHDProcessor]
Source = str | Path | None


def stored_names(folder: Path) -> list[str]:
    """Names of the weights of a checkpoint folder, or of its projector file; may be empty."""
    names = weight_names(folder)
    projector = folder / PUBLISHED_PROJECTOR_FILE
    if not names and projector.is_file():
        names = [key for key, _ in read_tensors(projector)]
    return names


def published_config(
    folder: Path, values: dict[str, Any], names: list[str], tower: Path | None
) -> tuple[Layout, LlavaUHDConfig]:
    """Layout and configuration of a published folder.

    Args:
        folder: of the checkpoint.
        values: of its ``config.json``.
        names: of its weights.
        tower: folder of its vision tower, or None where that is not here.

    Raises:
        UserError: unknown layout, unknown tower, or values that mean no model.
    """
    layout = find_layout(values, names)
    if layout is None:
        raise UserError(f"{folder}/config.json {_not_ours(values)}")
    try:
        values = layout.complete(values, folder)
        if tower is not None:
            vision = read_tower_config(tower)
        else:
            shapes = read_shapes(folder, lambda name: name.startswith(layout.keys.tower))
            vision = layout.find_vision(values, folder, shapes)
        if vision is not None:
            return layout, layout.make_config(values, vision, names)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    raise UserError(
        f"{folder}: its vision tower '{values.get('mm_vision_tower')}' is not here: pass "
        "vision_tower=FOLDER (a CLIP or SigLIP folder of transformers)"
    )


def _not_ours(values: dict[str, Any]) -> str:
    foreign = foreign_language_model(values)
    if foreign is not None:
        return (
            f"is that of a LLaVA with an {foreign.upper()} language model, which is not supported"
        )
    what = f"has model_type '{values.get('model_type')}'"
    if "mm_projector_type" in values:
        what += f" and projector '{values['mm_projector_type']}'"
    return f"{what}: not a LLaVA-UHD model, nor one of its family, that loads here"


def open_published(
    folder: Path, values: dict[str, Any], base: Source, vision_tower: Source
) -> Opened:
    """Configuration, weights under our names, and processor of a published folder.

    Args:
        folder: a whole checkpoint, or one with a projector file only.
        values: of its ``config.json``.
        base: language model of a folder with a projector only.
        vision_tower: folder or hub id whose tower replaces the checkpoint's own.

    Raises:
        UserError: unknown layout, missing parts, or weights that do not fit.
    """
    names = stored_names(folder)
    layout = find_layout(values, names)
    inside = layout is not None and layout.holds_tower(names)
    tower = _tower_folder(folder, values, vision_tower, inside)
    layout, config = published_config(folder, values, names, tower)
    try:
        table = key_map(layout, names, config) if weight_files(folder) else {}
    except UserError as error:
        raise UserError(f"checkpoint {folder}: {error}") from None
    if table:
        # Weights that nothing uses, a whole second tower among them, are not even read.
        weights = read_folder(folder, table.__contains__)
        state = {table[name]: tensor for name, tensor in weights.items()}
    else:
        state = _language_model(folder, values, base, config) | read_projector(folder, config)
    state |= _recorded_upsampler(folder, values, config, state)
    if vision_tower is not None or not inside:
        if tower is None:
            raise UserError(
                f"{folder} has no vision weights, and '{values.get('mm_vision_tower')}' is not "
                "here: pass vision_tower=FOLDER"
            )
        state = replace_tower(config, state, tower)
    source = folder if has_tokenizer(folder) or base is None else Path(base)
    return config, state, published_processor(source, config)


def published_processor(source: Path, config: LlavaUHDConfig) -> LlavaUHDProcessor:
    """Processor of a published model.

    Args:
        source: folder with its tokenizer.
        config: of the model.

    Raises:
        UserError: no usable tokenizer, or one without the learned tokens of the template.
    """
    tokenizer = read_tokenizer(source)
    restore_word_starts(tokenizer)
    for mark in getattr(TEMPLATES.get(config.template), "added_tokens", ()):
        if mark not in tokenizer.get_added_vocab():
            raise UserError(
                f"{source} has no token {mark}, which stands beside every image of this model "
                "(mm_use_im_start_end): copy the tokenizer files that were saved with it there"
            )
    return LlavaUHDProcessor.from_parts(tokenizer, config)


def _tower_folder(
    folder: Path, values: dict[str, Any], vision_tower: Source, inside: bool
) -> Path | None:
    """Folder of the tower that was asked for, or is recorded; None: it is not here."""
    if vision_tower is not None:
        return resolve_folder(vision_tower, "vision tower")
    local = find_tower(values, folder)
    recorded = values.get("mm_vision_tower")
    if local is not None or inside or not isinstance(recorded, str) or recorded.count("/") != 1:
        return local
    try:
        return resolve_folder(recorded, "vision tower")
    except UserError as error:
        raise UserError(
            f"{folder} has no vision weights, and its vision tower '{recorded}' is not here: pass "
            f"vision_tower=FOLDER ({error})"
        ) from error


def _language_model(
    folder: Path, values: dict[str, Any], base: Source, config: LlavaUHDConfig
) -> Tensors:
    """The language model beside a projector that was trained with it."""
    if base is None:
        file = find_projector(folder).name
        raise UserError(
            f"{folder} holds only {file}: pass base=FOLDER, the language model it was trained "
            f"with (recorded: '{values.get('_name_or_path')}')"
        )
    source = resolve_folder(base, "language model")
    width = read_language_config(source).hidden_size
    if width != config.hidden_size:
        raise UserError(
            f"language model {source} has width {width}, the projector was trained for "
            f"{config.hidden_size}"
        )
    return read_language_model(source)


def _recorded_upsampler(
    folder: Path, values: dict[str, Any], config: LlavaUHDConfig, state: Tensors
) -> Tensors:
    """The upsampler of a projector that lacks it, from the file that its configuration names."""
    scale = max(config.projector.scales)
    if scale == 1 or any(key.startswith(UPSAMPLER_PREFIX) for key in state):
        return {}
    recorded = next((str(values[key]) for key in VDIM_KEYS if values.get(key)), None)
    if recorded is None:
        return {}
    for path in (folder / recorded, Path(recorded)):
        if path.exists():
            stack = read_vdim(path, config.vision_config.hidden_size, scale)
            return {f"{UPSAMPLER_PREFIX}{key}": tensor for key, tensor in stack.items()}
    raise UserError(
        f"{folder} holds no upsampler, and '{recorded}', which its config.json names, is not here: "
        "put the file there"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder brings a tokenizer of its own."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def replace_tower(config: LlavaUHDConfig, state: Tensors, tower: str | Path) -> Tensors:
    """The same weights with the tower of another folder or hub id."""
    folder = resolve_folder(tower, "vision tower")
    kept = {key: value for key, value in state.items() if not key.startswith("vision_tower.")}
    return kept | read_tower(folder, read_tower_config(folder), config.select_layer)
