"""LLaVA-UHD v1: the spatially constrained resampler on a CLIP tower, with Vicuna."""

from __future__ import annotations

from transformers import PreTrainedConfig

from llava_uhd.checkpoint.projector_names import is_multi_scale
from llava_uhd.checkpoint.published.layout import COMMON_UNUSED, Layout, Names, Values
from llava_uhd.checkpoint.published.values import check_common, family, first_stage, text_config
from llava_uhd.config.model import ImageConfig, LlavaUHDConfig, ProjectorConfig
from llava_uhd.errors import UserError

NUM_QUERIES = 144


def _matches(values: Values, names: Names) -> bool:
    return (
        family(values) == "llama"
        and values.get("mm_projector_type") == "adapt_spatial_resampler"
        and not {"feature_mode", "model_mode"} & values.keys()
        and not is_multi_scale(names)
    )


def _make_config(values: Values, vision: PreTrainedConfig, names: Names) -> LlavaUHDConfig:
    check_common(values)
    return LlavaUHDConfig(
        vision_config=vision,
        text_config=text_config(values),
        # The published code has these as constants; they are not in its config.json.
        image=ImageConfig(strategy="slices", patch_size=vision.patch_size, bounded=False),
        projector=ProjectorConfig(
            type="spatial_resampler", num_queries=NUM_QUERIES, train_positions=False
        ),
        template="plain" if first_stage(values) else "v1",
        select_layer=values.get("mm_vision_select_layer", -2),
    )


def _write_config(config: LlavaUHDConfig) -> Values:
    options = config.projector
    if options.type != "spatial_resampler" or options.num_queries != NUM_QUERIES:
        raise UserError(
            f"the LLaVA-UHD v1 layout holds a spatial_resampler of {NUM_QUERIES} queries, not a "
            f"{options.type} of {options.num_queries}"
        )
    return {
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "adapt_spatial_resampler",
        "tune_mm_mlp_adapter": config.template == "plain",
        "freeze_mm_mlp_adapter": False,
    }


UHD_V1 = Layout(
    name="LLaVA-UHD v1",
    slug="uhd_v1",
    matches=_matches,
    make_config=_make_config,
    write_config=_write_config,
    unused=COMMON_UNUSED,
)
