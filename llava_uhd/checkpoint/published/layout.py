"""What a published layout is: how its configuration and its weight names read as ours, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llava_uhd.checkpoint.parts import tower_key
from llava_uhd.checkpoint.projector_names import our_projector_key, published_projector_key
from llava_uhd.checkpoint.published.towers import (
    Shapes,
    find_tower,
    read_recorded_tower,
    tower_depth,
)
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."
NEWLINE_KEY = "model.image_newline"
RESAMPLER_PREFIX = "model.vision_resampler."

Values = dict[str, Any]
Names = Collection[str]

# Published weights of tower and language model that no model here uses, each with the reason.
COMMON_UNUSED = {
    r".*rotary_emb\.inv_freq": "recomputed from the configuration",
    re.escape(VISION_PREFIX) + r"embeddings\.position_ids": "an index table",
    re.escape(VISION_PREFIX) + r"post_layernorm\..*": "behind the selected layer",
    re.escape(VISION_PREFIX) + r"head\..*": "behind the selected layer",
    re.escape(VISION_PREFIX) + r"encoder\.layers\.\d+\..*": "behind the selected layer",
}


def original_to_ours(key: str, config: LlavaUHDConfig) -> str | None:
    """Our name of a weight that an original system calls ``key``; None: the model has no such one.

    Raises:
        KeyError: a name of no known part.
    """
    if key.startswith(VISION_PREFIX):
        ours = tower_key(key.removeprefix(VISION_PREFIX), tower_depth(config))
        return None if ours is None else f"vision_tower.{ours}"
    if key.startswith(PROJECTOR_PREFIX):
        ours = our_projector_key(key.removeprefix(PROJECTOR_PREFIX), config.projector)
        return None if ours is None else f"projector.{ours}"
    if key == NEWLINE_KEY:
        return "image_newline" if config.has_newline else None
    if key.endswith("rotary_emb.inv_freq") or key.startswith(RESAMPLER_PREFIX):
        return None
    if key.startswith(("model.", "lm_head.")):
        return f"language_model.{key}"
    raise KeyError(key)


def published_key(key: str, config: LlavaUHDConfig) -> str:
    """Inverse of `original_to_ours` on the keys that reach the forward pass."""
    if key.startswith("vision_tower."):
        name = key.removeprefix("vision_tower.")
        return VISION_PREFIX + (f"encoder.{name}" if name.startswith("layers.") else name)
    if key.startswith("projector."):
        name = key.removeprefix("projector.")
        return PROJECTOR_PREFIX + published_projector_key(name, config.projector)
    if key == "image_newline":
        return NEWLINE_KEY
    return key.removeprefix("language_model.")


@dataclass(frozen=True)
class KeyRules:
    """How the weights of a layout are called.

    Attributes:
        to_ours: (published name, configuration) -> ours, or None; see `original_to_ours`.
        to_published: its inverse on the keys that reach the forward pass.
        tower: beginnings of the names of the vision tower's weights.
    """

    to_ours: Callable[[str, LlavaUHDConfig], str | None] = original_to_ours
    to_published: Callable[[str, LlavaUHDConfig], str] = published_key
    tower: tuple[str, ...] = (VISION_PREFIX,)


def recorded_vision(values: Values, folder: Path, shapes: Shapes) -> PreTrainedConfig | None:
    """Tower of an original checkpoint: from its folder, else by its well-known name."""
    return read_recorded_tower(values, find_tower(values, folder))


def unchanged(values: Values, folder: Path) -> Values:
    """A layout whose ``config.json`` says all."""
    return values


def _as_it_is(config: LlavaUHDConfig) -> LlavaUHDConfig:
    return config


@dataclass(frozen=True)
class Layout:
    """One published layout.

    Attributes:
        name: for messages.
        slug: on the command line.
        matches: (configuration values, weight names) -> whether a checkpoint is of this layout.
            Without weights at hand the names are empty.
        make_config: (configuration values, tower configuration, weight names) -> ours.
        write_config: our configuration -> the values that this system adds to the common ones.
        unused: patterns of published keys that the model does not use, each with the reason.
        languages: model types of the language models that it holds, None: any.
        keys: names of the weights.
        find_vision: (configuration values, folder, shapes of the weights) -> configuration of the
            tower, or None where it is not known.
        complete: (configuration values, folder) -> the same with what other files of the folder
            say.
        additive: what `write_config` returns is added to what all original systems record;
            otherwise it is the whole configuration.
        prepare: an equal model in the terms of the layout, before it is written.
    """

    name: str
    slug: str
    matches: Callable[[Values, Names], bool]
    make_config: Callable[[Values, PreTrainedConfig, Names], LlavaUHDConfig]
    write_config: Callable[[LlavaUHDConfig], Values]
    unused: dict[str, str]
    languages: tuple[str, ...] | None = ("llama", "qwen2")
    keys: KeyRules = KeyRules()
    find_vision: Callable[[Values, Path, Shapes], PreTrainedConfig | None] = recorded_vision
    complete: Callable[[Values, Path], Values] = unchanged
    additive: bool = True
    prepare: Callable[[LlavaUHDConfig], LlavaUHDConfig] = _as_it_is

    def holds_tower(self, names: Iterable[str]) -> bool:
        """Whether the vision tower is among the weights."""
        return any(name.startswith(self.keys.tower) for name in names)


def our_key(layout: Layout, key: str, config: LlavaUHDConfig) -> str | None:
    """Our name of a published key, or None if the layout lists it as unused.

    Args:
        layout: of the checkpoint.
        key: published name.
        config: of the model that is filled.

    Raises:
        KeyError: a key that is neither mapped nor listed.
    """
    ours = layout.keys.to_ours(key, config)
    if ours is None and not any(re.fullmatch(pattern, key) for pattern in layout.unused):
        raise KeyError(key)
    return ours


def key_map(layout: Layout, names: Iterable[str], config: LlavaUHDConfig) -> dict[str, str]:
    """Published name -> ours, of all weights that the model uses.

    Args:
        layout: of the checkpoint.
        names: of all its weights.
        config: of the model that is filled.

    Raises:
        UserError: names that are neither mapped nor listed as unused, all in one message; or two
            names of one weight.
    """
    table: dict[str, str] = {}
    taken: dict[str, str] = {}
    foreign = []
    for name in names:
        try:
            ours = our_key(layout, name, config)
        except KeyError:
            foreign.append(name)
            continue
        if ours is None:
            continue
        if ours in taken:
            raise UserError(f"'{taken[ours]}' and '{name}' are two names of one weight")
        table[name], taken[ours] = ours, name
    if foreign:
        more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
        raise UserError(
            f"{len(foreign)} weights are not part of the {layout.name} layout: "
            f"{', '.join(foreign[:8])}{more}"
        )
    return table
