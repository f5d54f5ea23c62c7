"""What learns in a stage, and at which rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from llava_uhd.checkpoint.lora_layers import is_adapter_parameter
from llava_uhd.checkpoint.vdim import UPSAMPLER_PREFIX
from llava_uhd.config.training import PARTS, UPSAMPLER_PARTS, StageConfig
from llava_uhd.errors import UserError
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration


@dataclass(frozen=True)
class PartReport:
    """One line of the table that a run prints before it starts.

    Attributes:
        name: of the part; " (LoRA)" behind it if adapters learn in its place.
        learning: parameters that learn.
        total: parameters.
        rate: learning rate, None if nothing learns.
    """

    name: str
    learning: int
    total: int
    rate: float | None


def part_of(parameter_name: str) -> str:
    """Part that a parameter of the model belongs to: every parameter belongs to exactly one.

    Example: ``projector.attn.in_proj_weight`` belongs to ``projector``,
    ``projector.upsampler.fixup_proj.1.weight`` to ``upsampler_fixup``, and
    ``projector.upsampler.up1.fixup_proj.0.weight``, which lies inside a stage, to ``upsampler``.
    """
    if parameter_name.startswith(UPSAMPLER_PREFIX):
        inside = parameter_name.removeprefix(UPSAMPLER_PREFIX)
        return "upsampler_fixup" if inside.startswith("fixup_proj") else "upsampler"
    return parameter_name.partition(".")[0]


def learns(part: str, stage: StageConfig) -> bool:
    """Whether a part of `part_of` learns: the whole upsampler takes its fixup along."""
    return part in stage.learn or (part in UPSAMPLER_PARTS and "upsampler" in stage.learn)


def rate_of(part: str, stage: StageConfig, learning_rate: float) -> float:
    """Learning rate of a part that learns; ``learning_rate`` where it has none of its own."""
    if part == "upsampler_fixup" and part not in stage.learn:
        part = "upsampler"
    rate = stage.learn.get(part)
    return learning_rate if rate is None else rate


def adapted_parts(model: nn.Module) -> set[str]:
    """Parts that carry adapters: these learn in the place of their own weights."""
    return {part_of(name) for name, _ in model.named_parameters() if is_adapter_parameter(name)}


def apply_stage(model: LlavaUHDForConditionalGeneration, stage: StageConfig) -> None:
    """Lets exactly the stage's parts learn; where a part carries adapters, only those.

    The query positions of a projector learn only if ``config.projector.train_positions`` says so,
    as in the published LLaVA-UHD v1 training, where they rest in the second stage.

    Raises:
        UserError: the stage trains an upsampler that the projector does not have, or leaves out a
            part that carries adapters.
    """
    adapted = adapted_parts(model)
    for part in adapted:
        if not learns(part, stage):
            raise UserError(
                f"lora puts adapters into {part}, but stage.learn leaves it out: give them a rate "
                f"(--stage.learn.{part} 2e-4)"
            )
    present = set()
    for name, parameter in model.named_parameters():
        part = part_of(name)
        present.add(part)
        own = part not in adapted or is_adapter_parameter(name)
        parameter.requires_grad_(learns(part, stage) and own)
    for part in stage.learn:
        if part not in present:
            raise UserError(
                f"stage.learn.{part}: {_why_absent(part, model)}: leave it out "
                f"(--stage.learn.{part} false)"
            )
    positions = getattr(model.projector, "pos_embed", None)
    if positions is not None and not model.config.projector.train_positions:
        positions.requires_grad_(False)


def _why_absent(part: str, model: LlavaUHDForConditionalGeneration) -> str:
    """Why a model has no weights of a part."""
    projector = model.config.projector
    if part == "image_newline":
        return f"the layout {model.config.image.layout} has no learned newline, only 'unpad' has"
    if part in UPSAMPLER_PARTS:
        scales = list(projector.scales)
        return f"the projector {projector.type} with scales {scales} has no upsampler"
    return f"the model has no weights there (projector {projector.type})"


def part_reports(
    model: LlavaUHDForConditionalGeneration, stage: StageConfig, learning_rate: float
) -> list[PartReport]:
    """Counts what learns in each part that the model has.

    Args:
        model: after `apply_stage`.
        stage: of the recipe.
        learning_rate: of parts that have none of their own.
    """
    adapted = adapted_parts(model)
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        learning, total = counts.setdefault(part_of(name), [0, 0])
        size = _size(parameter)
        counts[part_of(name)] = [learning + size * parameter.requires_grad, total + size]
    reports = []
    for part in PARTS:
        if part in counts:
            learning, total = counts[part]
            rate = rate_of(part, stage, learning_rate) if learning else None
            shown = f"{part} (LoRA)" if part in adapted else part
            reports.append(PartReport(shown, learning, total, rate))
    return reports


def _size(parameter: nn.Parameter) -> int:
    """Values of a parameter; several 4-bit ones lie in one byte."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)


def parameter_groups(
    model: nn.Module,
    stage: StageConfig,
    learning_rate: float,
    weight_decay: float,
    decaying: set[str],
) -> list[dict[str, object]]:
    """Optimizer groups: one per part and kind, with the part's rate.

    Args:
        model: after `apply_stage`.
        stage: of the recipe.
        learning_rate: of parts that have none of their own.
        weight_decay: of the decaying parameters; norms and biases have none.
        decaying: names of the parameters that decay.
    """
    grouped: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grouped.setdefault((part_of(name), name in decaying), []).append(parameter)
    groups: list[dict[str, object]] = []
    for (part, decays), parameters in grouped.items():
        groups.append(
            {
                "params": parameters,
                "part": part,
                "lr": rate_of(part, stage, learning_rate),
                "weight_decay": weight_decay if decays else 0.0,
            }
        )
    return groups
