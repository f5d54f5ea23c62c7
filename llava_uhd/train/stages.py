"""What learns in a stage, and at which rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llava_uhd.config.training import PARTS, StageConfig
from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration


@dataclass(frozen=True)
class PartReport:
    """One line of the table that a run prints before it starts.

    Attributes:
        name: of the part.
        learning: parameters that learn.
        total: parameters.
        rate: learning rate, None if nothing learns.
    """

    name: str
    learning: int
    total: int
    rate: float | None


def part_of(parameter_name: str) -> str:
    """Part that a parameter of the model belongs to.

    Example: ``projector.attn.in_proj_weight`` belongs to ``projector``.
    """
    return parameter_name.partition(".")[0]


def apply_stage(model: LlavaUHDForConditionalGeneration, stage: StageConfig) -> None:
    """Lets exactly the stage's parts learn.

    The query positions of a projector learn only if ``config.projector.train_positions`` says so,
    as in the published training, where they rest in the second stage.
    """
    for part in PARTS:
        module: nn.Module = getattr(model, part)
        module.requires_grad_(part in stage.learn)
    positions = getattr(model.projector, "pos_embed", None)
    if positions is not None and not model.config.projector.train_positions:
        positions.requires_grad_(False)


def part_reports(
    model: LlavaUHDForConditionalGeneration, stage: StageConfig, learning_rate: float
) -> list[PartReport]:
    """Counts what learns in each part.

    Args:
        model: after `apply_stage`.
        stage: of the recipe.
        learning_rate: of parts that have none of their own.
    """
    reports = []
    for part in PARTS:
        parameters = list(getattr(model, part).parameters())
        learning = sum(p.numel() for p in parameters if p.requires_grad)
        rate = stage.learn.get(part)
        reports.append(
            PartReport(
                name=part,
                learning=learning,
                total=sum(p.numel() for p in parameters),
                rate=None if not learning else (learning_rate if rate is None else rate),
            )
        )
    return reports


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
        rate = stage.learn.get(part)
        groups.append(
            {
                "params": parameters,
                "lr": learning_rate if rate is None else rate,
                "weight_decay": weight_decay if decays else 0.0,
            }
        )
    return groups
