"""Packed rows in a run: how long they are, how many make a step, what a run goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.progress import Progress
from transformers import TrainingArguments

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.checkpoint.weights import read_json
from llava_uhd.config.model import LlavaUHDConfig
from llava_uhd.config.training import Recipe
from llava_uhd.data.costs import TrainingCost
from llava_uhd.data.dataset import ConversationDataset
from llava_uhd.data.filling import TooLongError
from llava_uhd.data.lengths import COUNTS_FILE, CountedEpochs, TokenCounts, stored_counts
from llava_uhd.data.packed import PackedSamples
from llava_uhd.data.packing import Packing, mean_budget, rows_for
from llava_uhd.errors import UserError
from llava_uhd.train.setup import world_size
from llava_uhd.train.start import console, is_first_rank, say

PLAN_FILE = "packing.json"


def pack(
    recipe: Recipe,
    arguments: TrainingArguments,
    config: LlavaUHDConfig,
    dataset: ConversationDataset,
    folder: Path,
    going_on: bool,
) -> PackedSamples:
    """Counts the tokens of all samples and plans the rows of a run.

    Args:
        recipe: of the run.
        arguments: of it, but for the number of rows in a step.
        config: of the model.
        dataset: of the run.
        folder: output folder, where counts and plan are kept.
        going_on: the run goes on from a checkpoint: the rows of its steps are those it began with.

    Raises:
        UserError: a sample that does not fit, or a run that cannot go on with the same rows.
    """
    with arguments.main_process_first(local=False, desc="counting tokens"):
        counts = _count(dataset, config, folder)
    cost = TrainingCost.of(
        config.text_config,
        recipe.stage.learn,
        recipe.lora.enabled,
        bool(arguments.gradient_checkpointing),
    )
    stored = read_json(folder / PLAN_FILE) if going_on else {}
    if stored:
        budget, rows = int(stored["pack_tokens"]), int(stored["rows_per_step"])
        _check_devices(rows, folder)
    else:
        budget = pack_tokens(recipe, counts, dataset)
        rows = rows_per_step(recipe, float(counts.tokens.mean()), budget)
    epochs = CountedEpochs(counts, dataset, cost)
    length = (arguments.num_train_epochs, arguments.max_steps)
    try:
        packing = Packing(epochs, budget, rows, arguments.seed, *length)
    except TooLongError as error:
        raise UserError(
            f"{dataset.records.where(error.index)} has {error.tokens} tokens, more than the "
            f"{budget} of data.pack_tokens: raise it to at least {counts.longest(dataset)}, or cut "
            "samples with data.max_length"
        ) from error
    if stored and stored["digest"] != packing.digest():
        raise UserError(
            f"{folder} has a checkpoint to go on from, but samples have other numbers of tokens "
            "than when it was written (images of another size?): bring the data back, or set "
            "--trainer.output_dir to a new folder"
        )
    if is_first_rank() and not stored:
        write_whole(folder / PLAN_FILE, json.dumps(_described(packing), indent=2) + "\n")
    return PackedSamples(dataset, packing)


def rows_of_device(packing: Packing) -> int:
    """Rows that a device takes in an optimizer step, one after another."""
    return packing.rows_per_step // world_size()


def _count(dataset: ConversationDataset, config: LlavaUHDConfig, folder: Path) -> TokenCounts:
    with Progress(console=console, transient=True, disable=not is_first_rank()) as bar:
        task = bar.add_task("counting tokens", total=len(dataset))
        counts = stored_counts(
            dataset, config, folder / COUNTS_FILE, lambda number: bar.advance(task, number)
        )
    broken = int(counts.broken.sum())
    if broken:
        say(f"{broken} samples have broken files: they count as their text and will be left out")
    return counts


def pack_tokens(recipe: Recipe, counts: TokenCounts, dataset: ConversationDataset) -> int:
    """Tokens of a row, see ``data.pack_tokens``."""
    if recipe.data.pack_tokens is not None:
        return recipe.data.pack_tokens
    most = int(recipe.trainer.arguments.get("per_device_train_batch_size") or 8)
    total = recipe.trainer.global_batch_size
    if total is not None:
        most = min(most, -(-total // world_size()))
    return max(mean_budget(counts.tokens, most), counts.longest(dataset))


def rows_per_step(recipe: Recipe, mean: float, budget: int) -> int:
    """Rows of an optimizer step, over all devices.

    Args:
        recipe: its global batch is kept on average.
        mean: tokens of a sample.
        budget: tokens of a row.
    """
    total = recipe.trainer.global_batch_size
    if total is not None:
        return rows_for(total, budget / mean, world_size())
    return world_size() * int(recipe.trainer.arguments.get("gradient_accumulation_steps") or 1)


def _check_devices(rows: int, folder: Path) -> None:
    if rows % world_size():
        raise UserError(
            f"{folder} has a checkpoint to go on from whose steps have {rows} packed rows, which "
            f"{world_size()} devices cannot share: use a number of devices that divides it"
        )


def _described(packing: Packing) -> dict[str, Any]:
    return {
        "format": 1,
        "pack_tokens": packing.budget,
        "rows_per_step": packing.rows_per_step,
        "steps_per_epoch": packing.steps,
        "seed": packing.seed,
        "digest": packing.digest(),
        "first_epoch": packing.report(0)._asdict(),
    }


def announce_rows(packing: Packing, device: str) -> None:
    """Says what the rows come to.

    Args:
        packing: of the run.
        device: its name.
    """
    found, devices = packing.report(0), world_size()
    say(
        f"{found.samples:,} samples packed into {found.rows:,} rows of at most {packing.budget:,} "
        f"tokens, {found.fill:.1%} filled; {found.steps:,} steps an epoch"
    )
    say(
        f"a step has {packing.rows_per_step} rows = {rows_of_device(packing)} accumulated "
        f"x {devices} devices ({device}): {found.samples_per_step:,.1f} samples on average "
        f"({found.fewest_samples} to {found.most_samples}), {found.tokens_per_step:,.0f} tokens; "
        f"its costliest row costs {found.imbalance:.3f} times the average one"
    )
