"""What a run leaves behind when its numbers go wrong: small files that say where to look."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from llava_uhd.checkpoint.manifest import library_versions, write_whole
from llava_uhd.train.log import read_log
from llava_uhd.train.saving import newest
from llava_uhd.train.stages import part_of

logger = logging.getLogger(__name__)

FOLDER = "diagnostics"
SHOWN_LOG = 20
SHOWN_NAMES = 20


def batches_of_step(
    batches: Iterator[list[Any]], step: int, count: int, accumulated: int, ranks: int, rank: int
) -> list[list[Any]]:
    """Which of an epoch's batches a process takes in a step: the processes take turns.

    Args:
        batches: of the epoch, over all processes.
        step: of the epoch, from 0.
        count: micro-batches of the step on each process.
        accumulated: micro-batches of a whole step on each process.
        ranks: processes.
        rank: the process.

    Example: with 2 processes and 1 micro-batch a step, rank 1 takes in step 3 the eighth batch.
    """
    first = step * accumulated * ranks
    taken = list(islice(batches, first, first + count * ranks))
    return taken[rank::ranks]


def samples_of_step(trainer: Trainer) -> list[list[int]]:
    """Indices of the samples in each micro-batch of the step at hand, on this process."""
    sampler = trainer.sampler
    if sampler is None:
        return []
    dataset, args = trainer.train_dataset, trainer.args
    packed = hasattr(dataset, "packing")  # then the sampler gives rows
    size = 1 if packed else args.train_batch_size
    accumulated = args.gradient_accumulation_steps
    per_rank = math.ceil(math.ceil(len(sampler) / size) / args.world_size)
    step = trainer.state.global_step % max(math.ceil(per_rank / accumulated), 1)
    order = iter(sampler)
    batches = iter(lambda: list(islice(order, size)), [])
    found = batches_of_step(
        batches, step, trainer.micro_batches, accumulated, args.world_size, args.process_index
    )
    if packed:
        return [[int(index) for row in batch for index in row] for batch in found]
    return [[int(index) for index in batch] for batch in found]


def gradient_facts(model: nn.Module) -> dict[str, Any]:
    """Norm of the gradients of each part, and the parameters whose gradients are not finite.

    Empty where the gradients are not at hand, as with DeepSpeed.
    """
    squares: dict[str, float] = {}
    broken = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        norm = torch.linalg.vector_norm(parameter.grad.float())
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        part = part_of(name)
        squares[part] = squares.get(part, 0.0) + value * value
        if not math.isfinite(value):
            broken.append(name)
    norms = {part: math.sqrt(square) for part, square in squares.items()}
    return {
        "gradient_norms": norms,
        "not_finite": broken[:SHOWN_NAMES],
        "not_finite_parameters": len(broken),
    }


def _rank_facts(trainer: Trainer) -> dict[str, Any]:
    dataset = trainer.train_dataset
    records = getattr(getattr(dataset, "samples", dataset), "records", None)
    micro = []
    losses = [float(loss) for loss in trainer.step_losses]
    for number, indices in enumerate(samples_of_step(trainer)):
        entry: dict[str, Any] = {"samples": indices}
        if records is not None:
            entry["where"] = [records.where(index) for index in indices]
        if number < len(losses):
            entry["loss"] = losses[number]
        micro.append(entry)
    return {"host": platform.node(), "pid": os.getpid(), "micro_batches": micro}


def write_bundle(trainer: Trainer, reason: str, facts: dict[str, Any]) -> Path | None:
    """Writes ``diagnostics/step-N``; every process adds its own samples.

    Args:
        trainer: whose numbers went wrong, before it takes step N.
        reason: in words.
        facts: further ones.

    Returns:
        The folder, or None if it could not be written (then the log says why).
    """
    args, step = trainer.args, trainer.state.global_step + 1
    output = Path(args.output_dir)
    folder = output / FOLDER / f"step-{step}"
    gradients = gradient_facts(trainer.model)  # all processes: sharded ones are summed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = json.dumps(_rank_facts(trainer), indent=1) + "\n"
        write_whole(folder / f"rank-{args.process_index}.json", own)
        trainer._save_rng_state(str(folder))
        if args.process_index == 0:
            before = newest(output)
            report = {
                "reason": reason,
                "step": step,
                "epoch": trainer.state.epoch,
                **facts,
                **gradients,
                "rates": sorted({float(group["lr"]) for group in trainer.optimizer.param_groups}),
                "last_checkpoint": before.name if before else None,
                "ranks": args.world_size,
                "versions": library_versions(),
                "log": read_log(output)[-SHOWN_LOG:],
            }
            write_whole(folder / "report.json", json.dumps(report, indent=1) + "\n")
            write_whole(folder / "recipe.yaml", trainer.recipe.to_yaml())
    except OSError as error:
        logger.warning("%s cannot be written: %s", folder, error)
        return None
    return folder
