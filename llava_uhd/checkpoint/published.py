"""Published checkpoint layouts and how they read as ours.

One `Layout` per published system. A layout is recognised by the configuration's ``architectures``
and projector type, never by a folder name. Its key map sends every weight that reaches the forward
pass to exactly one of ours; every other key must match a pattern of ``unused``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llava_uhd.checkpoint.parts import tower_key
from llava_uhd.checkpoint.weights import Tensors
from llava_uhd.config.model import ImageConfig, LlavaUHDConfig, ProjectorConfig, make_config
from llava_uhd.errors import UserError
from llava_uhd.vision.towers import num_built_layers

# CLIP ViT-L/14-336, which every published model of this layout uses: its shape is needed when the
# weights lie inside the checkpoint and the recorded path does not exist here.
CLIP_L_336 = {
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

VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
PROJECTOR_PREFIX = "model.mm_projector."


@dataclass(frozen=True)
class Layout:
    """One published layout.

    Attributes:
        name: for messages.
        matches: whether a configuration dict is of this layout.
        make_config: configuration dict and tower configuration to ours.
        unused: patterns of published keys that the model does not use, each with the reason.
    """

    name: str
    matches: Callable[[dict[str, Any]], bool]
    make_config: Callable[[dict[str, Any], PreTrainedConfig], LlavaUHDConfig]
    unused: dict[str, str]


def _is_uhd_v1(config: dict[str, Any]) -> bool:
    return (
        "LlavaLlamaForCausalLM" in (config.get("architectures") or [])
        or config.get("model_type") == "llava_llama"
    ) and config.get("mm_projector_type") == "adapt_spatial_resampler"


def text_config(config: dict[str, Any], model_type: str) -> PreTrainedConfig:
    """Language-model part of a published configuration, without its storage dtype."""
    known = AutoConfig.for_model(model_type).to_dict().keys() | {"rope_theta", "rope_scaling"}
    skipped = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version"}
    if config.get("rope_scaling") is None:
        skipped.add("rope_scaling")  # the library warns of the old name even where it says nothing
    values = {key: value for key, value in config.items() if key in known - skipped}
    return make_config({**values, "model_type": model_type}, "the language model's configuration")


def _uhd_v1_config(config: dict[str, Any], vision: PreTrainedConfig) -> LlavaUHDConfig:
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(
            f"mm_vision_select_feature '{config['mm_vision_select_feature']}' is not supported, "
            "only 'patch'"
        )
    if config.get("mm_use_im_start_end"):
        raise UserError("mm_use_im_start_end is set: start and end tokens are not supported")
    return LlavaUHDConfig(
        vision_config=vision,
        text_config=text_config(config, "llama"),
        # The published code has these as constants; they are not in its config.json.
        image=ImageConfig(strategy="slices", patch_size=vision.patch_size, bounded=False),
        projector=ProjectorConfig(type="spatial_resampler", num_queries=144, train_positions=False),
        template="plain" if config.get("tune_mm_mlp_adapter") else "v1",
        select_layer=config.get("mm_vision_select_layer", -2),
    )


UHD_V1 = Layout(
    name="LLaVA-UHD v1",
    matches=_is_uhd_v1,
    make_config=_uhd_v1_config,
    unused={
        r".*rotary_emb\.inv_freq": "recomputed from the configuration",
        re.escape(VISION_PREFIX) + r"embeddings\.position_ids": "an index table",
        re.escape(VISION_PREFIX) + r"post_layernorm\..*": "behind the selected layer",
        re.escape(VISION_PREFIX) + r"encoder\.layers\.\d+\..*": "behind the selected layer",
    },
)

LAYOUTS = (UHD_V1,)


def find_layout(config: dict[str, Any]) -> Layout | None:
    """The layout of a configuration dict, or None if it is not a published one."""
    return next((layout for layout in LAYOUTS if layout.matches(config)), None)


def our_state(layout: Layout, weights: Tensors, depth: int) -> Tensors:
    """Published weights under our names.

    Args:
        layout: of the checkpoint.
        weights: under their published names.
        depth: tower layers that are built.

    Raises:
        UserError: keys that are neither mapped nor listed, all in one message.
    """
    state: Tensors = {}
    foreign = []
    for key, tensor in weights.items():
        try:
            ours = our_key(layout, key, depth)
        except KeyError:
            foreign.append(key)
            continue
        if ours is not None:
            state[ours] = tensor
    if foreign:
        more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
        raise UserError(
            f"{len(foreign)} weights are not part of the {layout.name} layout: "
            f"{', '.join(foreign[:8])}{more}"
        )
    return state


def our_key(layout: Layout, key: str, depth: int) -> str | None:
    """Our name of a published key, or None if the layout lists it as unused.

    Args:
        layout: of the checkpoint.
        key: published name.
        depth: tower layers that are built.

    Raises:
        KeyError: a key that is neither mapped nor listed.
    """
    if key.startswith(VISION_PREFIX):
        ours = tower_key(key.removeprefix(VISION_PREFIX), depth)
        if ours is not None:
            return f"vision_tower.{ours}"
    elif key.startswith(PROJECTOR_PREFIX):
        return "projector." + key.removeprefix(PROJECTOR_PREFIX)
    elif not key.endswith("rotary_emb.inv_freq") and key.startswith(("model.", "lm_head.")):
        return f"language_model.{key}"
    if any(re.fullmatch(pattern, key) for pattern in layout.unused):
        return None
    raise KeyError(key)


def published_key(key: str) -> str:
    """Inverse of `our_key` on the keys that reach the forward pass."""
    if key.startswith("vision_tower."):
        name = key.removeprefix("vision_tower.")
        return VISION_PREFIX + (f"encoder.{name}" if name.startswith("layers.") else name)
    if key.startswith("projector."):
        return PROJECTOR_PREFIX + key.removeprefix("projector.")
    return key.removeprefix("language_model.")


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
    if str(config.get("mm_vision_tower") or "").rstrip("/").endswith("clip-vit-large-patch14-336"):
        return AutoConfig.for_model("clip_vision_model", **CLIP_L_336)
    return None


def tower_depth(config: LlavaUHDConfig) -> int:
    """Tower layers that the model builds."""
    return num_built_layers(config.vision_config.num_hidden_layers, config.select_layer)
