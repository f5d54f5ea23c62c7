"""What a layout cannot say of a model: its values are written, read back, and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from llava_uhd.checkpoint.projector_names import is_mlp
from llava_uhd.checkpoint.published import Layout
from llava_uhd.checkpoint.published.layout import Names, Values
from llava_uhd.config.model import ImageConfig, LlavaUHDConfig, make_config
from llava_uhd.errors import UserError
from llava_uhd.images.anyres import expand_pinpoints
from llava_uhd.text.layout import single_token_id
from llava_uhd.vision.towers import num_built_layers

# Settings of ours that change no weight and no usual number: noted, not refused.
_FREE = {"template", "image.bounded", "image.max_slices", "image.long_side"}
_FREE |= {f"video.{name}" for name in ("fps", "max_frames", "force_sample", "time_instruction")}
_SKIPPED = {"image.image_token_id", "projector.form", "projector.train_positions"}
_SKIPPED |= {"projector.round_boxes", "projector.initializer_range"}
HOUSEKEEPING = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}


def compare(
    layout: Layout,
    values: Values,
    config: LlavaUHDConfig,
    names: Names,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """What a reader of ``values`` would take for granted against what the model says.

    Args:
        layout: that is written.
        values: its ``config.json``.
        config: of the model.
        names: of the weights in the layout.
        tokenizer: of the model.

    Returns:
        Notes on harmless differences.

    Raises:
        UserError: a difference that makes another model of it.
    """
    if layout.additive:
        vision = make_config(config.vision_config, "vision_config")
    else:
        found = layout.find_vision(values, Path(), {})
        assert found is not None
        vision = found
    vision.image_mean, vision.image_std = config.image.normalisation
    again = layout.make_config(values, vision, names)
    for name, text in (("comma_id", ","), ("newline_id", "\n")):
        if getattr(again.image, name) is None:
            setattr(again.image, name, single_token_id(tokenizer, text))
    notes: list[str] = []
    refused: list[str] = []
    for name, own, read in _settings(config, again):
        if name == "text_config.vocab_size" and not layout.additive:
            continue  # rows for the placeholders
        free = name in _FREE or (name.startswith("video.") and again.video.pool_stride == 1)
        line = f"{name} is {own}, the layout means {read}"
        (notes if free else refused).append(line)
    if refused:
        raise UserError(f"the {layout.name} layout cannot hold this model: {'; '.join(refused)}")
    return notes


def _settings(own: LlavaUHDConfig, read: LlavaUHDConfig) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of every setting in which two configurations differ."""
    if own.template != read.template:
        yield "template", own.template, read.template
    depths = [
        num_built_layers(each.vision_config.num_hidden_layers, each.select_layer)
        for each in (own, read)
    ]
    if depths[0] != depths[1]:
        yield "select_layer", own.select_layer, read.select_layer
    for part, values in (("image", _image), ("projector", _projector), ("video", _video)):
        first, second = values(own), values(read)
        for key, value in first.items():
            if f"{part}.{key}" not in _SKIPPED and value != second.get(key):
                yield f"{part}.{key}", value, second.get(key)
    first, second = (_plain_text(each.text_config) for each in (own, read))
    for key in sorted(first.keys() | second.keys()):
        if first.get(key) != second.get(key):
            yield f"text_config.{key}", first.get(key), second.get(key)


def _image(config: LlavaUHDConfig) -> dict[str, Any]:
    """Image settings that are read, in one notation."""
    image: ImageConfig = config.image
    values = dataclasses.asdict(image)
    if image.layout not in ("slices", "rows"):
        del values["comma_id"], values["newline_id"]
    if image.strategy == "anyres":
        values["pinpoints"] = expand_pinpoints(image.pinpoints, image.scale_resolution)
    else:
        values["pinpoints"] = values["max_tiles"] = None
    if image.strategy == "pad":
        values["several"] = "same"  # one padded view each in any case
    if image.strategy != "slices":
        del values["max_slices"], values["bounded"]
    return values


def _projector(config: LlavaUHDConfig) -> dict[str, Any]:
    options = config.projector
    if is_mlp(options) or options.type == "identity":
        return {"type": options.type}
    values = dataclasses.asdict(options)
    values["num_heads"] = options.num_heads or max(config.hidden_size // 128, 1)
    if options.type != "hiwin":
        values["scales"] = None  # read by nothing
    return values


def _video(config: LlavaUHDConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config.video)
    if config.video.strategy is None:  # the overview of a model that cuts tiles, which is squeezed
        tiled = config.image.strategy == "anyres"
        values["strategy"] = "squeeze" if tiled else config.image.strategy
    return values


def _plain_text(text: PreTrainedConfig) -> dict[str, Any]:
    return {key: value for key, value in text.to_dict().items() if key not in HOUSEKEEPING}
