"""LLaVA-1.5, LLaVA-NeXT (1.6) and LLaVA-OneVision as their own code writes them.

All three share weight names and configuration keys; what differs is how images become views, and
the code that reads them. Every key may be absent: files on the hub come from many releases.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from llava_uhd.checkpoint.published.layout import (
    COMMON_UNUSED,
    NEWLINE_KEY,
    RESAMPLER_PREFIX,
    VISION_PREFIX,
    Layout,
    Names,
    Values,
)
from llava_uhd.checkpoint.published.templates import usual_template
from llava_uhd.checkpoint.published.towers import (
    Shapes,
    find_tower,
    read_recorded_tower,
    tower_config_of_weights,
    tower_habits,
    usual_select_layer,
)
from llava_uhd.checkpoint.published.values import check_common, family, first_stage, text_config
from llava_uhd.config.model import ImageConfig, LlavaUHDConfig, ProjectorConfig, VideoConfig
from llava_uhd.errors import UserError
from llava_uhd.images.anyres import expand_pinpoints
from llava_uhd.images.tokens import MLP_DEPTHS
from llava_uhd.text.templates import TEMPLATES

PROJECTOR_TYPES = ("linear", *(f"mlp{depth}x_gelu" for depth in MLP_DEPTHS), "identity")
MERGE_TYPES: dict[str, Literal["flat", "spatial", "unpad"]] = {
    "flat": "flat",
    "spatial": "spatial",
    "spatial_unpad": "unpad",
}
# End of the names of templates with learned tokens around an image.
MARKED = "_im_start_end"
LLAVA_LANGUAGES = ("llama", "mistral")

_LIMIT = re.compile(r"anyres_max_(\d+)")

# Keys that only the code of LLaVA-NeXT and LLaVA-OneVision writes.
_NEWER_KEYS = {
    *("mm_newline_position", "mm_spatial_pool_mode", "mm_tunable_parts", "image_crop_resolution"),
    *("image_split_resolution", "use_pos_skipping", "vision_tower_pretrained"),
}

_PROJECTORS_OF_UHD = re.compile(r"adapt_spatial_resampler\w*|uhd_v1\w*")

UNUSED = {
    **COMMON_UNUSED,
    re.escape(NEWLINE_KEY): "of a layout without learned newlines",
    re.escape(RESAMPLER_PREFIX) + ".*": "created by the published code, never called by it",
}


def _is_llava(values: Values) -> bool:
    """A class of this family whose projector is not one of LLaVA-UHD's."""
    kind = values.get("mm_projector_type")
    return (
        family(values) is not None
        and not {"text_config", "vision_config"} & values.keys()
        and not {"feature_mode", "model_mode"} & values.keys()
        and not (isinstance(kind, str) and _PROJECTORS_OF_UHD.fullmatch(kind))
    )


def _is_newer(values: Values) -> bool:
    """Whether the code of LLaVA-NeXT and OneVision wrote it, and not that of LLaVA-1.5."""
    return family(values) == "qwen2" or bool(_NEWER_KEYS & values.keys())


def _is_tiled(values: Values) -> bool:
    return "anyres" in str(values.get("image_aspect_ratio"))


def _matches_1_5(values: Values, names: Names) -> bool:
    return _is_llava(values) and family(values) != "qwen2" and not _is_tiled(values)


def _matches_next(values: Values, names: Names) -> bool:
    return _is_llava(values) and family(values) != "qwen2" and _is_tiled(values)


def _matches_onevision(values: Values, names: Names) -> bool:
    return _is_llava(values) and family(values) == "qwen2"


def find_vision(values: Values, folder: Path, shapes: Shapes) -> PreTrainedConfig | None:
    """Tower of a checkpoint: its folder, else its weights, else its well-known name.

    The published code hard-codes the shape of SigLIP and reads that of CLIP from the hub; here the
    weights inside the checkpoint say it.
    """
    local = find_tower(values, folder)
    if local is not None:
        return read_recorded_tower(values, local)
    inside = tower_config_of_weights(values, shapes, VISION_PREFIX)
    return inside if inside is not None else read_recorded_tower(values, None)


# --- reading --------------------------------------------------------------------------------------


def _projector(values: Values) -> ProjectorConfig:
    kind = values.get("mm_projector_type") or "linear"
    if kind not in PROJECTOR_TYPES:
        raise UserError(
            f"mm_projector_type '{kind}' is not one that loads here ({', '.join(PROJECTOR_TYPES)})"
        )
    return ProjectorConfig(type=kind)


def _layout(values: Values) -> Literal["flat", "spatial", "unpad"]:
    merge = values.get("mm_patch_merge_type") or "flat"
    if merge not in MERGE_TYPES:
        raise UserError(
            f"mm_patch_merge_type '{merge}' joins views in a way that does not exist here (known: "
            f"{', '.join(MERGE_TYPES)})"
        )
    return MERGE_TYPES[merge]


def whole_view(vision: PreTrainedConfig) -> str:
    """What a tower's own preprocessing does: CLIP's cuts the middle out, SigLIP's squeezes."""
    return "squeeze" if vision.model_type == "siglip_vision_model" else "square"


def _strategy(values: Values, vision: PreTrainedConfig) -> dict[str, Any]:
    """Fields of `ImageConfig` that ``image_aspect_ratio`` means."""
    ratio = values.get("image_aspect_ratio") or "square"
    if ratio in ("square", "pad"):
        return {"strategy": "pad" if ratio == "pad" else whole_view(vision)}
    limit = _LIMIT.fullmatch(str(ratio))
    if ratio != "anyres" and limit is None:
        raise UserError(
            f"image_aspect_ratio '{ratio}' cuts images in a way that does not exist here (known: "
            "square, pad, anyres, anyres_max_N)"
        )
    pinpoints = values.get("image_grid_pinpoints")
    if not pinpoints:
        raise UserError(f"image_aspect_ratio is '{ratio}', but image_grid_pinpoints is missing")
    return {
        "strategy": "anyres",
        "pinpoints": expand_pinpoints(pinpoints, vision.image_size),
        "max_tiles": int(limit.group(1)) if limit else None,
    }


def _video(values: Values, vision: PreTrainedConfig) -> VideoConfig:
    if not _is_newer(values):
        return VideoConfig()
    # The published stride is always 2, whatever mm_spatial_pool_stride says; a frame passes the
    # tower's own preprocessing, whatever images pass.
    return VideoConfig(
        strategy=whole_view(vision),
        pool_stride=2,
        pool_mode=values.get("mm_spatial_pool_mode") or "bilinear",
        newline=values.get("mm_newline_position") or "one_token",
    )


def _template(text: PreTrainedConfig, values: Values) -> str:
    name = "plain" if first_stage(values) else usual_template(text, values)
    if not values.get("mm_use_im_start_end"):
        return name
    if name + MARKED not in TEMPLATES.names():
        raise UserError(
            f"mm_use_im_start_end is set: the template {name} has no form with start and end "
            "tokens around an image"
        )
    return name + MARKED


def _check_words(values: Values, known: dict[str, tuple[str, ...]]) -> None:
    for key, words in known.items():
        if values.get(key) not in (None, *words):
            raise UserError(f"{key} '{values[key]}' is not one of {', '.join(words)}")


def _make_config(values: Values, vision: PreTrainedConfig, names: Names) -> LlavaUHDConfig:
    check_common(values, marks=True)
    _check_words(
        values,
        {
            "mm_spatial_pool_mode": ("bilinear", "average", "max"),
            "mm_newline_position": ("one_token", "grid", "frame", "no_token"),
        },
    )
    text = text_config(values)
    select_layer = tower_habits(vision).select_layer
    if select_layer is None:
        recorded = values.get("mm_vision_select_layer")
        select_layer = -2 if recorded is None else recorded
    return LlavaUHDConfig(
        vision_config=vision,
        text_config=text,
        image=ImageConfig(
            layout=_layout(values),
            scale_resolution=vision.image_size,
            patch_size=vision.patch_size,
            several="pad" if _is_newer(values) else "same",
            **_strategy(values, vision),
        ),
        projector=_projector(values),
        video=_video(values, vision),
        template=_template(text, values),
        select_layer=select_layer,
    )


# --- writing --------------------------------------------------------------------------------------


def _published_ratio(config: LlavaUHDConfig, name: str) -> str:
    image = config.image
    if image.strategy == "anyres":
        return "anyres" if image.max_tiles is None else f"anyres_max_{image.max_tiles}"
    if image.strategy == "pad":
        return "pad"
    if image.strategy == whole_view(config.vision_config):
        return "square"
    raise UserError(
        f"the {name} layout cannot hold this model: image.strategy is {image.strategy}; with this "
        f"tower it means anyres, pad or {whole_view(config.vision_config)}"
    )


def _common(config: LlavaUHDConfig, name: str) -> Values:
    """What all three layouts record of images and projector."""
    kind = config.projector.type
    if kind not in PROJECTOR_TYPES:
        raise UserError(
            f"the {name} layout holds projectors {', '.join(PROJECTOR_TYPES)}, not {kind}"
        )
    merge = {ours: published for published, ours in MERGE_TYPES.items()}
    if config.image.layout not in merge:
        raise UserError(
            f"the {name} layout cannot hold this model: image.layout is {config.image.layout}; it "
            f"means {', '.join(merge)}"
        )
    values: Values = {
        "image_aspect_ratio": _published_ratio(config, name),
        "mm_patch_merge_type": merge[config.image.layout],
        "mm_projector_type": kind,
        "mm_resampler_type": None,
    }
    if config.template.endswith(MARKED):
        values["mm_use_im_start_end"] = True
    if config.image.strategy == "anyres":
        sizes = expand_pinpoints(config.image.pinpoints, config.image.scale_resolution)
        values["image_grid_pinpoints"] = [list(size) for size in sizes]
    return values


def _flags(config: LlavaUHDConfig) -> Values:
    """Training switches that the code of LLaVA-1.5 reads."""
    return {
        "freeze_mm_mlp_adapter": False,
        "tune_mm_mlp_adapter": config.template == "plain",
        # The tower is built at once, and the weights inside the checkpoint go before the hub's.
        "unfreeze_mm_vision_tower": True,
    }


def _write_1_5(config: LlavaUHDConfig) -> Values:
    if config.image.strategy == "anyres":
        raise UserError(f"the {LLAVA_1_5.name} layout has no tiles (anyres): write llava_next")
    return _common(config, LLAVA_1_5.name) | _flags(config)


def _write_next(config: LlavaUHDConfig) -> Values:
    if config.image.strategy != "anyres":
        raise UserError(f"the {LLAVA_NEXT.name} layout means tiles (anyres): write llava_1_5")
    newer = {"mm_tunable_parts": None} if config.image.several == "pad" else {}
    return _common(config, LLAVA_NEXT.name) | _flags(config) | newer | _video_values(config, newer)


def _write_onevision(config: LlavaUHDConfig) -> Values:
    every = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
    newer = {"mm_tunable_parts": "mm_mlp_adapter" if config.template == "plain" else every}
    return {
        **_common(config, LLAVA_ONEVISION.name),
        **newer,
        **_video_values(config, newer),
        "image_crop_resolution": None,
        "image_split_resolution": None,
        "image_token_index": config.image.image_token_id,  # for serving engines
        "use_pos_skipping": False,
    }


def _video_values(config: LlavaUHDConfig, newer: Values) -> Values:
    if not newer:
        return {}
    return {
        "mm_newline_position": config.video.newline,
        "mm_spatial_pool_mode": config.video.pool_mode,
        "mm_spatial_pool_stride": config.video.pool_stride,
    }


LLAVA_1_5 = Layout(
    name="LLaVA-1.5",
    slug="llava_1_5",
    matches=_matches_1_5,
    make_config=_make_config,
    write_config=_write_1_5,
    unused=UNUSED,
    languages=LLAVA_LANGUAGES,
    find_vision=find_vision,
    prepare=usual_select_layer,
)
LLAVA_NEXT = dataclasses.replace(
    LLAVA_1_5,
    name="LLaVA-NeXT",
    slug="llava_next",
    matches=_matches_next,
    write_config=_write_next,
)
LLAVA_ONEVISION = dataclasses.replace(
    LLAVA_1_5,
    name="LLaVA-OneVision",
    slug="llava_onevision",
    matches=_matches_onevision,
    write_config=_write_onevision,
    languages=("qwen2",),
)
