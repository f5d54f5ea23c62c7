"""Output folders of LoRA training, ours and published: an adapter beside a base.

A folder holds the adapter as PEFT writes it and, in a second file, whatever else learned (the
projector above all). Everything else is in the base, which the folder names: a language model, or
a whole multimodal checkpoint. What a folder is, its files say, never its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedConfig

from llava_uhd.checkpoint.lora_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    read_matrices,
    read_settings,
)
from llava_uhd.checkpoint.lora_layers import (
    Adapter,
    LoraLayer,
    base_name,
    check_fit,
    merge_adapter,
)
from llava_uhd.checkpoint.manifest import MANIFEST_FILE, read_manifest
from llava_uhd.checkpoint.parts import (
    read_language_model,
    read_model_config,
    read_processor,
    read_tokenizer,
    read_tower,
    read_tower_config,
)
from llava_uhd.checkpoint.published import (
    Layout,
    find_layout,
    find_tower,
    our_key,
)
from llava_uhd.checkpoint.sources import resolve_folder
from llava_uhd.checkpoint.weights import (
    Tensors,
    listing,
    read_json,
    read_tensors,
    weight_files,
    weight_names,
)
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor

KIND = "lora"
LEARNED_FILE = "non_lora_trainables.safetensors"
PUBLISHED_LEARNED_FILE = "non_lora_trainables.bin"
LANGUAGE_PREFIX = "language_model."
_WHOLE = "copy or download the whole output folder of the LoRA training"
_OUR_PARTS = (LANGUAGE_PREFIX, "vision_tower.", "projector.", "image_newline")

Item = TypeVar("Item")
Opened = tuple[LlavaUHDConfig, Tensors, LlavaUHDProcessor]
Source = str | Path | None


@dataclass(frozen=True)
class Wanted:
    """Where the rest of the model comes from.

    Attributes:
        base: folder or hub id of the base, a language model or a whole multimodal checkpoint; None
            takes the recorded one.
        vision_tower: folder or hub id whose tower replaces the one that was trained with, or None.
        open_whole: opens a whole checkpoint: (folder, None, folder of another tower or None).
    """

    base: Source
    vision_tower: Source
    open_whole: Callable[[Path, None, Source], Opened]


@dataclass(frozen=True)
class _Files:
    """The files of a LoRA folder: see `read_settings` and `read_matrices`."""

    folder: Path
    settings: dict[str, Any]
    values: dict[str, Any]
    layers: dict[str, LoraLayer]
    extra: Tensors

    @property
    def ours(self) -> bool:
        return self.values.get("model_type") == "llava_uhd"


def is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter and not the weights of a whole model."""
    marks = (ADAPTER_CONFIG, *ADAPTER_FILES, LEARNED_FILE, PUBLISHED_LEARNED_FILE)
    marked = any((folder / name).is_file() for name in marks)
    if not marked and read_manifest(folder).get("kind") != KIND:
        return False
    return not weight_files(folder)


def open_lora(folder: Path, wanted: Wanted) -> tuple[Opened, Adapter]:
    """What a LoRA folder means: its base with everything else that learned, and the adapter.

    Args:
        folder: see `is_lora`.
        wanted: where its base is.

    Returns:
        Configuration, unmerged weights and processor; and the adapter, under the model's names.

    Raises:
        UserError: a missing file or base, or an adapter that does not fit the base.
    """
    files = _read_files(folder)
    return _open_ours(files, wanted) if files.ours else _open_published(files, wanted)


def read_adapter(path: str | Path, config: LlavaUHDConfig) -> tuple[Adapter, Tensors]:
    """A trained adapter without its base, and what else learned with it, for a model at hand.

    Args:
        path: LoRA folder, ours or published, or hub id.
        config: of the model.

    Raises:
        UserError: no such folder, missing files, or weights that such a model does not have.
    """
    files = _read_files(resolve_folder(path, "adapter"))
    found = dict(read_tensors(_learned_file(files)))
    if files.ours:
        return _adapter(files, config, None), _renamed(files, files.extra | found, config, None)
    learned = _published_names(files, found)
    layout = find_layout(files.values, learned)
    return _adapter(files, config, layout), _renamed(files, learned, config, layout)


def merged(opened: Opened, adapter: Adapter, dtype: torch.dtype | None = None) -> Opened:
    """The whole model of what `open_lora` gives.

    Args:
        opened: base with everything else that learned.
        adapter: of `open_lora`.
        dtype: of the merged weights; None keeps the base's.
    """
    config, state, processor = opened
    return config, merge_adapter(adapter, state, dtype), processor


# --- our folders ----------------------------------------------------------------------------------


def _open_ours(files: _Files, wanted: Wanted) -> tuple[Opened, Adapter]:
    folder = files.folder
    config = read_model_config(folder)
    adapter = _adapter(files, config, None)
    learned = dict(read_tensors(_learned_file(files)))
    learned |= _renamed(files, files.extra, config, None)
    facts = read_manifest(folder)
    state: Tensors = {}
    tower: Source = wanted.vision_tower
    where = folder
    # A model that began from nothing lies whole beside its adapter.
    if any(f"{name}.weight" not in learned for name in adapter.layers):
        recorded = facts.get("checkpoint") or facts.get("language_model")
        where = _base_folder(files, wanted, recorded)
        if is_multimodal(where):
            if wanted.base is None:
                tower = tower or _text(facts.get("vision_tower"))
            _, state, _ = wanted.open_whole(where, None, tower)
        else:
            state = read_language_model(where)
    state |= learned
    check_fit(adapter, state, f"{where}")
    absent = not any(name.startswith("vision_tower.") for name in state)
    if wanted.vision_tower is not None or absent:
        state = _with_tower(files, config, state, tower or _text(facts.get("vision_tower")))
    return (config, state, read_processor(folder)), adapter


def _read_files(folder: Path) -> _Files:
    settings = read_settings(folder)
    layers, extra = read_matrices(folder, settings)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json, which says what model its adapter belongs to: {_WHOLE}"
        )
    return _Files(folder, settings, read_json(folder / "config.json"), layers, extra)


def _learned_file(files: _Files) -> Path:
    """File with what learned beside the adapter."""
    name = LEARNED_FILE if files.ours else PUBLISHED_LEARNED_FILE
    if not (files.folder / name).is_file():
        raise UserError(
            f"{files.folder} has no {name}, which holds what learned beside the adapter (the "
            f"projector): {_WHOLE}"
        )
    return files.folder / name


def _text(value: Any) -> str | None:
    """A recorded path; a model that began from nothing has the mapping of its configuration."""
    return value if isinstance(value, str) else None


# --- published folders ----------------------------------------------------------------------------


def _open_published(files: _Files, wanted: Wanted) -> tuple[Opened, Adapter]:
    folder, values = files.folder, files.values
    learned = _published_names(files, dict(read_tensors(_learned_file(files))))
    recorded = files.settings.get("base_model_name_or_path") or values.get("_name_or_path")
    base = _base_folder(files, wanted, recorded)
    own: LlavaUHDConfig | None = None
    names = list(learned)
    if is_multimodal(base):
        own, state, _ = wanted.open_whole(base, None, wanted.vision_tower)
        names += weight_names(base)
    else:
        state = read_language_model(base)
    layout = find_layout(values, names)
    if layout is None:
        raise UserError(
            f"{folder}/config.json has model_type '{values.get('model_type')}' and projector "
            f"'{values.get('mm_projector_type')}': not a model that loads here"
        )
    tower: Source = wanted.vision_tower
    if own is None and tower is None:
        tower = find_tower(values, folder) or _text(values.get("mm_vision_tower"))
    vision = _vision_config(files, tower) if tower else own.vision_config if own else None
    if vision is None:
        raise UserError(f"{folder}/config.json names no mm_vision_tower: pass vision_tower=FOLDER")
    try:
        config = layout.make_config(values, vision, names)
    except UserError as error:
        raise UserError(f"{folder}/config.json: {error}") from error
    adapter = _adapter(files, config, layout)
    state |= _renamed(files, learned, config, layout)
    check_fit(adapter, state, f"{base}")
    absent = not any(name.startswith("vision_tower.") for name in state)
    if wanted.vision_tower is not None or absent:
        state = _with_tower(files, config, state, tower)
    tokens = folder if _has_tokenizer(folder) else base
    processor = LlavaUHDProcessor.from_parts(read_tokenizer(tokens), config)
    return (config, state, processor), adapter


def _published_names(files: _Files, found: Tensors) -> Tensors:
    """What learned beside the adapter, without what the trainer's wrappers put before the names.

    Example: ``base_model.model.model.mm_projector.0.weight`` is ``model.mm_projector.0.weight``.
    """
    bare = {base_name(key.removeprefix("base_model.")): tensor for key, tensor in found.items()}
    if any(key.startswith("model.model.") for key in bare):
        bare = {key.removeprefix("model."): tensor for key, tensor in bare.items()}
    return files.extra | bare


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


# --- both -----------------------------------------------------------------------------------------


def is_multimodal(folder: Path) -> bool:
    """Whether a base is a whole multimodal checkpoint and not a language model alone."""
    values = read_json(folder / "config.json")
    ours = values.get("model_type") == "llava_uhd"
    return ours or "mm_projector_type" in values or "vision_config" in values


def _base_folder(files: _Files, wanted: Wanted, recorded: Any) -> Path:
    """Folder of the base that was asked for, or else is recorded.

    Raises:
        UserError: none is, or it is not here; the message names the key and what to pass.
    """
    if wanted.base is not None:
        return resolve_folder(wanted.base, "base of the adapter")
    if not isinstance(recorded, str) or not recorded:
        raise UserError(
            f"{files.folder} holds an adapter but does not name its base (language_model or "
            f"checkpoint in {MANIFEST_FILE}, base_model_name_or_path in {ADAPTER_CONFIG}): pass "
            "base=FOLDER, the model it was trained on"
        )
    try:
        return resolve_folder(recorded, "base")
    except UserError as error:
        raise UserError(
            f"{files.folder} holds an adapter for '{recorded}', which is not here ({error}): pass "
            "base=FOLDER, the model it was trained on"
        ) from None


def _vision_config(files: _Files, tower: str | Path) -> PreTrainedConfig:
    return read_tower_config(_tower_folder(files, tower))


def _tower_folder(files: _Files, tower: Source) -> Path:
    try:
        if tower is None:
            raise UserError("none is recorded")
        return resolve_folder(tower, "vision tower")
    except UserError as error:
        raise UserError(
            f"{files.folder}: its vision tower is not here ({error}): pass vision_tower=FOLDER"
        ) from None


def _with_tower(files: _Files, config: LlavaUHDConfig, state: Tensors, tower: Source) -> Tensors:
    folder = _tower_folder(files, tower)
    kept = {key: value for key, value in state.items() if not key.startswith("vision_tower.")}
    return kept | read_tower(folder, read_tower_config(folder), config.select_layer)


def _adapter(files: _Files, config: LlavaUHDConfig, layout: Layout | None) -> Adapter:
    weights = {f"{module}.weight": layer for module, layer in files.layers.items()}
    renamed = _renamed(files, weights, config, layout)
    layers = {name.removesuffix(".weight"): layer for name, layer in renamed.items()}
    return Adapter(files.folder, files.settings, layers)


def _renamed(
    files: _Files, found: Mapping[str, Item], config: LlavaUHDConfig, layout: Layout | None
) -> dict[str, Item]:
    """What belongs to weights, under the model's names; what the model does not use is left out.

    Raises:
        UserError: names that are no part of such a model.
    """
    renamed: dict[str, Item] = {}
    foreign = []
    for key, item in found.items():
        try:
            name = _our_name(key, config, layout)
        except KeyError:
            foreign.append(key)
            continue
        if name is not None:
            renamed[name] = item
    if foreign:
        raise UserError(f"{files.folder}: {listing('unknown weights', foreign)}")
    return renamed


def _our_name(key: str, config: LlavaUHDConfig, layout: Layout | None) -> str | None:
    """Our name of a weight in a LoRA folder; None where the model has no use for it.

    Raises:
        KeyError: unknown.
    """
    if key.startswith(_OUR_PARTS):
        return key
    if layout is not None:
        return our_key(layout, key, config)
    if key.startswith(("model.", "lm_head.")):
        return LANGUAGE_PREFIX + key
    raise KeyError(key)
