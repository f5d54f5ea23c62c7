"""LLaVA-UHD v2 in its two dialects, each with the v2 projector and with that of v1.

The "old" dialect (the Vicuna-7B release) switches with ``feature_mode`` and joins the slices' token
maps row by row; the other one (Vicuna-13B, Qwen2-7B) switches with ``model_mode`` and writes slice
after slice. Weight names and shapes are the same in both.
"""

from __future__ import annotations

import re
from typing import Literal

from transformers import PreTrainedConfig

from llava_uhd.checkpoint.projector_names import HIWIN_UNUSED, is_multi_scale
from llava_uhd.checkpoint.published.layout import (
    COMMON_UNUSED,
    PROJECTOR_PREFIX,
    Layout,
    Names,
    Values,
)
from llava_uhd.checkpoint.published.towers import tower_habits
from llava_uhd.checkpoint.published.values import (
    COMMA_ID,
    NEWLINE_ID,
    check_common,
    family,
    first_stage,
    separator,
    text_config,
)
from llava_uhd.config.model import SCALES, ImageConfig, LlavaUHDConfig, ProjectorConfig
from llava_uhd.errors import UserError

ALL_PARTS = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
DEFAULT_MASK = 7

# Published projector name -> queries per view. "adapt_spatial_resampler" is the v2 projector in
# the old dialect, and that of v1 in LLaVA-UHD v1.
OLD_TYPES = {"adapt_spatial_resampler": 144}
NEW_TYPES = {
    "adapt_spatial_resampler_v2": 144,
    "adapt_spatial_resampler_v2_64": 64,
    "adapt_spatial_resampler_v2_256": 256,
}
V1_TYPES = {"adapt_spatial_resampler_v1": 144, "uhd_v1_query64": 64}


def mask_to_scales(mask: int) -> tuple[int, ...]:
    """Scales that a published ``feature_scale_mask`` selects: bit value = scale.

    Example: 5 is (1, 4).

    Raises:
        UserError: no scale, or a bit that means none.
    """
    if isinstance(mask, bool) or not isinstance(mask, int) or not 0 < mask <= sum(SCALES):
        raise UserError(f"feature_scale_mask must be from 1 to {sum(SCALES)}, got {mask!r}")
    return tuple(scale for scale in SCALES if mask & scale)


def _is_new(values: Values, names: Names) -> bool:
    projector = str(values.get("mm_projector_type"))
    if projector not in {*OLD_TYPES, *NEW_TYPES, *V1_TYPES} or "feature_mode" in values:
        return False
    language = family(values)
    return language == "qwen2" or (
        language == "llama"
        and ("model_mode" in values or projector in {*NEW_TYPES, "uhd_v1_query64"})
    )


def _is_old(values: Values, names: Names) -> bool:
    projector = str(values.get("mm_projector_type"))
    return (
        family(values) == "llama"
        and projector in {*OLD_TYPES, "adapt_spatial_resampler_v1"}
        and "model_mode" not in values
        and (
            "feature_mode" in values
            or projector == "adapt_spatial_resampler_v1"
            or bool(is_multi_scale(names))
        )
    )


def _projector(values: Values, names: Names, trained_positions: bool) -> ProjectorConfig:
    """The weights say which projector it is; without them the recorded switch does."""
    projector = values["mm_projector_type"]
    queries = {**OLD_TYPES, **NEW_TYPES, **V1_TYPES}[projector]
    multi_scale = is_multi_scale(names)
    if multi_scale is None:
        mode = values.get("feature_mode", values.get("model_mode"))
        multi_scale = projector not in V1_TYPES and mode != "uhd_v1"
    if not multi_scale:
        return ProjectorConfig(
            type="spatial_resampler", num_queries=queries, train_positions=trained_positions
        )
    return ProjectorConfig(
        type="hiwin",
        num_queries=queries,
        scales=mask_to_scales(values.get("feature_scale_mask", DEFAULT_MASK)),
        train_positions=trained_positions,
    )


def _config(
    values: Values,
    vision: PreTrainedConfig,
    projector: ProjectorConfig,
    layout: Literal["slices", "rows"],
) -> LlavaUHDConfig:
    check_common(values)
    habits = tower_habits(vision)
    text = text_config(values)
    if text.model_type == "qwen2":
        template = "qwen_1_5"  # also in the first stage
    else:
        template = "plain" if first_stage(values) else "v1"
    select_layer = habits.select_layer
    if select_layer is None:
        select_layer = values.get("mm_vision_select_layer", -2)
    return LlavaUHDConfig(
        vision_config=vision,
        text_config=text,
        # The published code has these as constants; they are not in its config.json. It allows 7
        # slices in training and 9 when it answers.
        image=ImageConfig(
            strategy="slices",
            layout=layout,
            max_slices=9,
            scale_resolution=habits.scale_resolution,
            patch_size=vision.patch_size,
            bounded=False,
            comma_id=separator(COMMA_ID, text.vocab_size),
            newline_id=separator(NEWLINE_ID, text.vocab_size),
        ),
        projector=projector,
        template=template,
        select_layer=select_layer,
    )


def _make_new(values: Values, vision: PreTrainedConfig, names: Names) -> LlavaUHDConfig:
    # Both stages of this dialect train the position table.
    return _config(values, vision, _projector(values, names, True), "slices")


def _make_old(values: Values, vision: PreTrainedConfig, names: Names) -> LlavaUHDConfig:
    return _config(values, vision, _projector(values, names, first_stage(values)), "rows")


def _published_type(config: LlavaUHDConfig, name: str, types: dict[str, dict[str, int]]) -> str:
    """Published name of a projector.

    Args:
        config: of the model.
        name: of the layout.
        types: our projector -> published name -> queries.

    Raises:
        UserError: the layout has no such projector.
    """
    options = config.projector
    for published, queries in types.get(options.type, {}).items():
        if queries == options.num_queries:
            return published
    known = [f"{kind} of {q}" for kind, table in types.items() for q in table.values()]
    raise UserError(
        f"the {name} layout holds {', '.join(known)} queries, not a {options.type} of "
        f"{options.num_queries}"
    )


def _mask(config: LlavaUHDConfig) -> Values:
    """The switch that the v2 projector reads; that of v1 has none."""
    return {"feature_scale_mask": sum(config.projector.scales)} if _is_v2(config) else {}


def _is_v2(config: LlavaUHDConfig) -> bool:
    return config.projector.type == "hiwin"


def _write_new(config: LlavaUHDConfig) -> Values:
    types = {"hiwin": NEW_TYPES, "spatial_resampler": V1_TYPES}
    return {
        "image_aspect_ratio": "square",
        "mm_patch_merge_type": "flat",
        "mm_projector_type": _published_type(config, UHD_V2.name, types),
        "mm_resampler_type": None,
        "mm_tunable_parts": "mm_mlp_adapter" if config.template == "plain" else ALL_PARTS,
        "model_mode": "uhd_v2" if _is_v2(config) else "uhd_v1",
        **_mask(config),
    }


def _write_old(config: LlavaUHDConfig) -> Values:
    if config.text_config.model_type != "llama":
        raise UserError(f"the {UHD_V2_OLD.name} layout holds Llama language models only")
    v1_types = {"adapt_spatial_resampler_v1": 144}
    types = {"hiwin": OLD_TYPES, "spatial_resampler": v1_types}
    return {
        "image_aspect_ratio": "square",
        "mm_projector_type": _published_type(config, UHD_V2_OLD.name, types),
        "tune_mm_mlp_adapter": config.template == "plain",
        "freeze_mm_mlp_adapter": False,
        "feature_mode": "featup_muti_res" if _is_v2(config) else "uhd_v1",
        **_mask(config),
    }


_UNUSED = {
    **COMMON_UNUSED,
    **{re.escape(PROJECTOR_PREFIX) + name: reason for name, reason in HIWIN_UNUSED.items()},
}

UHD_V2 = Layout(
    name="LLaVA-UHD v2",
    slug="uhd_v2",
    matches=_is_new,
    make_config=_make_new,
    write_config=_write_new,
    unused=_UNUSED,
)
UHD_V2_OLD = Layout(
    name="LLaVA-UHD v2 (Vicuna-7B)",
    slug="uhd_v2_old",
    matches=_is_old,
    make_config=_make_old,
    write_config=_write_old,
    unused=_UNUSED,
)
