"""Weights to files, one shard after another: memory holds one shard at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.checkpoint.weights import Tensors
from llava_uhd.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}

Change = Callable[[str, torch.Tensor], torch.Tensor]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``300KB``.

    Raises:
        UserError: another notation, or nothing.
    """
    match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|)", text.strip().upper())
    size = int(match.group(1)) * _UNITS[match.group(2)] if match else 0
    if size < 1:
        raise UserError(f"shard size {text!r} must read like 5GB, 300MB or 64KB")
    return size


def plan_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names of each shard: in the given order, each shard as full as it gets.

    A weight above the limit is a shard of its own.

    Example: sizes a 3, b 2, c 4 and a limit of 5: [[a, b], [c]].
    """
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def write_shards(folder: Path, weights: Tensors, limit: int, change: Change) -> None:
    """Writes ``model.safetensors``, or several shards and their index.

    Weights that come from files are mapped, not read: each is read when its shard is written, and
    let go with it.

    Args:
        folder: exists.
        weights: by their names in the file; emptied. In the order of the files they come from,
            each of which is let go as soon as possible.
        limit: bytes of a shard, before ``change``.
        change: (name, tensor) -> what is written for it.
    """
    sizes = {key: each.numel() * each.element_size() for key, each in weights.items()}
    shards = plan_shards(sizes, limit)
    table: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        part = {name: change(name, weights.pop(name)).contiguous() for name in names}
        total += sum(each.numel() * each.element_size() for each in part.values())
        save_file(part, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(names, file)
        del part
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": table}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_whole(folder / "model.safetensors.index.json", text)
