"""The flags of LLaVA 1.5, LLaVA-NeXT, LLaVA-OneVision and LLaVA-Video on views, tiles and videos.

LLaVA-UHD's scripts carry many of them too, where they do nothing: slices have their own plan and
layout. So they count unless the recipe's images are cut into slices (`keeps_slices`).
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_uhd.config.flags import (
    Context,
    Inert,
    inert,
    only,
    takes_keys,
    translates,
)
from llava_uhd.errors import UserError

STRATEGY, LAYOUT = "model.image.strategy", "model.image.layout"
NEWLINE_LEARNS = "stage.learn.image_newline"
UPSAMPLER_KEYS = ("stage.learn.upsampler", "stage.learn.upsampler_fixup")

LAYOUTS = {"flat": "flat", "spatial": "spatial", "spatial_unpad": "unpad"}
ANYRES = re.compile(r"anyres(?:_max_([0-9]+))?")

# Projectors of the published code, by the names that exist here and by those that do not.
PROJECTORS = re.compile(r"linear|identity|mlp[1-8]x_gelu")
OTHER_PROJECTORS = re.compile(r"mlp[0-9]+x_res[0-9]+x_gelu|pooler|mlp(0|9|[0-9]{2,})x_gelu")

# Side in pixels of what a tower was trained on, by the last part of its published name.
TOWER_SIDES = {
    "clip-vit-large-patch14": 224,
    "clip-vit-large-patch14-336": 336,
    "siglip-so400m-patch14-384": 384,
}

_SLICES = "slices keep every image's own shape, as in the published LLaVA-UHD code"


def keeps_slices(context: Context) -> bool:
    """Whether images are cut into LLaVA-UHD's slices, as far as the recipe can tell.

    A recipe over a whole checkpoint may leave it to the checkpoint: then a mode of LLaVA-UHD in the
    command tells.
    """
    strategy = context.recipe.get(STRATEGY)
    if strategy is None and context.recipe.get("model.checkpoint") is not None:
        return bool({"feature_mode", "model_mode"} & set(context.flags))
    return strategy in (None, "slices")


def is_whole_model(name: Any) -> bool:
    """Whether ``--model_name_or_path`` names a finished multimodal model, not a language model.

    A folder that is here is looked at; of other names those with "llava" in their last part are,
    the rule of the published code.
    """
    if not isinstance(name, str):
        return False
    config = _read_config(name)
    if config is not None:
        kind = str(config.get("model_type"))
        return kind.startswith("llava") or any(key.startswith("mm_") for key in config)
    return "llava" in posixpath.basename(name.rstrip("/")).lower()


def over_checkpoint(context: Context) -> bool:
    """Whether the model of the command is a whole checkpoint."""
    if "model_name_or_path" in context.flags:
        return is_whole_model(context.flags["model_name_or_path"])
    return context.recipe.get("model.checkpoint") is not None


def _read_config(folder: str) -> dict[str, Any] | None:
    """``config.json`` of a folder that is here."""
    try:
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def views_of_tower(tower: Any, context: Context) -> dict[str, Any]:
    """What a vision tower changes about the views beside its own weights.

    Slices: as published, the name of a SigLIP tower brings the larger ones. One square view or
    tiles: the side that the tower was trained at, and SigLIP's way to a square.
    """
    side = context.recipe.get("model.image.scale_resolution")
    if keeps_slices(context):
        larger = "siglip" in str(tower).lower() and side == 336
        return {"model.image.scale_resolution": 384} if larger else {}
    keys: dict[str, Any] = {}
    own = _side(tower)
    if own is not None and side in (None, *TOWER_SIDES.values()):
        keys["model.image.scale_resolution"] = own
    if context.recipe.get(STRATEGY) in ("square", "squeeze"):
        keys[STRATEGY] = square_strategy(tower)
    return keys


def square_strategy(tower: Any) -> str:
    """The way to one square view that belongs to a tower: SigLIP was trained on squeezed pictures.

    CLIP on cut ones.
    """
    return "squeeze" if _is_siglip(tower) else "square"


def _is_siglip(tower: Any) -> bool:
    config = tower if isinstance(tower, Mapping) else _read_config(str(tower))
    return "siglip" in (str(tower) if config is None else str(config.get("model_type"))).lower()


def _side(tower: Any) -> int | None:
    config = _read_config(str(tower))
    if config is None:
        return TOWER_SIDES.get(posixpath.basename(str(tower).rstrip("/")).lower())
    side = (config.get("vision_config") or config).get("image_size")
    return side if isinstance(side, int) else None


def _tower_of(context: Context) -> Any:
    return context.flags.get("vision_tower", context.recipe.get("model.vision_tower"))


def plain_projector(name: str, context: Context, was_sliced: bool) -> dict[str, Any]:
    """A projector of LLaVA: over a recipe of LLaVA-UHD it makes the whole model a LLaVA.

    Its images then become what the published program makes of them unless told otherwise: one
    square view each.

    Args:
        name: published name of the projector.
        context: of the flag.
        was_sliced: the recipe is one of LLaVA-UHD, projector and slices.

    Raises:
        UserError: a published projector that does not exist here.
    """
    if OTHER_PROJECTORS.fullmatch(name):
        raise UserError(
            f"--mm_projector_type {name}: of the published ones there are linear, identity and "
            "mlp1x_gelu to mlp8x_gelu here"
        )
    keys: dict[str, Any] = {"model.projector.type": name}
    if not was_sliced or not PROJECTORS.fullmatch(name):
        return keys
    return {
        **keys,
        "model.projector.scales": [1],
        "model.upsampler_file": None,
        **dict.fromkeys(UPSAMPLER_KEYS, False),
        STRATEGY: square_strategy(_tower_of(context)),
        LAYOUT: "flat",
        "data.overview_only": False,
        "data.textvqa_long_side": None,
        "data.six_slice_probability": 0.0,
    }


@translates("image_aspect_ratio")
def _aspect_ratio(value: Any, context: Context) -> dict[str, Any] | Inert:
    if keeps_slices(context):
        return Inert(_SLICES)
    if value == "square":
        return {STRATEGY: square_strategy(_tower_of(context))}
    if value == "pad":
        return {STRATEGY: "pad"}
    tiles = ANYRES.fullmatch(str(value))
    if tiles is None or tiles[1] == "0":
        raise UserError(
            f"--image_aspect_ratio {value}: only square, pad, anyres and anyres_max_N (N at least "
            "1) exist here"
        )
    points = context.flags.get("image_grid_pinpoints", context.recipe.get("model.image.pinpoints"))
    if points is None and not over_checkpoint(context):
        raise UserError(
            f"--image_aspect_ratio {value} needs --image_grid_pinpoints, for instance "
            '"(1x1),...,(6x6)"'
        )
    return {
        STRATEGY: "anyres",
        "model.image.max_tiles": int(tiles[1]) if tiles[1] else None,
        # As published, several images of one sample are never cut into tiles.
        "model.image.several": "pad",
    }


@translates("image_grid_pinpoints")
def _pinpoints(value: Any, context: Context) -> dict[str, Any] | Inert:
    if keeps_slices(context):
        return Inert(_SLICES)
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        # "[(336, 672), (672, 336)]" is no YAML of pairs: read as text it comes in pieces.
        value = f"[{', '.join(value)}]"
    return {"model.image.pinpoints": value}


@translates("mm_patch_merge_type")
def _merge_type(value: Any, context: Context) -> dict[str, Any] | Inert:
    if keeps_slices(context):
        return Inert("the tokens of slices are laid out by model.image.layout")
    if value not in LAYOUTS:
        raise UserError(f"--mm_patch_merge_type {value}: only {', '.join(LAYOUTS)} exist here")
    layout = {LAYOUT: LAYOUTS[value]}
    decides = {"mm_tunable_parts", "tune_mm_mlp_adapter", "freeze_backbone"} & set(context.flags)
    if decides and any(context.flags[name] not in (False, None) for name in decides):
        return layout
    learns = "stage.learn.language_model" in context.recipe and layout[LAYOUT] == "unpad"
    return layout | {NEWLINE_LEARNS: None if learns else False}


def newline_with_language_model(learns: bool, context: Context) -> dict[str, Any]:
    """The learned newline of the layout "unpad" belongs to the language model, as published."""
    merge = context.flags.get("mm_patch_merge_type")
    layout = context.recipe.get(LAYOUT) if merge is None else LAYOUTS.get(merge)
    if keeps_slices(context):
        layout = None
    elif layout is None and over_checkpoint(context):
        return {} if learns else {NEWLINE_LEARNS: False}  # the recipe has to know
    return {NEWLINE_LEARNS: None if learns and layout == "unpad" else False}


def _of_tiles(name: str, key: str) -> None:
    """A flag that says where tokens of tiles or frames stand: slices have no use for it."""

    @translates(name)
    def translate(value: Any, context: Context) -> dict[str, Any] | Inert:
        if keeps_slices(context):
            return Inert("it belongs to tiles and frames of LLaVA-NeXT, not to slices")
        if value is None:
            return Inert(f"{key} stays as the recipe has it")
        return {key: value}


_of_tiles("mm_newline_position", "model.video.newline")
_of_tiles("mm_spatial_pool_mode", "model.video.pool_mode")
_of_tiles("mm_spatial_pool_stride", "model.video.pool_stride")

takes_keys(
    {
        "video_folder": "data.video_folder",
        "video_fps": "model.video.fps",
        "frames_upbound": "model.video.max_frames",
        "add_time_instruction": "model.video.time_instruction",
        "force_sample": "model.video.force_sample",
    }
)


def _of_other_crops(name: str) -> None:
    @translates(name)
    def translate(value: Any, context: Context) -> dict[str, Any] | Inert:
        if value is None or keeps_slices(context):
            return Inert("tiles and views have the side that the vision tower was trained at")
        raise UserError(
            f"--{name} {value}: it belongs to image_aspect_ratio crop_split and highres, which do "
            "not exist here; leave it out"
        )


_of_other_crops("image_crop_resolution")
_of_other_crops("image_split_resolution")

inert(
    {
        "mm_spatial_pool_out_channels": "it belongs to a resampler that the published code never "
        "calls",
        "faster_token_stride": "it only matters with --add_faster_video True",
    }
)
only(
    "add_faster_video",
    (False, None),
    "every frame has the same tokens",
    "the published code for it cannot run either; leave it False",
)
only(
    "early_mix_text",
    (False, None),
    "samples with and without images are told apart",
    "samples without images are never grouped with the others; use --group_by_length True instead",
)
