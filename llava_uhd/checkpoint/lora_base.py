"""What LoRA folders of every origin share: their files, and finding the base they belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from llava_uhd.checkpoint.lora_files import (
    ADAPTER_CONFIG,
    read_matrices,
    read_settings,
)
from llava_uhd.checkpoint.lora_layers import (
    Adapter,
    LoraLayer,
)
from llava_uhd.checkpoint.manifest import MANIFEST_FILE
from llava_uhd.checkpoint.parts import (
    read_tower_config,
)
from llava_uhd.checkpoint.published import (
    Layout,
    our_key,
)
from llava_uhd.checkpoint.published_folder import replace_tower
from llava_uhd.checkpoint.sources import PUBLISHED_LEARNED_FILE, resolve_folder
from llava_uhd.checkpoint.weights import (
    Tensors,
    listing,
    read_json,
)
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor

KIND = "lora"
LEARNED_FILE = "non_lora_trainables.safetensors"
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
class LoraFiles:
    """The files of a LoRA folder.

    Attributes:
        folder: they are in.
        settings: see `read_settings`.
        values: of ``config.json``.
        layers: see `read_matrices`, under the names in the file.
        extra: likewise.
    """

    folder: Path
    settings: dict[str, Any]
    values: dict[str, Any]
    layers: dict[str, LoraLayer]
    extra: Tensors

    @property
    def ours(self) -> bool:
        """Whether the folder is in our layout."""
        return self.values.get("model_type") == "llava_uhd"


def read_files(folder: Path) -> LoraFiles:
    """Adapter and settings of a LoRA folder.

    Raises:
        UserError: a missing or damaged file; the message says which.
    """
    settings = read_settings(folder)
    layers, extra = read_matrices(folder, settings)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} has no config.json, which says what model its adapter belongs to: {_WHOLE}"
        )
    return LoraFiles(folder, settings, read_json(folder / "config.json"), layers, extra)


def learned_file(files: LoraFiles) -> Path:
    """File with what learned beside the adapter.

    Raises:
        UserError: it is missing.
    """
    name = LEARNED_FILE if files.ours else PUBLISHED_LEARNED_FILE
    if not (files.folder / name).is_file():
        raise UserError(
            f"{files.folder} has no {name}, which holds what learned beside the adapter (the "
            f"projector): {_WHOLE}"
        )
    return files.folder / name


def recorded_path(value: Any) -> str | None:
    """A recorded path; a model that began from nothing has the mapping of its configuration."""
    return value if isinstance(value, str) else None


def is_multimodal(folder: Path) -> bool:
    """Whether a base is a whole multimodal checkpoint and not a language model alone."""
    values = read_json(folder / "config.json")
    ours = values.get("model_type") == "llava_uhd"
    return ours or "mm_projector_type" in values or "vision_config" in values


def base_folder(files: LoraFiles, wanted: Wanted, recorded: Any) -> Path:
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


def read_vision(files: LoraFiles, tower: str | Path) -> PreTrainedConfig:
    """Configuration of a tower's folder or hub id.

    Raises:
        UserError: it is not here; the message says what to pass.
    """
    return read_tower_config(_tower_folder(files, tower))


def _tower_folder(files: LoraFiles, tower: Source) -> Path:
    try:
        if tower is None:
            raise UserError("none is recorded")
        return resolve_folder(tower, "vision tower")
    except UserError as error:
        raise UserError(
            f"{files.folder}: its vision tower is not here ({error}): pass vision_tower=FOLDER"
        ) from None


def with_tower(files: LoraFiles, config: LlavaUHDConfig, state: Tensors, tower: Source) -> Tensors:
    """The same weights with the tower of another folder or hub id; see `read_vision`."""
    return replace_tower(config, state, _tower_folder(files, tower))


def make_adapter(files: LoraFiles, config: LlavaUHDConfig, layout: Layout | None) -> Adapter:
    """The adapter under the model's names; see `our_names`."""
    weights = {f"{module}.weight": layer for module, layer in files.layers.items()}
    renamed = our_names(files, weights, config, layout)
    layers = {name.removesuffix(".weight"): layer for name, layer in renamed.items()}
    return Adapter(files.folder, files.settings, layers)


def our_names(
    files: LoraFiles, found: Mapping[str, Item], config: LlavaUHDConfig, layout: Layout | None
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
