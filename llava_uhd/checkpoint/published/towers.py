"""The vision towers of published models: where they lie, and what is known of them by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.vision.towers import num_built_layers

# Every published CLIP model here uses this tower: its shape is needed when the weights lie inside
# the checkpoint and the recorded path does not exist here.
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


def hub_name(vision: PreTrainedConfig) -> str | None:
    """Hub id of a tower with exactly this shape, or None if it is no known one."""
    for name, values in KNOWN_TOWERS.items():
        if all(getattr(vision, key, None) == value for key, value in values.items()):
            return f"{_HUB[vision.model_type]}/{name}"
    return None


def tower_depth(config: LlavaUHDConfig) -> int:
    """Tower layers that the model builds."""
    return num_built_layers(config.vision_config.num_hidden_layers, config.select_layer)
