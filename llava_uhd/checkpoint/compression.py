"""Visual context compression at test time: what a command line lays over a checkpoint's own."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from llava_uhd.config.compression import DEFAULT_METHOD, CompressionConfig
from llava_uhd.config.typed import Word, convert, field_types
from llava_uhd.errors import UserError
from llava_uhd.language.compressed import check_method, is_active
from llava_uhd.language.compressors import COMPRESSORS, compressor_of
from llava_uhd.language.layers import check_decoder

OPTIONS = {
    "method": f"how tokens become fewer: {', '.join(COMPRESSORS)}; none: not at all",
    "layer": "after so many decoder layers; -1: before the language model",
    "stride": "visual tokens that become one",
    "remainder": "the last, incomplete group: keep, or drop",
    "positions": "integer, or half (the published half precision)",
}
_PREFIX = "compression."


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--compression.layer`` and the like to a command."""
    about = "visual context compression, in the place of the checkpoint's own (docs/compression.md)"
    group = parser.add_argument_group("compression", about)
    for name, help_text in OPTIONS.items():
        group.add_argument(f"--{_PREFIX}{name}", metavar=name.upper(), help=help_text)


def read_options(options: argparse.Namespace) -> dict[str, Any]:
    """Fields of `CompressionConfig` that a command line names, checked one by one.

    Raises:
        UserError: an impossible value.
    """
    types = field_types(CompressionConfig)
    given: dict[str, Any] = {}
    for name in OPTIONS:
        text = getattr(options, _PREFIX + name)
        if text is not None:
            given[name] = convert(Word(text), types[name], _PREFIX + name)
    config = CompressionConfig(**given)
    if config.method != "none":
        compressor_of(config.method)
    if {"method", "layer", "stride"} <= given.keys():
        check_method(config)  # what nothing can mend is told before a model is loaded
    return given


def lay_over(own: CompressionConfig, given: dict[str, Any]) -> CompressionConfig:
    """A checkpoint's own compression with some fields replaced.

    Args:
        own: of the checkpoint.
        given: from `read_options`. Without a method it is the checkpoint's own or, where that
            compresses nothing, the published one.

    Raises:
        UserError: layer or stride is nowhere said, or the method cannot work with them.
    """
    if not given:
        return own
    if given.get("method") == "none":
        return CompressionConfig()
    start = {"method": DEFAULT_METHOD} if own.method == "none" else dataclasses.asdict(own)
    values = {**start, **given, "schedule": None}
    for name, example in (("stride", "8"), ("layer", "16")):
        if name not in values:
            raise UserError(f"--{_PREFIX}{name} is missing: {OPTIONS[name]} (such as {example})")
    config = CompressionConfig(**values)
    check_method(config)
    return config


def compress_model(model: PreTrainedModel, given: dict[str, Any]) -> str | None:
    """Lays options over the compression of a loaded model.

    Args:
        model: `LlavaUHDForConditionalGeneration`; its ``config.compression`` is replaced.
        given: from `read_options`.

    Returns:
        Why nothing is compressed although a method is set, or None.

    Raises:
        UserError: see `lay_over`; a language model that cannot be compressed; or a checkpoint's
            own compression that does not exist.
    """
    config = lay_over(model.config.compression, given)
    layers = num_layers(model)
    if is_active(config, layers):
        check_method(config)  # the checkpoint's own too
        if config.layer >= 0:
            check_decoder(model.get_decoder())
    model.config.compression = config
    if config.stride > 1 and config.method != "none" and config.layer >= layers:
        return (
            f"compression.layer {config.layer} is not below the {layers} layers of the language "
            "model: compression is off"
        )
    return None


def num_layers(model: PreTrainedModel) -> int:
    """Decoder layers of a model."""
    return int(model.config.text_config.num_hidden_layers)


def active_settings(config: CompressionConfig, layers: int) -> dict[str, Any]:
    """What of a compression changes answers, by dotted key; empty where it is off.

    Args:
        config: of the model.
        layers: of its decoder.
    """
    if not is_active(config, layers):
        return {}
    return {f"{_PREFIX}{name}": getattr(config, name) for name in OPTIONS}


def short_name(settings: Mapping[str, Any]) -> str:
    """Words for `active_settings`, empty where compression is off.

    Example: ``"compression 16/8"``, ``"compression fastv 2/2 (drop, half)"``.
    """
    if f"{_PREFIX}stride" not in settings:
        return ""
    method, layer, stride, remainder, positions = (settings[_PREFIX + name] for name in OPTIONS)
    words = f"compression {method} " if method != DEFAULT_METHOD else "compression "
    other = [remainder] * (remainder != CompressionConfig.remainder)
    other += [positions] * (positions != CompressionConfig.positions)
    return words + f"{layer}/{stride}" + (f" ({', '.join(other)})" if other else "")


def folder_name(settings: Mapping[str, Any]) -> str:
    """The same as part of a folder's name.

    Example: ``"compression-16-8"``, ``"compression-fastv-2-2-drop"``, ``"compression-off"``,
    ``"compression-input-8"`` for one before the language model.
    """
    words = (short_name(settings) or "compression off").replace("-1/", "input/")
    return "-".join(re.findall("[a-z0-9_]+", words))
