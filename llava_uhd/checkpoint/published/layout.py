"""What a published layout is: how its configuration and its weight names read as ours, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from llava_uhd.checkpoint.parts import tower_key
from llava_uhd.checkpoint.projector_names import our_projector_key, published_projector_key
from llava_uhd.checkpoint.published.towers import tower_depth
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."

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
    """

    name: str
    slug: str
    matches: Callable[[Values, Names], bool]
    make_config: Callable[[Values, PreTrainedConfig, Names], LlavaUHDConfig]
    write_config: Callable[[LlavaUHDConfig], Values]
    unused: dict[str, str]


def our_key(layout: Layout, key: str, config: LlavaUHDConfig) -> str | None:
    """Our name of a published key, or None if the layout lists it as unused.

    Args:
        layout: of the checkpoint.
        key: published name.
        config: of the model that is filled.

    Raises:
        KeyError: a key that is neither mapped nor listed.
    """
    if key.startswith(VISION_PREFIX):
        ours = tower_key(key.removeprefix(VISION_PREFIX), tower_depth(config))
        if ours is not None:
            return f"vision_tower.{ours}"
    elif key.startswith(PROJECTOR_PREFIX):
        ours = our_projector_key(key.removeprefix(PROJECTOR_PREFIX), config.projector)
        if ours is not None:
            return f"projector.{ours}"
    elif not key.endswith("rotary_emb.inv_freq") and key.startswith(("model.", "lm_head.")):
        return f"language_model.{key}"
    if any(re.fullmatch(pattern, key) for pattern in layout.unused):
        return None
    raise KeyError(key)


def published_key(key: str, config: LlavaUHDConfig) -> str:
    """Inverse of `our_key` on the keys that reach the forward pass."""
    if key.startswith("vision_tower."):
        name = key.removeprefix("vision_tower.")
        return VISION_PREFIX + (f"encoder.{name}" if name.startswith("layers.") else name)
    if key.startswith("projector."):
        name = key.removeprefix("projector.")
        return PROJECTOR_PREFIX + published_projector_key(name, config.projector)
    return key.removeprefix("language_model.")


def key_map(layout: Layout, names: Iterable[str], config: LlavaUHDConfig) -> dict[str, str]:
    """Published name -> ours, of all weights that the model uses.

    Args:
        layout: of the checkpoint.
        names: of all its weights.
        config: of the model that is filled.

    Raises:
        UserError: names that are neither mapped nor listed as unused, all in one message.
    """
    table: dict[str, str] = {}
    foreign = []
    for name in names:
        try:
            ours = our_key(layout, name, config)
        except KeyError:
            foreign.append(name)
            continue
        if ours is not None:
            table[name] = ours
    if foreign:
        more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
        raise UserError(
            f"{len(foreign)} weights are not part of the {layout.name} layout: "
            f"{', '.join(foreign[:8])}{more}"
        )
    return table
