"""The flags that LLaVA-UHD v2 adds, in its two published dialects.

The "old" dialect (Vicuna-7B) has ``feature_mode``, the "v2" dialect (Vicuna-13B, Qwen2-7B), which
grew out of LLaVA-NeXT, has ``model_mode``. With the projector's name they decide what the model
is: LLaVA-UHD v1, or v2 with the tokens laid out row by row (old) or slice by slice (v2).

One name means two projectors: ``adapt_spatial_resampler`` is the resampler in LLaVA-UHD v1 and the
multi-scale projector in the old dialect. The mode decides, and without one the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_uhd.config.aliases_onevision import (
    LAYOUT,
    NEWLINE_LEARNS,
    STRATEGY,
    UPSAMPLER_KEYS,
    newline_with_language_model,
    plain_projector,
)
from llava_uhd.config.flags import (
    Context,
    Inert,
    inert,
    only,
    takes_keys,
    translates,
    true_or_false,
)
from llava_uhd.errors import UserError

RESAMPLER, HIWIN = "spatial_resampler", "hiwin"

# Scales of a model that a flag turns into v2: the default of the published mask, 7.
DEFAULT_SCALES = [1, 2, 4]

# What a flag that turns another model into LLaVA-UHD does to its images.
SLICES: dict[str, Any] = {
    STRATEGY: "slices",
    LAYOUT: "slices",
    "model.image.several": "same",
    NEWLINE_LEARNS: False,
}


@dataclass(frozen=True)
class Mode:
    """What a value of a mode flag means.

    Attributes:
        projector: its kind.
        layout: of the tokens.
        suffix: of folders and names where the mode changes what the recipe is.
    """

    projector: str
    layout: str
    suffix: str


# The layout belongs to the dialect that a flag is from, not to the mode.
MODES: dict[str, dict[str, Mode]] = {
    "feature_mode": {
        "uhd_v1": Mode(RESAMPLER, "rows", "uhd_v1"),
        "featup_muti_res": Mode(HIWIN, "rows", "uhd_v2_old"),
    },
    "model_mode": {
        "uhd_v1": Mode(RESAMPLER, "slices", "uhd_v1"),
        "uhd_v2": Mode(HIWIN, "slices", "uhd_v2"),
    },
}

# Published projector names that carry settings of ours in the name: kind (None: either) and
# queries.
PROJECTOR_NAMES: dict[str, tuple[str | None, int]] = {
    "adapt_spatial_resampler": (None, 144),
    "adapt_spatial_resampler_v1": (RESAMPLER, 144),
    "uhd_v1_query64": (RESAMPLER, 64),
    "adapt_spatial_resampler_v2": (HIWIN, 144),
    "adapt_spatial_resampler_v2_64": (HIWIN, 64),
    "adapt_spatial_resampler_v2_256": (HIWIN, 256),
}

LEARNING_PARTS = {
    "mm_mlp_adapter": "projector",
    "mm_vision_tower": "vision_tower",
    "mm_language_model": "language_model",
}


def has_upsampler(context: Context) -> bool:
    """Whether the model, after the mode flags, has a multi-scale projector."""
    return context.recipe.get("model.projector.type") == HIWIN


def chosen_mode(flags: Mapping[str, Any]) -> Mode | None:
    """The mode that a command asks for.

    Raises:
        UserError: an unknown mode, or two that contradict each other.
    """
    found: dict[str, Mode] = {}
    for flag, modes in MODES.items():
        if flag in flags:
            value = str(flags[flag])  # a word may read as anything, a list included
            if value not in modes:
                raise UserError(f"--{flag} {value}: only {', '.join(modes)} exist here")
            found[f"--{flag} {value}"] = modes[value]
    if len({(mode.projector, mode.layout) for mode in found.values()}) > 1:
        raise UserError(f"{' and '.join(found)} contradict each other: leave one out")
    return next(iter(found.values()), None)


@translates("feature_mode", "model_mode", "mm_projector_type", first=True)
def _kind_of_model(value: Any, context: Context) -> dict[str, Any] | Inert:
    """Mode and projector name together; each of the three flags gives the same answer."""
    mode = chosen_mode(context.flags)
    name = context.flags.get("mm_projector_type")
    current = context.recipe.get("model.projector.type", RESAMPLER)
    if name is not None and not isinstance(name, str):
        raise UserError(f"--mm_projector_type must be the name of a projector, got {name!r}")
    if name is not None and name not in PROJECTOR_NAMES:
        if mode is not None:
            raise UserError(f"--mm_projector_type {name} does not belong to a LLaVA-UHD mode")
        was_uhd = current in (RESAMPLER, HIWIN) and context.recipe.get(STRATEGY) == "slices"
        plain = plain_projector(name, context, was_uhd)
        return plain | (_renamed(context, "llava") if STRATEGY in plain else {})
    kind, queries = PROJECTOR_NAMES[name] if name is not None else (None, None)
    if mode is not None and kind not in (None, mode.projector):
        raise UserError(
            f"--mm_projector_type {name} is no projector of the chosen mode ({mode.suffix}): "
            "change one of the two"
        )
    kind = mode.projector if mode is not None else kind or current
    keys: dict[str, Any] = {"model.projector.type": kind}
    if queries is not None:
        keys["model.projector.num_queries"] = queries
    if mode is not None:
        keys[LAYOUT] = mode.layout
    if kind == RESAMPLER:
        keys["model.projector.scales"] = [1]
        keys |= {"model.upsampler_file": None, **dict.fromkeys(UPSAMPLER_KEYS, False)}
    elif current != HIWIN:
        keys["model.projector.scales"] = DEFAULT_SCALES
        if "model_mode" in context.flags:
            # In this dialect the query positions learn in both stages.
            keys["model.projector.train_positions"] = True
    if kind != current:
        suffix = mode.suffix if mode is not None else {RESAMPLER: "uhd_v1"}.get(kind, "uhd_v2")
        keys |= _renamed(context, suffix)
    if current not in (RESAMPLER, HIWIN):
        keys = {**SLICES, **keys}
    return keys


def _renamed(context: Context, suffix: str) -> dict[str, Any]:
    """Names and folders of the other kind of model, so that the two never share one.

    The first stage, switched alike, writes where the second one, switched alike, reads.
    """
    keys: dict[str, Any] = {}
    for key in ("name", "trainer.output_dir", "model.projector_file"):
        value = context.recipe.get(key)
        if isinstance(value, str) and not value.endswith((".bin", ".safetensors")):
            keys[key] = f"{value}-{suffix}"
    return keys


@translates("feature_scale_mask")
def _scales(value: Any, context: Context) -> dict[str, Any] | Inert:
    if not has_upsampler(context):
        return Inert("LLaVA-UHD v1 reads the tower's own map alone")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 16:
        raise UserError(
            f"--feature_scale_mask {value}: a sum of 1, 2, 4 and 8 for the maps of 1x, 2x, 4x and "
            "8x, for instance 5 for 1x and 4x"
        )
    return {"model.projector.scales": [scale for scale in (1, 2, 4, 8) if value & scale]}


@translates("jbu_ckpt", "vdim_ckpt", "jbu_vdim")
def _upsampler_file(value: Any, context: Context) -> dict[str, Any] | Inert:
    if not has_upsampler(context):
        return Inert("LLaVA-UHD v1 has no upsampler")
    return {"model.upsampler_file": value}


@translates("sft_vdim")
def _fixup(value: Any, context: Context) -> dict[str, Any] | Inert:
    learning = true_or_false("sft_vdim", value)
    if not has_upsampler(context):
        return Inert("LLaVA-UHD v1 has no upsampler")
    return {"stage.learn.upsampler_fixup": _rate("upsampler_fixup", learning, context)}


@translates("sft_encoder")
def _tower_and_fixup(value: Any, context: Context) -> dict[str, Any] | Inert:
    learning = true_or_false("sft_encoder", value)
    keys = {"stage.learn.vision_tower": _rate("vision_tower", learning, context)}
    if has_upsampler(context):
        keys["stage.learn.upsampler_fixup"] = _rate("upsampler_fixup", learning, context)
    return keys


def _rate(part: str, learning: bool, context: Context) -> float | bool | None:
    """What ``stage.learn`` says of a part: its rate, None for the trainer's, False for frozen."""
    if not learning:
        return False
    flag = {"projector": "mm_projector_lr", "vision_tower": "mm_vision_tower_lr"}.get(part)
    given = context.flags.get(flag) if flag else None
    return given if given is not None else context.recipe.get(f"stage.learn.{part}")


@translates("mm_tunable_parts")
def _tunable_parts(value: Any, context: Context) -> dict[str, Any] | Inert:
    names = [name.strip() for name in str(value).split(",") if name.strip()]
    unknown = [name for name in names if name not in LEARNING_PARTS]
    if unknown or not names:
        raise UserError(
            f"--mm_tunable_parts {value}: a comma-separated list of {', '.join(LEARNING_PARTS)}"
        )
    learn = {
        f"stage.learn.{part}": _rate(part, name in names, context)
        for name, part in LEARNING_PARTS.items()
    }
    return learn | newline_with_language_model("mm_language_model" in names, context)


@translates("mm_vision_tower_lr")
def _tower_rate(value: Any, context: Context) -> dict[str, Any] | Inert:
    if value is None:
        return Inert("the vision tower takes trainer.learning_rate")
    if "mm_vision_tower" not in str(context.flags.get("mm_tunable_parts", "mm_vision_tower")):
        return Inert("--mm_tunable_parts leaves the vision tower out")
    return {"stage.learn.vision_tower": value}


def _unfreezes(name: str, part: str) -> None:
    def translate(value: Any, context: Context) -> dict[str, Any] | Inert:
        if not true_or_false(name, value):
            return Inert("what learns stands in stage.learn")
        newline = newline_with_language_model(True, context) if part == "language_model" else {}
        return {f"stage.learn.{part}": _rate(part, True, context), **newline}

    translates(name)(translate)


_unfreezes("unfreeze_mm_vision_tower", "vision_tower")
_unfreezes("unfreeze_language_model", "language_model")


takes_keys({"attn_implementation": "model.attn_implementation"})

_RESAMPLERS = "it belongs to resamplers that the published code makes and never calls"
inert(
    {
        "mm_resampler_type": _RESAMPLERS,
        **dict.fromkeys(
            [f"mm_mask_drop_{name}" for name in ("mode", "skip_percentage", "ratio")]
            + [f"mm_mask_drop_ratio_{name}" for name in ("upper", "lower")]
            + [f"mm_perceiver_{name}" for name in ("depth", "latents", "ff_mult", "pretrained")]
            + [f"mm_qformer_{name}" for name in ("depth", "latents", "pretrained")],
            _RESAMPLERS,
        ),
        "pos_skipping_range": "positions are never skipped in training",
        "s2_scales": "it only matters with --s2 True",
        "rope_scaling_type": "it only matters with --rope_scaling_factor",
        "vision_tower_pretrained": "the vision tower's own folder has its weights",
        "delay_load": "parts are loaded when the model is built",
        "fted_encoder": "a checkpoint's own vision tower is always read",
        "model_class_name": "the language model's config.json says what it is",
        "verbose_logging": "the run is logged in its output folder",
    }
)
only(
    "tune_mm_vision_resampler",
    (False,),
    "what learns stands in stage.learn",
    "there is no resampler before the projector; leave it False",
)
only(
    "use_pos_skipping",
    (False,),
    "positions are those of the sequence",
    "positions are never skipped in training; leave it False",
)
only("s2", (False,), "views keep one resolution", "it is not available; leave it False")
for _name in ("group_by_varlen", "group_by_modality_length_auto"):
    only(
        _name,
        (False,),
        "batches are drawn as trainer.group_by_modality_length says",
        "use --group_by_modality_length True",
    )
only(
    "rope_scaling_factor",
    (None,),
    "the language model keeps its own positions",
    "set rope_scaling in the language model's config.json",
)
