"""Writing safetensors one tensor after another: the host never holds more than the largest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

# Names of the format, https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def header(state: Mapping[str, torch.Tensor], order: list[str], metadata: dict[str, str]) -> bytes:
    """What stands before the tensors: length of the table, then the table, a multiple of 8 bytes.

    Args:
        state: tensors by name.
        order: in which they follow.
        metadata: texts of the file.
    """
    table: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name in order:
        tensor = state[name]
        stop = start + tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def save_streamed(
    state: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes tensors of any device as a ``.safetensors`` file.

    Tensors of a GPU pass through the host one by one; ``safetensors`` itself would hold copies of
    all of them at once.

    Args:
        state: tensors by name; of a kind that safetensors has.
        path: of the file.
        metadata: texts of the file.
    """
    # Wide elements first keeps every tensor aligned to its own width.
    order = sorted(state, key=lambda name: (-state[name].element_size(), name))
    with path.open("wb") as stream:
        stream.write(header(state, order, {"format": "pt", **(metadata or {})}))
        for name in order:
            values = state[name].detach().to("cpu").contiguous().reshape(-1)
            stream.write(values.view(torch.uint8).numpy().data)
