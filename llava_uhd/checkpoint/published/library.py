"""transformers' own classes for this family: LLaVA, LLaVA-NeXT and LLaVA-OneVision.

Read in both spellings of the weights: that of releases 4.x and of most files on the hub
(``language_model.model.X``), and that of the modules since (``model.language_model.X``). Written in
the first, which every reader knows. Placeholders are ids of the vocabulary there, canvases are
(height, width), and how images become views stands in ``preprocessor_config.json``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from llava_uhd.checkpoint.parts import tower_key
from llava_uhd.checkpoint.published.layout import KeyRules, Layout, Names, Values
from llava_uhd.checkpoint.published.llava import whole_view
from llava_uhd.checkpoint.published.templates import usual_template
from llava_uhd.checkpoint.published.towers import Shapes, tower_depth
from llava_uhd.checkpoint.published.values import rope_values
from llava_uhd.checkpoint.weights import read_json
from llava_uhd.config.model import (
    ImageConfig,
    LlavaUHDConfig,
    ProjectorConfig,
    VideoConfig,
    make_config,
)
from llava_uhd.errors import UserError
from llava_uhd.images.anyres import expand_pinpoints

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
# Serving engines choose their language model by the class.
LANGUAGE_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
PROJECTOR = "mlp2x_gelu"
# Key under which the values of the folder's image processor travel.
PIXELS = "_image_processor"

_LINEAR = {"linear_1.": "layers.0.", "linear_2.": "layers.2."}
_LIMIT = re.compile(r"anyres_max_(\d+)")
_TOWER = r"(model\.)?vision_tower\.(vision_model\.)?"

UNUSED = {
    r".*rotary_emb\.inv_freq": "recomputed from the configuration",
    _TOWER + r"embeddings\.position_ids": "an index table",
    _TOWER + r"post_layernorm\..*": "behind the selected layer",
    _TOWER + r"head\..*": "behind the selected layer",
    _TOWER + r"encoder\.layers\.\d+\..*": "behind the selected layer",
}


# --- weight names ---------------------------------------------------------------------------------


def to_ours(key: str, config: LlavaUHDConfig) -> str | None:
    """Our name of a weight in either spelling; None: the model has no such one.

    Raises:
        KeyError: a name of no known part.
    """
    name = key.removeprefix("model.")
    part, _, inner = name.partition(".")
    if key.endswith("rotary_emb.inv_freq"):
        return None
    if part == "vision_tower":
        ours = tower_key(inner.removeprefix("vision_model."), tower_depth(config))
        return None if ours is None else f"vision_tower.{ours}"
    if part == "multi_modal_projector":
        for published, own in _LINEAR.items():
            if inner.startswith(published):
                return f"projector.{own}{inner.removeprefix(published)}"
    if name == "image_newline" and config.has_newline:
        return name
    if part == "lm_head":
        return f"language_model.{name}"
    if part == "language_model" and inner.startswith(("lm_head.", "model.")):
        return name
    if part == "language_model":
        return f"language_model.model.{inner}"
    raise KeyError(key)


def to_library(key: str, config: LlavaUHDConfig) -> str:
    """Inverse of `to_ours`, in the spelling of files on the hub."""
    part, _, name = key.partition(".")
    if part == "vision_tower":
        inner = f"encoder.{name}" if name.startswith("layers.") else name
        return f"vision_tower.vision_model.{inner}"
    if part == "projector":
        for published, own in _LINEAR.items():
            if name.startswith(own):
                return f"multi_modal_projector.{published}{name.removeprefix(own)}"
    return key


# --- reading --------------------------------------------------------------------------------------


def _matches(values: Values, names: Names) -> bool:
    # "model_type": "llava" alone would also fit original files that were edited by hand.
    return values.get("model_type") in CLASSES and isinstance(values.get("vision_config"), dict)


def _complete(values: Values, folder: Path) -> Values:
    """Adds what the folder says of its image processor, in the file of either release."""
    pixels: Values = {}
    if (folder / "processor_config.json").is_file():
        pixels = read_json(folder / "processor_config.json").get("image_processor") or {}
    if (folder / "preprocessor_config.json").is_file():
        pixels = read_json(folder / "preprocessor_config.json")
    return {**values, PIXELS: pixels}


def _read_library(values: Values) -> Any:
    """The configuration as transformers reads it, with the defaults of its classes."""
    kept = {key: value for key, value in values.items() if key not in (PIXELS, "torch_dtype")}
    library: Any = make_config(kept, "the configuration")
    for part in (library.vision_config, library.text_config):
        part.dtype = None
    return library


def _find_vision(values: Values, folder: Path, shapes: Shapes) -> PreTrainedConfig:
    vision: PreTrainedConfig = _read_library(values).vision_config
    pixels = values.get(PIXELS, {})
    for key in ("image_mean", "image_std"):
        if pixels.get(key):
            setattr(vision, key, pixels[key])
    return vision


def _make_config(values: Values, vision: PreTrainedConfig, names: Names) -> LlavaUHDConfig:
    library = _read_library(values)
    _check(library, vision)
    text = library.text_config
    text.tie_word_embeddings = _is_tied(library, names)
    _, sides = _pixel_sides(values.get(PIXELS, {}), vision)
    if sides - {vision.image_size}:
        raise UserError(
            f"its image processor makes pictures of {max(sides)} pixels, its vision tower reads "
            f"{vision.image_size}"
        )
    tiled = library.model_type != "llava"
    videos = library.model_type == "llava_onevision"
    return LlavaUHDConfig(
        vision_config=vision,
        text_config=text,
        image=ImageConfig(
            layout="unpad" if tiled else "flat",
            scale_resolution=vision.image_size,
            patch_size=vision.patch_size,
            several="pad" if videos else "same",
            image_token_id=library.image_token_id,
            **(_tiles(library) if tiled else {"strategy": _whole(values, vision)}),
        ),
        projector=ProjectorConfig(type=PROJECTOR),
        # Its video processor squeezes frames, whatever the tower's own processor does.
        video=VideoConfig(strategy="squeeze", pool_stride=2) if videos else VideoConfig(),
        template=usual_template(text, values.get("text_config") or {}),
        select_layer=library.vision_feature_layer,
    )


def _is_tied(library: Any, names: Names) -> bool:
    """Releases disagree on which configuration says it; a head among the weights decides."""
    if names:
        return not any(name.endswith("lm_head.weight") for name in names)
    return bool(library.tie_word_embeddings or library.text_config.tie_word_embeddings)


def _check(library: Any, vision: PreTrainedConfig) -> None:
    """Raises UserError for settings that have no place here."""
    if not isinstance(library.vision_feature_layer, int):
        raise UserError("vision_feature_layer names several layers of the vision tower; one loads")
    usual = "full" if whole_view(vision) == "squeeze" else "default"
    if library.vision_feature_select_strategy != usual:
        raise UserError(
            f"vision_feature_select_strategy '{library.vision_feature_select_strategy}' is not "
            f"supported with a {vision.model_type}, only '{usual}'"
        )
    if library.projector_hidden_act != "gelu" or not library.multimodal_projector_bias:
        raise UserError("only a projector with biases and GELU loads (projector_hidden_act)")


def _pixel_sides(pixels: Values, vision: PreTrainedConfig) -> tuple[bool, set[int]]:
    """Whether the middle of an image is cut out, and all sides that an image processor names."""
    size, crop = pixels.get("size"), pixels.get("crop_size")
    sides = set()
    for each in (size, crop):
        named = each.values() if isinstance(each, dict) else [each]
        sides |= {side for side in named if isinstance(side, int)}
    cropped = pixels.get("do_center_crop")
    if cropped is None:
        cropped = bool(crop) or (not size and whole_view(vision) == "square")
    if pixels.get("resample") not in (None, 3):
        raise UserError(
            f"its image processor resizes with filter {pixels['resample']}; only 3 (bicubic) exists"
        )
    return bool(cropped), sides


def _whole(values: Values, vision: PreTrainedConfig) -> str:
    """Strategy of one view per image."""
    pixels = values.get(PIXELS, {})
    cropped, _ = _pixel_sides(pixels, vision)
    # CLIP's processor knows the word do_pad too and means something else by it.
    if pixels.get("do_pad") and "Llava" in str(pixels.get("image_processor_type")):
        return "pad"
    return "square" if cropped else "squeeze"


def _tiles(library: Any) -> dict[str, Any]:
    """Fields of `ImageConfig` of a class with tiles."""
    sizes = [(width, height) for height, width in library.image_grid_pinpoints]
    limit = None
    if library.model_type == "llava_onevision":
        match = _LIMIT.fullmatch(str(library.vision_aspect_ratio))
        if match is None:
            raise UserError(
                f"vision_aspect_ratio '{library.vision_aspect_ratio}' does not read anyres_max_N"
            )
        limit = int(match.group(1))
    pinpoints = expand_pinpoints(sizes, library.vision_config.image_size)
    return {"strategy": "anyres", "pinpoints": pinpoints, "max_tiles": limit}


# --- writing --------------------------------------------------------------------------------------


def class_of(config: LlavaUHDConfig) -> str:
    """Which of the classes holds a model: its ``model_type``.

    Raises:
        UserError: none of them does; the message says why.
    """
    image = config.image
    if config.projector.type != PROJECTOR:
        raise UserError(
            f"the transformers layout holds {PROJECTOR} projectors, not {config.projector.type}: "
            "only this code runs the model (or its own system's: --to original)"
        )
    if image.layout == "flat" and image.strategy in ("pad", whole_view(config.vision_config)):
        return "llava"
    if image.layout == "unpad" and image.strategy == "anyres":
        return "llava_next" if image.max_tiles is None else "llava_onevision"
    whole = whole_view(config.vision_config)
    raise UserError(
        f"the transformers layout cannot hold this model: image.strategy is {image.strategy} and "
        f"image.layout {image.layout}; it knows pad or {whole} with flat, and anyres with unpad"
    )


def _write_config(config: LlavaUHDConfig) -> Values:
    kind = class_of(config)
    text, vision = config.text_config, config.vision_config
    if config.image.image_token_id is None:
        raise UserError("image.image_token_id is missing: the processor of the model fills it")
    grid = config.image.scale_resolution // config.image.patch_size
    values: Values = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "image_token_index": config.image.image_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if has_class_token(config) else "full",
        "tie_word_embeddings": bool(text.tie_word_embeddings),
        "text_config": {
            **_plain(text),
            **{key: value for key, value in rope_values(text).items() if value is not None},
            "model_type": text.model_type,
            "architectures": [LANGUAGE_CLASSES[text.model_type]],
        },
        "vision_config": {
            **_plain(vision),
            "model_type": vision.model_type,
            # What the model reads is the output of the last layer that is written.
            "num_hidden_layers": tower_depth(config),
            "vision_use_head": False,
        },
    }
    if vision.model_type != "siglip_vision_model":
        del values["vision_config"]["vision_use_head"]
    if kind == "llava_onevision":
        values["video_token_index"] = config.image.image_token_id + 1
        values["vision_aspect_ratio"] = f"anyres_max_{config.image.max_tiles}"
    else:
        values["image_seq_length"] = grid * grid
    if kind != "llava":
        sizes = expand_pinpoints(config.image.pinpoints, config.image.scale_resolution)
        values["image_grid_pinpoints"] = [[height, width] for width, height in sizes]
    return values


def has_class_token(config: LlavaUHDConfig) -> bool:
    """Whether the tower has a token before its patches, which the class drops."""
    return bool(config.vision_config.model_type == "clip_vision_model")


_HOUSEKEEPING = {"dtype", "torch_dtype", "transformers_version", "_name_or_path"}
_HOUSEKEEPING |= {"_attn_implementation", "image_mean", "image_std"}


def _plain(part: PreTrainedConfig) -> Values:
    return {key: value for key, value in part.to_dict().items() if key not in _HOUSEKEEPING}


LIBRARY = Layout(
    name="transformers",
    slug="transformers",
    matches=_matches,
    make_config=_make_config,
    write_config=_write_config,
    unused=UNUSED,
    languages=tuple(LANGUAGE_CLASSES),
    keys=KeyRules(to_ours, to_library, ("vision_tower.", "model.vision_tower.")),
    find_vision=_find_vision,
    complete=_complete,
    additive=False,
)
