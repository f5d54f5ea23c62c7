"""Writing the output folder of LoRA training."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from llava_uhd.checkpoint.lora_base import LANGUAGE_PREFIX, LEARNED_FILE
from llava_uhd.checkpoint.lora_files import FINGERPRINT, PREFIX
from llava_uhd.checkpoint.lora_layers import (
    NAME,
    base_name,
    fingerprint,
    is_adapter_parameter,
    path_pattern,
)
from llava_uhd.checkpoint.sources import ADAPTER_FILE
from llava_uhd.checkpoint.weights import Tensors
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor


def save_lora(
    folder: Path,
    model: LlavaUHDForConditionalGeneration,
    processor: LlavaUHDProcessor,
    state: Mapping[str, torch.Tensor],
    base: str | None,
    kept: Collection[str] = (),
) -> None:
    """Writes everything of a trained model that its base does not hold.

    Args:
        folder: exists already.
        model: with adapters.
        processor: of the model.
        state: its weights, gathered; tensors of ``kept`` parts unquantised.
        base: what the adapter was trained on, recorded for PEFT; the manifest says more.
        kept: parts that no base holds, because they began from nothing. The projector and the
            learned newline are always written.
    """
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {"projector", "image_newline", *kept}
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    learned = {
        base_name(name): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name not in tied
        if (name in learning or name.partition(".")[0] in parts) and not is_adapter_parameter(name)
    }
    save_file(learned, folder / LEARNED_FILE, metadata={"format": "pt"})
    modules = {name.partition(".lora_")[0] for name in state if is_adapter_parameter(name)}
    alone = all(name.startswith(LANGUAGE_PREFIX) for name in modules)
    prefix = LANGUAGE_PREFIX if alone else ""
    _write_matrices(folder, state, prefix)
    settings = copy.copy(model.peft_config[NAME])
    every = (name.removeprefix(prefix) for name, _ in model.named_modules())
    settings.target_modules = path_pattern({name.removeprefix(prefix) for name in modules}, every)
    settings.base_model_name_or_path = base
    settings.task_type = "CAUSAL_LM"
    settings.inference_mode = True
    settings.save_pretrained(str(folder))
    config = copy.deepcopy(model.config)
    # Of the base that was trained on, not of the model that this folder means.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _write_matrices(folder: Path, state: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Writes the matrices as PEFT does.

    Args:
        folder: exists already.
        state: of the model; only the adapter's tensors are used.
        prefix: of our names that is left out in the file: without ``language_model.`` its names are
            those of the language model alone, as published.
    """
    kept: Tensors = {}
    for name, tensor in state.items():
        if is_adapter_parameter(name):
            short = name.removeprefix(prefix)
            short = short.replace(f"_magnitude_vector.{NAME}.weight", "_magnitude_vector")
            short = short.replace(f".{NAME}.", ".")
            kept[PREFIX + short] = tensor.detach().cpu().contiguous()
    facts = {"format": "pt", FINGERPRINT: json.dumps(fingerprint(state))}
    save_file(kept, folder / ADAPTER_FILE, metadata=facts)
