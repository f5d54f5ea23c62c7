"""Tiny models with adapters that matter, and their output folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fixtures_checkpoint import Parts, save
from fixtures_tiny import LLAMA, tiny_parts

from llava_uhd.checkpoint.lora_layers import is_adapter_parameter
from llava_uhd.checkpoint.lora_write import save_lora
from llava_uhd.checkpoint.manifest import write_manifest
from llava_uhd.config.lora import LoraSection
from llava_uhd.train.lora import add_adapters

# Every family of language models that is trained here.
LANGUAGES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": None},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 24},
}


def shake(model: torch.nn.Module, seed: int = 7, size: float = 0.1) -> None:
    """Gives fresh adapters, which do nothing yet, and the projector values as if they had learned.

    The fresh model's weights are six times as large as usual, so that small errors show.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("projector.") and parameter.ndim > 1:
                parameter.mul_(1.2)
            elif "magnitude" in name:
                parameter.mul_(1 + size * torch.rand_like(parameter))
            elif is_adapter_parameter(name):
                parameter.normal_(std=size)


def adapted(base: Path, out: Path, parts: Parts, **section: Any) -> Parts:
    """Saves the parts as the base, adds adapters with values, and saves what a run would write.

    Returns:
        The parts, in evaluation mode, with their adapters.
    """
    model, processor = parts
    save(base, parts)
    write_manifest(base, kind="model", finished=True)
    add_adapters(model, LoraSection(**{"r": 4, **section}))
    shake(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    out.mkdir(parents=True)
    save_lora(out, model, processor, model.state_dict(), str(base))
    write_manifest(out, kind="lora", finished=True, checkpoint=str(base))
    return model.eval(), processor


def adapted_tiny(folder: Path, text: dict[str, Any] = LLAMA, **section: Any) -> Parts:
    """`adapted` of a fresh tiny model: ``folder/base`` and ``folder/lora``."""
    return adapted(folder / "base", folder / "lora", tiny_parts(text=text), **section)
