"""LoRA and QLoRA in a training run: which layers get adapters, what is kept in which dtype."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from llava_uhd.checkpoint.assemble import Assembled
from llava_uhd.checkpoint.lora import read_adapter
from llava_uhd.checkpoint.lora_base import LANGUAGE_PREFIX
from llava_uhd.checkpoint.lora_layers import (
    base_name,
    inject,
    is_adapter_parameter,
    load_matrices,
)
from llava_uhd.checkpoint.lora_write import save_lora
from llava_uhd.checkpoint.quantize import Quantization
from llava_uhd.checkpoint.weights import Tensors
from llava_uhd.config.lora import ALL_LINEAR, LoraSection
from llava_uhd.config.training import Recipe
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration
from llava_uhd.text.processor import LlavaUHDProcessor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraRun:
    """What the output folder of a LoRA run needs to know.

    Attributes:
        base: what the adapters are trained on, or None if that began from nothing.
        kept: parts that began from nothing: they are written beside the adapters.
        original: their weights under the model's names, where the model holds quantised ones.
    """

    base: str | None
    kept: tuple[str, ...]
    original: Tensors = field(default_factory=dict)

    def save(
        self,
        folder: Path,
        model: LlavaUHDForConditionalGeneration,
        processor: LlavaUHDProcessor,
        state: Mapping[str, torch.Tensor],
    ) -> None:
        """Writes the finished run.

        Args:
            folder: exists already.
            model: with its adapters.
            processor: of the model.
            state: its weights, gathered from all ranks.
        """
        if self.original:
            quantised = tuple({f"{name.partition('.')[0]}." for name in self.original})
            state = {
                name: tensor
                for name, tensor in state.items()
                if is_adapter_parameter(name) or not name.startswith(quantised)
            } | self.original
        save_lora(folder, model, processor, state, self.base, self.kept)


def lora_run(recipe: Recipe, parts: Assembled) -> LoraRun | None:
    """Facts for the output folder, None without adapters."""
    if not recipe.lora.enabled:
        return None
    base = recipe.model.checkpoint or recipe.model.language_model
    kept = tuple(part for part in parts.new_parts if part != "projector")
    return LoraRun(base if isinstance(base, str) else None, kept, parts.original)


def storage(recipe: Recipe, arguments: TrainingArguments, deepspeed: Path | None) -> dict[str, Any]:
    """How the frozen weights are kept: options of `llava_uhd.checkpoint.load.build_model`.

    Raises:
        UserError: quantised weights and a way of sharding that would break them up.
    """
    section = recipe.lora
    if section.quantization is None:
        return {}
    if deepspeed is not None and "zero3" in deepspeed.name:
        raise UserError(
            f"deepspeed {deepspeed.stem} shards the weights, quantised ones cannot be: "
            "--deepspeed zero2, or --lora.quantization null"
        )
    wanted = Quantization(section.quantization, section.double_quant, section.quant_type)
    return {"quantization": wanted, "device": str(arguments.device)}


# --- targets --------------------------------------------------------------------------------------


def target_modules(model: LlavaUHDForConditionalGeneration, section: LoraSection) -> list[str]:
    """Paths of the linear layers that get an adapter.

    Args:
        model: without adapters.
        section: of the recipe. ``targets`` are looked for inside the language model only (without
            its head), ``extra_targets`` outside it only.

    Raises:
        UserError: a pattern that matches nothing; the message lists what there is.
    """
    head = model.get_output_embeddings()
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    inside = {name for name in linear if name.startswith(LANGUAGE_PREFIX)}
    found: set[str] = set()
    for pattern in section.target_patterns:
        short = {name.removeprefix(LANGUAGE_PREFIX): name for name in inside}
        hits = {
            name
            for path, name in short.items()
            if pattern == ALL_LINEAR or path.endswith(f".{pattern}") or re.fullmatch(pattern, path)
        }
        _check_hits("targets", pattern, hits, short, "the language model")
        found |= hits
    for pattern in section.extra_patterns:
        outside = linear - inside
        hits = {name for name in outside if re.fullmatch(pattern, name)}
        _check_hits("extra_targets", pattern, hits, outside, "tower and projector")
        found |= hits
    _check_called(model, found - inside)
    return sorted(found)


def _check_hits(key: str, pattern: str, hits: set[str], known: Any, where: str) -> None:
    if hits:
        return
    kinds = sorted({re.sub(r"\.\d+\.", r".N.", name) for name in known})
    raise UserError(
        f"lora.{key} '{pattern}' matches no linear layer of {where} ({', '.join(kinds[:16])})"
    )


def _check_called(model: LlavaUHDForConditionalGeneration, names: set[str]) -> None:
    """Refuses layers whose weights are read without calling them: adapters would do nothing there.

    The fast forms of some projectors multiply weights with each other first.
    """
    if not names or any(hasattr(p, "ds_id") for p in model.parameters()):
        return
    called: set[str] = set()
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in names
    ]
    try:
        with torch.no_grad():
            model._vision_anchor()
    finally:
        for hook in hooks:
            hook.remove()
    silent = sorted(names - called)
    if silent:
        raise UserError(
            f"lora.extra_targets: {', '.join(silent[:4])} cannot carry adapters, the model reads "
            "their weights directly: train the part itself (stage.learn) or leave them out"
        )


# --- the model ------------------------------------------------------------------------------------


def add_adapters(model: LlavaUHDForConditionalGeneration, section: LoraSection) -> None:
    """Puts the section's adapters into a model; without a rank nothing happens.

    Raises:
        UserError: no such layers, the library is missing, or ``adapter_file`` does not fit.
    """
    if not section.enabled:
        return
    inject(
        model,
        target_modules(model, section),
        r=section.r,
        lora_alpha=section.scale_alpha,
        lora_dropout=section.dropout,
        use_dora=section.dora,
    )
    if section.adapter_file is not None:
        _start_from(model, section.adapter_file)


def _start_from(model: LlavaUHDForConditionalGeneration, path: str) -> None:
    """Takes adapters, projector and biases from an earlier run."""
    adapter, learned = read_adapter(path, model.config)
    load_matrices(model, adapter)
    own = {base_name(name): parameter for name, parameter in model.named_parameters()}
    for name, tensor in learned.items():
        if name.startswith(LANGUAGE_PREFIX) and not name.endswith(".bias"):
            continue  # the language model is the recipe's
        if name not in own or own[name].shape != tensor.shape:
            raise UserError(
                f"lora.adapter_file {path}: its {name} has shape {tuple(tensor.shape)}, which this "
                "model has no place for: set model.projector and model.image to its values"
            )
        with torch.no_grad():
            own[name].copy_(tensor)


def finish_adapters(
    model: LlavaUHDForConditionalGeneration, section: LoraSection, arguments: TrainingArguments
) -> None:
    """What is left to do after `apply_stage`: biases that learn, and dtypes.

    Args:
        model: after `apply_stage`.
        section: of the recipe.
        arguments: of the run.
    """
    if not section.enabled:
        return
    learn_biases(model, section)
    # DeepSpeed casts the whole model and keeps float32 copies of what learns by itself.
    if (arguments.bf16 or arguments.fp16) and not arguments.deepspeed:
        use_masters(model, quantised=section.quantization is not None)


def learn_biases(model: nn.Module, section: LoraSection) -> None:
    """Lets the biases learn that ``lora.bias`` names."""
    if section.bias == "none":
        return
    parameters = dict(model.named_parameters())
    adapted = {name.partition(".")[0] for name in parameters if is_adapter_parameter(name)}
    for name, parameter in parameters.items():
        own = name.endswith(".bias") and not is_adapter_parameter(name)
        if not own or name.partition(".")[0] not in adapted:
            continue
        if section.bias == "all" or name.endswith(".base_layer.bias"):
            parameter.requires_grad_(True)


def use_masters(model: nn.Module, quantised: bool) -> None:
    """Keeps in float32 what needs it in a run that casts the operands of each product to half.

    What learns is its own master copy: half-precision weights would lose small steps. Below
    quantised layers the norms of the language model are float32 too, as published. The rest, frozen
    language model and tower, stays in the dtype it was loaded in.

    Args:
        model: what learns is marked by ``requires_grad``.
        quantised: whether the language model's layers are.
    """
    for name, parameter in model.named_parameters():
        norm = quantised and name.startswith(LANGUAGE_PREFIX) and "norm" in name
        if parameter.is_floating_point() and (parameter.requires_grad or norm):
            parameter.data = parameter.data.float()
