"""``python -m llava_uhd.train RECIPE [--section.key value ...]``: one training stage."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table
from transformers import TrainingArguments, set_seed

from llava_uhd.checkpoint.assemble import Assembled, assemble, check_parts
from llava_uhd.checkpoint.lora_base import KIND
from llava_uhd.checkpoint.manifest import write_manifest
from llava_uhd.config.training import UPSAMPLER_PARTS, Recipe
from llava_uhd.data.collator import Collator
from llava_uhd.data.dataset import ConversationDataset
from llava_uhd.data.holdout import open_split
from llava_uhd.data.packed import PackedSamples
from llava_uhd.errors import UserError, command
from llava_uhd.train.compression import RunLength, announce_compression, check_length
from llava_uhd.train.counting import Counting
from llava_uhd.train.drawn import is_plain, source_table, write_data_manifest
from llava_uhd.train.embedded import demo_tokenizer, use_embedded
from llava_uhd.train.fsdp import keep_masters
from llava_uhd.train.guarded import stopped, told_of_the_disk
from llava_uhd.train.heldout import HeldOut, held_out_dataset
from llava_uhd.train.log import CURVE_FILE, JsonLog, draw_loss, read_log
from llava_uhd.train.lora import add_adapters, finish_adapters, lora_run, storage
from llava_uhd.train.loss import check_loss
from llava_uhd.train.optimizers import check_optimizer, check_schedule
from llava_uhd.train.output import agreed, is_finished, last_complete_checkpoint, prepare_output
from llava_uhd.train.packed import announce_rows, pack, rows_of_device
from llava_uhd.train.preflight import preflight
from llava_uhd.train.preview import preview
from llava_uhd.train.record_callbacks import add_records
from llava_uhd.train.report import write_report
from llava_uhd.train.setup import (
    computing,
    deepspeed_config,
    training_arguments,
    weight_dtype,
    world_size,
)
from llava_uhd.train.sharding import built_whole
from llava_uhd.train.stages import apply_stage, part_reports
from llava_uhd.train.start import console, is_first_rank, parse, part_ways, say
from llava_uhd.train.trainer import StageTrainer


def main() -> int:
    """Runs one stage from its recipe to its output folder."""
    recipe = parse("llava_uhd.train", "Train one stage.")
    deepspeed, packed = deepspeed_config(recipe), recipe.data.batching == "packed"
    arguments = training_arguments(recipe, deepspeed, rows=1 if packed else None)
    if is_finished(recipe):
        say(f"{recipe.output_dir} is finished: nothing to do. Remove it to train again.")
        return 0
    # Everything that can be wrong with the inputs is found before the model is loaded.
    check_optimizer(arguments, deepspeed)
    check_schedule(arguments)
    check_loss(recipe.trainer.loss, arguments)
    check_parts(recipe.model)
    # The first process draws data and writes files; the others then find them complete.
    with arguments.main_process_first(local=False):
        records, held = open_split(use_embedded(recipe).data)
        if not packed:  # the number of rows is not known yet
            check_length(recipe.compression, RunLength.planned(arguments, len(records)))
        folder = prepare_output(recipe)
        checkpoint = last_complete_checkpoint(folder) if is_first_rank() else None
        if is_first_rank():
            write_data_manifest(records, folder, checkpoint is not None, held)
    checkpoint = agreed(checkpoint)
    set_seed(arguments.seed)
    dtype, kept = weight_dtype(recipe, deepspeed), storage(recipe, arguments, deepspeed)
    with built_whole(arguments):
        parts = assemble(recipe.model, recipe.compression, dtype, demo_tokenizer, **kept)
    add_adapters(parts.model, recipe.lora)
    apply_stage(parts.model, recipe.stage)
    finish_adapters(parts.model, recipe.lora, arguments)
    keep_masters(parts.model, arguments)
    dataset = ConversationDataset(records, parts.processor, recipe.data, arguments.seed)
    announce(recipe, arguments, parts, dataset)
    preview(dataset, console if is_first_rank() else None)
    samples: ConversationDataset | PackedSamples = dataset
    if packed:
        samples = pack(recipe, arguments, parts.model.config, dataset, folder, bool(checkpoint))
        arguments = training_arguments(recipe, deepspeed, rows_of_device(samples.packing))
    announce_batches(recipe, arguments, parts, samples)
    evaluated = held_out_dataset(held, parts.processor, recipe, arguments.seed)
    trainer = build_trainer(recipe, arguments, parts, samples, folder, evaluated)
    if checkpoint is not None:
        say(f"Going on from {checkpoint}")
    if not trainer.run(checkpoint):
        return stopped(trainer)
    trainer.finish()
    with told_of_the_disk(folder):
        conclude(recipe, trainer, folder)
    part_ways()
    return 0


def learns_only_projector(recipe: Recipe, parts: Assembled) -> bool:
    """Whether the result is a projector file: the rest can be found again where it came from."""
    recorded = isinstance(recipe.model.language_model, str) and isinstance(
        recipe.model.vision_tower, str
    )
    return recorded and set(recipe.stage.learn) <= {"projector", *UPSAMPLER_PARTS}


def announce(
    recipe: Recipe, arguments: TrainingArguments, parts: Assembled, dataset: ConversationDataset
) -> None:
    """Says what will be trained, on what, and at which rates."""
    table = Table(title=f"{recipe.name}: stage {recipe.stage.name}", title_justify="left")
    for heading in ("part", "learning", "of", "rate"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in part_reports(parts.model, recipe.stage, arguments.learning_rate):
        rate = "frozen" if part.rate is None else f"{part.rate:g}"
        table.add_row(part.name, f"{part.learning:,}", f"{part.total:,}", rate)
    if is_first_rank():
        console.print(table)
        if not is_plain(dataset.records):
            console.print(source_table(dataset.records))


def announce_batches(
    recipe: Recipe,
    arguments: TrainingArguments,
    parts: Assembled,
    samples: ConversationDataset | PackedSamples,
) -> None:
    """Says how large the steps are, where the result goes and which stages the steps pass.

    Raises:
        UserError: see `check_length` and `announce_compression`.
    """
    per_device, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else arguments.device.type
    if isinstance(samples, PackedSamples):
        announce_rows(samples.packing, device)
        say(f"writing to {recipe.output_dir}")
        length = RunLength.planned(arguments, samples.packing.num_rows)
    else:
        say(
            f"{len(samples):,} samples; global batch {per_device * steps * world_size()} = "
            f"{per_device} per device x {steps} accumulated x {world_size()} devices ({device}); "
            f"writing to {recipe.output_dir}"
        )
        length = RunLength.planned(arguments, len(samples))
    check_length(recipe.compression, length)
    packing = samples.packing if isinstance(samples, PackedSamples) else None
    slots = None if packing is None else packing.budget
    dataset = samples if isinstance(samples, ConversationDataset) else samples.samples
    whole = not (recipe.lora.enabled or learns_only_projector(recipe, parts))
    preflight(recipe, arguments, parts.model, dataset, length, whole, slots)
    announce_compression(recipe.compression, parts.model, length)


def build_trainer(
    recipe: Recipe,
    arguments: TrainingArguments,
    parts: Assembled,
    dataset: ConversationDataset | PackedSamples,
    folder: Path,
    held_out: ConversationDataset | None = None,
) -> StageTrainer:
    """The trainer of one stage.

    Raises:
        UserError: arguments that the library refuses.
    """
    pad = parts.processor.tokenizer.pad_token_id or 0
    collate = Collator(pad, isinstance(dataset, PackedSamples))
    try:
        trainer = StageTrainer(
            recipe=recipe,
            only_projector=learns_only_projector(recipe, parts),
            lora=lora_run(recipe, parts),
            model=parts.model,
            args=arguments,
            held_out=None if held_out is None else HeldOut(held_out, collate, folder),
            train_dataset=dataset,
            eval_dataset=held_out,
            data_collator=Counting(
                collate,
                parts.model.config,
                compresses=recipe.compression.method != "none",
            ),
            processing_class=parts.processor,
            callbacks=[JsonLog(folder)],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        # A logger that is not installed, an evaluation without data, ...
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    add_records(trainer, folder)
    say(computing(arguments, trainer.model.get_decoder().config._attn_implementation))
    return trainer


def conclude(recipe: Recipe, trainer: StageTrainer, folder: Path) -> None:
    """Writes manifest and loss curve, and says how the run ended."""
    if not is_first_rank():
        return
    losses = [entry for entry in read_log(folder) if "loss" in entry]
    draw_loss({recipe.name: folder}, folder / CURVE_FILE)
    write_manifest(
        folder,
        kind=KIND if trainer.lora else "projector" if trainer.only_projector else "model",
        stage=recipe.stage.name,
        recipe=recipe.name,
        language_model=recipe.model.language_model,
        vision_tower=recipe.model.vision_tower,
        checkpoint=recipe.model.checkpoint,
        upsampler=recipe.model.upsampler_file,
        template=recipe.model.template,
        steps=trainer.state.global_step,
        final_loss=losses[-1]["loss"] if losses else None,
        data=trainer.train_dataset.counts,
        finished=True,
    )
    write_report([folder])
    for name, count in trainer.train_dataset.counts.items():
        if count and name != "samples":
            say(f"{name.replace('_', ' ')}: {count}")
    if losses:
        say(f"final loss {losses[-1]['loss']} after {trainer.state.global_step} steps: {folder}")
    if not losses:
        raise UserError(f"{folder}: no loss was logged: lower trainer.logging_steps")


if __name__ == "__main__":
    command(main)
