"""The files of a low-rank adapter, as PEFT writes them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from llava_uhd.checkpoint.lora_layers import NAME, LoraLayer, base_name
from llava_uhd.checkpoint.sources import ADAPTER_FILE
from llava_uhd.checkpoint.weights import Tensors, read_json, read_tensors
from llava_uhd.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_FILE, "adapter_model.bin")
PREFIX = "base_model.model."
# Of the base, in the metadata of our adapter files.
FINGERPRINT = "llava_uhd_base"

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)"
    rf"(?:\.{NAME})?(?:\.(?P<what>weight|bias))?"
)
# Kinds of adapters that are more than a product of two matrices at a linear layer.
_UNSUPPORTED = (
    *("layer_replication", "target_parameters", "trainable_token_indices", "use_qalora"),
    *("use_bdlora", "arrow_config", "kasa_config", "alora_invocation_tokens", "velora_config"),
)


def adapter_file(folder: Path) -> Path:
    """File with the matrices.

    Raises:
        UserError: there is none.
    """
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{folder} has no {' or '.join(ADAPTER_FILES)}: copy or download the whole output folder "
        "of the LoRA training"
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """Values of ``adapter_config.json``.

    Raises:
        UserError: no such file, or an adapter of another kind.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(
            f"{folder} has no {ADAPTER_CONFIG}, which says the rank and scale of its adapter: copy "
            "or download the whole output folder of the LoRA training"
        )
    values = read_json(path)
    if values.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path}: an adapter of the kind {values['peft_type']}, only LORA is read")
    for key in _UNSUPPORTED:
        if values.get(key):
            raise UserError(f"{path}: adapters with '{key}' are not read here")
    for key in ("r", "lora_alpha"):
        if not isinstance(values.get(key), int | float) or values[key] <= 0:
            raise UserError(f"{path}: {key} must be a number above 0, got {values.get(key)!r}")
    return values


def read_matrices(
    folder: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, LoraLayer], Tensors]:
    """Adapted layers and whole tensors of an adapter's file, under the names in the file.

    Args:
        folder: of the adapter.
        settings: of `read_settings`.

    Returns:
        Path of each adapted layer (without PEFT's prefix) with its matrices, and what else is in
        the file: trained biases, whole trained modules.

    Raises:
        UserError: damaged file, one matrix of a pair, or adapters of other layers than linear ones.
    """
    file = adapter_file(folder)
    found: dict[str, dict[str, torch.Tensor]] = {}
    whole: Tensors = {}
    for key, tensor in read_tensors(file):
        name = key.removeprefix(PREFIX)
        match = _KEY.fullmatch(name)
        if match is not None:
            bias = match["kind"] == "lora_B" and match["what"] == "bias"
            found.setdefault(match["module"], {})["bias" if bias else match["kind"]] = tensor
        elif ".lora_" in name:
            raise UserError(f"{file}: {key} is no adapter of a linear layer, only those are read")
        else:
            whole[base_name(name).replace(".modules_to_save.", ".")] = tensor
    layers = {module: _layer(file, module, each, settings) for module, each in found.items()}
    if not layers:
        raise UserError(f"{file} holds no adapter (no lora_A and lora_B matrices)")
    return layers, whole


def read_fingerprint(folder: Path) -> list[float]:
    """Of the base that an adapter was trained on; empty where the file does not say it."""
    file = adapter_file(folder)
    if file.suffix != ".safetensors":
        return []
    with safe_open(file, framework="pt") as opened:
        return json.loads((opened.metadata() or {}).get(FINGERPRINT, "[]"))


def _layer(
    file: Path, module: str, found: Mapping[str, torch.Tensor], settings: Mapping[str, Any]
) -> LoraLayer:
    if "lora_A" not in found or "lora_B" not in found:
        raise UserError(f"{file}: {module} has only one of lora_A and lora_B: copy the file again")
    a, b = found["lora_A"], found["lora_B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{file}: the matrices of {module} are {tuple(a.shape)} and {tuple(b.shape)}, expected "
            "(r, in) and (out, r)"
        )
    rank = _setting(settings, "r", "rank_pattern", module)
    if rank != a.shape[0]:
        raise UserError(
            f"{file}: {module} has rank {a.shape[0]}, {ADAPTER_CONFIG} says {rank}: the two files "
            "do not belong together"
        )
    alpha = _setting(settings, "lora_alpha", "alpha_pattern", module)
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    magnitude = found.get("lora_magnitude_vector")
    return LoraLayer(a, b, scaling, magnitude, found.get("bias"))


def _setting(settings: Mapping[str, Any], key: str, patterns: str, module: str) -> float:
    """Value of a layer: that of the first pattern that matches the end of its path, as in PEFT."""
    for pattern, value in (settings.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(settings[key])
