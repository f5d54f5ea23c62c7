"""What a folder for transformers' own classes needs beside our weights: tokens, processor, rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.checkpoint.published.layout import Values
from llava_uhd.checkpoint.published.library import class_of, has_class_token
from llava_uhd.checkpoint.tokenizer_files import (
    added_tokens,
    settle_class,
    start_words_everywhere,
)
from llava_uhd.checkpoint.weights import Tensors
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.errors import UserError
from llava_uhd.text.processor import LlavaUHDProcessor
from llava_uhd.text.templates import IMAGE_MARKER, VIDEO_MARKER

# Vocabularies that have to grow for placeholders grow to a multiple of this, as published.
ROWS = 64
_NORM = "vision_tower.vision_model.post_layernorm."
EMBEDDINGS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")


# --- tokens ---------------------------------------------------------------------------------------


def with_placeholders(
    tokenizer: PreTrainedTokenizerBase, config: LlavaUHDConfig
) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer in which the markers of images and videos are tokens.

    The original code tokenises the text behind an image on its own, as the start of a word. A
    tokenizer that starts a word at the beginning of a text only is changed to do it after every
    token of its own, as the published files for these classes do.

    Raises:
        UserError: another token has the id of the model's placeholder.
    """
    tokenizer = copy.deepcopy(tokenizer)
    markers = [IMAGE_MARKER]
    if class_of(config) == "llava_onevision":
        markers.append(VIDEO_MARKER)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": markers}, replace_extra_special_tokens=False
    )
    start_words_everywhere(tokenizer)
    found = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
    if found != config.image.image_token_id:
        raise UserError(
            f"the tokenizer has {IMAGE_MARKER} as token {found}, the model's placeholder is "
            f"{config.image.image_token_id}: load the model and save it again with its processor"
        )
    return tokenizer


def placeholder_values(
    values: Values, tokenizer: PreTrainedTokenizerBase, config: LlavaUHDConfig
) -> Values:
    """The configuration with the placeholders' ids and a vocabulary that has rows for them.

    The library looks placeholders up in the table before it overwrites them.
    """
    values = copy.deepcopy(values)
    if "video_token_index" in values:
        values["video_token_index"] = tokenizer.convert_tokens_to_ids(VIDEO_MARKER)
    last = max(values["image_token_index"], values.get("video_token_index", 0))
    rows = config.text_config.vocab_size
    if last >= rows:
        values["text_config"]["vocab_size"] = -(-(last + 1) // ROWS) * ROWS
    return values


def write_tokens(
    out: Path, tokenizer: PreTrainedTokenizerBase, config: LlavaUHDConfig, source: Path | None
) -> None:
    """Tokenizer files that releases 4.x and 5.x of the library read alike.

    Args:
        out: existing folder.
        tokenizer: of `with_placeholders`.
        config: of the model.
        source: folder with the original tokenizer files, or None.
    """
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only", "processor_class", "image_token"):
        values.pop(name, None)
    others = values.pop("extra_special_tokens", None) or []
    others = list(others.values() if isinstance(others, dict) else others)
    markers = {"image_token": IMAGE_MARKER}
    if class_of(config) == "llava_onevision":
        markers["video_token"] = VIDEO_MARKER
    values["extra_special_tokens"] = markers
    named = {str(value) for key, value in values.items() if key.endswith("_token")}
    values["additional_special_tokens"] = [
        token for token in others if token not in named | set(markers.values())
    ]
    values["added_tokens_decoder"] = added_tokens(tokenizer)
    write_whole(path, _json(values))
    settle_class(out, tokenizer, config.text_config.model_type)
    if source is not None and (source / "tokenizer.model").is_file():
        (out / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())


# --- processor ------------------------------------------------------------------------------------


def pixel_values(config: LlavaUHDConfig) -> Values:
    """``preprocessor_config.json``: how the library's image processors make the same pixels."""
    image, kind = config.image, class_of(config)
    mean, std = image.normalisation
    side = image.scale_resolution
    square = {"height": side, "width": side}
    cropped = has_class_token(config)  # CLIP's own way; SigLIP squeezes
    values: Values = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "rescale_factor": 1 / 255,
        "resample": 3,
        "processor_class": _PROCESSORS[kind],
    }
    if cropped and kind != "llava_onevision":
        values |= {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
    else:
        values |= {"size": square, "do_center_crop": False}
    if kind == "llava":
        own = "CLIPImageProcessor" if cropped else "SiglipImageProcessor"
        padded = image.strategy == "pad"
        values["image_processor_type"] = "LlavaImageProcessor" if padded else own
        if padded:
            values["do_pad"] = True
        return values
    values["do_pad"] = True  # here: to the largest number of tiles
    values["image_processor_type"] = _PROCESSORS[kind].replace("Processor", "ImageProcessor")
    return values


_OF_VIDEOS = {
    *("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "image_mean", "image_std"),
    *("rescale_factor", "resample", "size", "processor_class"),
}
_PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
}


def processor_values(config: LlavaUHDConfig, values: Values) -> Values:
    """``processor_config.json``: how many placeholders an image takes.

    Args:
        config: of the model.
        values: its ``config.json``.
    """
    kind = class_of(config)
    grid = config.image.scale_resolution // config.image.patch_size
    found: Values = {
        "processor_class": _PROCESSORS[kind],
        "image_token": IMAGE_MARKER,
        "vision_feature_select_strategy": values["vision_feature_select_strategy"],
    }
    class_token = int(has_class_token(config))
    if kind == "llava_onevision":
        return found | {
            "num_image_tokens": grid * grid + class_token,
            "video_token": VIDEO_MARKER,
            "vision_aspect_ratio": values["vision_aspect_ratio"],
        }
    return found | {
        "patch_size": config.image.patch_size,
        "num_additional_image_tokens": class_token,
    }


def write_processor(
    out: Path, config: LlavaUHDConfig, values: Values, processor: LlavaUHDProcessor
) -> None:
    """Everything that the library's processors read, and how answers end."""
    pixels = pixel_values(config)
    if "image_grid_pinpoints" in values:
        pixels["image_grid_pinpoints"] = values["image_grid_pinpoints"]
    write_whole(out / "preprocessor_config.json", _json(pixels))
    write_whole(out / "processor_config.json", _json(processor_values(config, values)))
    if class_of(config) == "llava_onevision":
        video = {key: value for key, value in pixels.items() if key in _OF_VIDEOS}
        video["video_processor_type"] = "LlavaOnevisionVideoProcessor"
        write_whole(out / "video_preprocessor_config.json", _json(video))
    template = processor.template.chat_template
    write_whole(out / "chat_template.jinja", template)
    write_whole(out / "chat_template.json", _json({"chat_template": template}))


def generation_settings(processor: LlavaUHDProcessor) -> GenerationConfig:
    """Greedy, ending at the tokenizer's end or where the template's answers end."""
    tokenizer = processor.tokenizer
    single = tokenizer.get_added_vocab()
    ends = [tokenizer.eos_token_id]
    ends += [single[stop] for stop in processor.template.stop_strings if stop in single]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )


# --- weights --------------------------------------------------------------------------------------


def add_unread(weights: Tensors, config: LlavaUHDConfig) -> None:
    """Adds the norm behind the tower, which the class has and this family never reads, in place."""
    sample = next(each for key, each in weights.items() if key.startswith("vision_tower."))
    width = config.vision_config.hidden_size
    weights[f"{_NORM}weight"] = torch.ones(width, dtype=sample.dtype)
    weights[f"{_NORM}bias"] = torch.zeros(width, dtype=sample.dtype)


def with_rows(key: str, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """A table or head with more rows: each the mean of the others, which never wins over them."""
    missing = rows - tensor.shape[0]
    if key not in EMBEDDINGS or missing <= 0:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(missing, -1)])


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
