"""The model that a command asks, with everything about it that can change an answer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llava_uhd.checkpoint.compression import (
    active_settings,
    add_options,
    compress_model,
    folder_name,
    num_layers,
    read_options,
)
from llava_uhd.checkpoint.load import load_pretrained, parse_dtype
from llava_uhd.checkpoint.sources import find_checkpoint, resolve_folder
from llava_uhd.eval.provenance import model_digest, provenance
from llava_uhd.eval.ranks import Ranks
from llava_uhd.model.devices import choose_device, choose_dtype
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint.

    Attributes:
        model: in evaluation mode, on its device.
        processor: of the model.
        checkpoint: as the user named it.
        folder: where it lies.
        settings: what of it can change an answer.
        facts: to record beside results.
        compression: name of a folder of results, where another visual context compression than the
            checkpoint's own is asked for; else None.
    """

    model: LlavaUHDForConditionalGeneration
    processor: LlavaUHDProcessor
    checkpoint: str
    folder: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    compression: str | None


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, where and how it is computed, and its compression."""
    parser.add_argument("checkpoint", help="folder, name under checkpoints/, or hub id")
    parser.add_argument("--device", help="cuda, cuda:N, mps, cpu; default: the best one here")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; default: by device")
    parser.add_argument("--model-base", help="base of a projector-only or LoRA checkpoint")
    parser.add_argument("--vision-tower", help="folder of a tower that replaces the checkpoint's")
    add_options(parser)


def load_subject(options: argparse.Namespace, ranks: Ranks, console: Console) -> Subject:
    """Loads the checkpoint of `add_model_options`.

    Raises:
        UserError: a damaged or missing checkpoint, or values that make no sense.
    """
    compression = read_options(options)
    device = choose_device(_device_name(options.device, ranks))
    dtype = parse_dtype(options.dtype) if options.dtype else choose_dtype(device)
    checkpoint = find_checkpoint(options.checkpoint)
    folder = resolve_folder(checkpoint, "checkpoint")
    model, processor = load_pretrained(
        folder, options.model_base, options.vision_tower, dtype=dtype, device=device
    )
    layers = num_layers(model)
    own = active_settings(model.config.compression, layers)
    off = compress_model(model, compression)
    if off:
        console.print(off, markup=False, highlight=False, soft_wrap=True)
    compressed = active_settings(model.config.compression, layers)
    settings = {
        "model": model_digest(folder),
        "base": _digest_of(options.model_base, "language model"),
        "vision_tower": _digest_of(options.vision_tower, "vision tower"),
        "template": processor.template_name,
        **compressed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return Subject(
        model,
        processor,
        str(checkpoint),
        folder,
        settings,
        {"checkpoint": str(checkpoint), **provenance(device, ranks.size)},
        None if compressed == own else folder_name(compressed),
    )


def _device_name(name: str | None, ranks: Ranks) -> str | None:
    """The GPU of this process when there are several; otherwise what the user said."""
    if name in (None, "auto", "cuda") and ranks.size > 1 and torch.cuda.is_available():
        return f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
    return name


def _digest_of(path: str | None, what: str) -> str | None:
    return None if path is None else model_digest(resolve_folder(path, what))
