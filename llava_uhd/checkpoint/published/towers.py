"""The vision towers of published models: where they lie, and what is known of them by name."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llava_uhd.checkpoint.parts import read_tower_config
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.vision.towers import num_built_layers

logger = logging.getLogger(__name__)

# Name of a weight -> its shape.
Shapes = Mapping[str, tuple[int, ...]]

# Nearly every published CLIP model here uses this tower: its shape is needed when the weights lie
# inside the checkpoint and the recorded path does not exist here.
CLIP_L_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}

SIGLIP_SO400M_384: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}

# Last part of a folder or hub name -> shape, for folders that are not here.
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {"model_type": "clip_vision_model", **CLIP_L_336},
    "clip-vit-large-patch14": {"model_type": "clip_vision_model", **CLIP_L_336, "image_size": 224},
    "siglip-so400m-patch14-384": {"model_type": "siglip_vision_model", **SIGLIP_SO400M_384},
}

# The organisation that publishes each of them on the hub.
_HUB = {"clip_vision_model": "openai", "siglip_vision_model": "google"}


@dataclass(frozen=True)
class TowerHabits:
    """What the published code does with one family of towers, whatever the recorded settings.

    Attributes:
        name: part of the recorded path by which the published code knows the family.
        scale_resolution: side in pixels of the square whose area a view aims at.
        select_layer: the only layer that is read, or None: the recorded one.
    """

    name: str
    scale_resolution: int
    select_layer: int | None


HABITS = {
    "clip_vision_model": TowerHabits("clip", 336, None),
    # The published code deletes the last layer and reads what is left.
    "siglip_vision_model": TowerHabits("siglip", 384, -2),
}


def tower_habits(vision: PreTrainedConfig) -> TowerHabits:
    """Habits of the published code with a tower.

    Raises:
        UserError: no published model has such a tower.
    """
    if vision.model_type not in HABITS:
        raise UserError(
            f"a published layout has no '{vision.model_type}' tower, only {', '.join(HABITS)}"
        )
    return HABITS[vision.model_type]


def find_tower(config: dict[str, Any], folder: Path) -> Path | None:
    """Local folder of the recorded vision tower: relative to the checkpoint, then to here."""
    recorded = str(config.get("mm_vision_tower") or "")
    if not recorded:
        return None
    for candidate in (folder / recorded, Path(recorded)):
        if (candidate / "config.json").is_file():
            return candidate
    return None


def tower_config_by_name(config: dict[str, Any]) -> PreTrainedConfig | None:
    """Tower shape of a recorded name whose folder is not here, if it is a known one."""
    recorded = str(config.get("mm_vision_tower") or "").rstrip("/")
    for name, values in KNOWN_TOWERS.items():
        if recorded.endswith(name):
            return AutoConfig.for_model(**values)
    return None


def read_recorded_tower(config: dict[str, Any], folder: Path | None) -> PreTrainedConfig | None:
    """Tower shape from its folder, or where that is not here (None) by its name, if it is known."""
    return read_tower_config(folder) if folder is not None else tower_config_by_name(config)


# --- shapes of weights ----------------------------------------------------------------------------

# Attention heads of widths that are no multiple of 64, or not divided into heads of 64.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def tower_config_of_weights(
    config: dict[str, Any], shapes: Shapes, prefix: str
) -> PreTrainedConfig | None:
    """Tower shape from the weights themselves, where its folder is not here.

    What weights do not show comes from the tower of the recorded name where that has the same
    patches, else from its family: the input's side (a rest of a patch is not read), the activation,
    and the number of heads, which is told where it had to be guessed.

    Args:
        config: values of the checkpoint's ``config.json``.
        shapes: of all weights, by their stored names.
        prefix: of the names of the tower's weights.

    Returns:
        None if there is no tower among the weights.
    """
    own = {
        key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)
    }
    patches = own.get("embeddings.patch_embedding.weight")
    positions = own.get("embeddings.position_embedding.weight")
    inner = own.get("encoder.layers.0.mlp.fc1.weight")
    if patches is None or positions is None or inner is None:
        return None
    family = "siglip" if "embeddings.patch_embedding.bias" in own else "clip"
    grid = isqrt(positions[0])  # a class token makes no whole row
    width, patch = patches[0], patches[2]
    depth = 1 + max(int(match.group(1)) for key in own if (match := _LAYER.match(key)))
    found = {
        "model_type": f"{family}_vision_model",
        "hidden_size": width,
        "intermediate_size": inner[0],
        # The published code deletes the last layer of this family before it saves.
        "num_hidden_layers": depth + 1 if family == "siglip" else depth,
        "patch_size": patch,
    }
    named = tower_config_by_name(config)
    if named is not None and all(getattr(named, key) == value for key, value in found.items()):
        return named
    usual = KNOWN_TOWERS[
        "siglip-so400m-patch14-384" if family == "siglip" else "clip-vit-large-patch14-336"
    ]
    side = grid * patch
    for each in (named, AutoConfig.for_model(**usual)):
        if each is not None and (each.patch_size, each.image_size // patch) == (patch, grid):
            side = each.image_size
    heads = _guessed_heads(width)
    logger.warning(
        "the vision tower '%s' is not here; of its weights (width %d, %d layers) the number of "
        "attention heads cannot be told: %d are taken; if that is wrong, pass vision_tower=FOLDER "
        "(its config.json is enough)",
        config.get("mm_vision_tower"),
        *(width, depth, heads),
    )
    shape = {**usual, **found, "image_size": side, "num_attention_heads": heads}
    if "laion" in str(config.get("mm_vision_tower")).lower():
        shape["hidden_act"] = "gelu"
    return AutoConfig.for_model(**shape)


def _guessed_heads(width: int) -> int:
    """Heads of 64, as most published towers have them; of 8 in a tower too narrow for that.

    Example: 768: 12; 1152: 16; 32: 4.
    """
    if width in _HEADS:
        return _HEADS[width]
    return max(width // (64 if width % 64 == 0 and width > 64 else 8), 1)


def hub_name(vision: PreTrainedConfig) -> str | None:
    """Hub id of a tower with exactly this shape, or None if it is no known one."""
    for name, values in KNOWN_TOWERS.items():
        if all(getattr(vision, key, None) == value for key, value in values.items()):
            return f"{_HUB[vision.model_type]}/{name}"
    return None


def usual_select_layer(config: LlavaUHDConfig) -> LlavaUHDConfig:
    """An equal model that reads the last layer but one of its tower, unless it is a well-known one.

    Which layers lie behind the one that is read makes no difference: they are not built. The
    published code counts from the end of the whole tower.
    """
    if config.select_layer == -2 or hub_name(config.vision_config) is not None:
        return config
    equal = copy.deepcopy(config)
    equal.vision_config.num_hidden_layers = tower_depth(config) + 1
    equal.select_layer = -2
    return equal


def tower_depth(config: LlavaUHDConfig) -> int:
    """Tower layers that the model builds."""
    return num_built_layers(config.vision_config.num_hidden_layers, config.select_layer)
