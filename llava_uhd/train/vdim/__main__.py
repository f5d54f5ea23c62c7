"""``python -m llava_uhd.train.vdim RECIPE [--section.key value ...]``: pre-trains an upsampler."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments, set_seed
from transformers.utils import logging as library_logging

from llava_uhd.checkpoint.manifest import write_manifest
from llava_uhd.config.recipe import list_recipes
from llava_uhd.config.vdim import VDIM_RECIPES, VdimRecipe, load_vdim_recipe
from llava_uhd.errors import UserError, command
from llava_uhd.train.guarded import stopped, told_of_the_disk
from llava_uhd.train.log import JsonLog, read_log
from llava_uhd.train.optimizers import check_schedule
from llava_uhd.train.output import agreed, is_finished, last_complete_checkpoint, prepare_output
from llava_uhd.train.setup import training_arguments, world_size
from llava_uhd.train.start import part_ways
from llava_uhd.train.vdim.build import build_module, build_transform, load_result, tower_name
from llava_uhd.train.vdim.data import Pictures, PictureSet, open_pictures, stack_pictures
from llava_uhd.train.vdim.measure import measure
from llava_uhd.train.vdim.module import VdimModule
from llava_uhd.train.vdim.pictures import draw_curves
from llava_uhd.train.vdim.report import measure_table, write_report
from llava_uhd.train.vdim.trainer import VdimTrainer

console = Console(highlight=False)

CURVE_FILE = "loss.png"


def main() -> int:
    """Runs one pre-training from its recipe to its output folder."""
    recipe, finished = parse()
    arguments = vdim_arguments(recipe)
    check_schedule(arguments)
    if finished is not None:
        console.print(measure_table(measure_finished(recipe, arguments, finished)))
        return 0
    if is_finished(recipe):
        say(f"{recipe.output_dir} is finished: nothing to do. Remove it to train again.", arguments)
        return 0
    pictures = open_pictures(recipe.data)
    # The pictures of the measurement at the end: a broken one is found now, not after the training.
    for group in pictures.held_out.values():
        for source in group:
            source.open()
    set_seed(arguments.seed)
    module = build_module(recipe)
    with arguments.main_process_first(local=False):
        folder = prepare_output(recipe)
        checkpoint = last_complete_checkpoint(folder) if arguments.process_index == 0 else None
    checkpoint = agreed(checkpoint)
    announce(recipe, arguments, module, pictures)
    trainer = build_trainer(recipe, arguments, module, pictures, folder)
    if checkpoint is not None:
        say(f"Going on from {checkpoint}", arguments)
    if not trainer.run(checkpoint):
        return stopped(trainer)
    trainer.finish(tower_name(recipe))
    with told_of_the_disk(folder):
        conclude(recipe, trainer, folder)
    part_ways()
    return 0


def parse() -> tuple[VdimRecipe, Path | None]:
    """Reads the command line: recipe, and the folder of ``--measure``."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.train.vdim",
        description="Pre-train an upsampler (VDIM). Any recipe key can be overridden: "
        "--vdim.n_jitters 5",
        epilog="Recipes: " + ", ".join(list_recipes(VDIM_RECIPES.prefix)),
    )
    parser.add_argument("recipe", help="name of a recipe, or a YAML file")
    parser.add_argument(
        "--measure",
        metavar="FOLDER",
        type=Path,
        help="train nothing: measure the result of a finished run on the recipe's held-out "
        "pictures; its recipe is FOLDER/recipe.yaml",
    )
    known, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    library_logging.set_verbosity_error()
    return load_vdim_recipe(known.recipe, overrides), known.measure


def vdim_arguments(recipe: VdimRecipe) -> TrainingArguments:
    """The library's arguments.

    Raises:
        UserError: the global batch cannot be shared by the devices.
    """
    arguments = training_arguments(recipe, None)
    arguments.label_names = []
    # Every parameter that learns is part of every loss.
    arguments.ddp_find_unused_parameters = False
    if arguments.process_index > 0:
        logging.getLogger().setLevel(logging.ERROR)
    return arguments


def measure_finished(
    recipe: VdimRecipe, arguments: TrainingArguments, folder: Path
) -> list[dict[str, Any]]:
    """Measures the upsampler and the heads of a finished run.

    Raises:
        UserError: there is no such result, or it is of another tower or recipe.
    """
    module = build_module(recipe)
    load_result(module, folder)
    groups = open_pictures(recipe.data).held_out
    return measure(
        module.to(arguments.device),
        groups,
        build_transform(recipe, module),
        arguments.per_device_train_batch_size,
        arguments.seed,
    )


def say(text: str, arguments: TrainingArguments) -> None:
    """Prints on the first process."""
    if arguments.process_index == 0:
        console.print(text, soft_wrap=True)


def announce(
    recipe: VdimRecipe, arguments: TrainingArguments, module: VdimModule, pictures: PictureSet
) -> None:
    """Says what will be trained, on what."""
    if arguments.process_index > 0:
        return
    table = Table(title=f"{recipe.name}: {recipe.vdim.scale}x upsampler", title_justify="left")
    for heading in ("part", "learning", "of"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, part in (
        ("tower", module.features),
        ("upsampler", module.upsampler),
        *((f"head {name}", head) for name, head in module.heads.items()),
    ):
        total = sum(p.numel() for p in part.parameters())
        learning = sum(p.numel() for p in part.parameters() if p.requires_grad)
        table.add_row(name, f"{learning:,}", f"{total:,}")
    console.print(table)
    per_device, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else arguments.device.type
    held_out = ", ".join(f"{len(group)} {name}" for name, group in pictures.held_out.items())
    say(
        f"{len(pictures.train):,} pictures of {recipe.data.res} x {recipe.data.res} pixels "
        f"(measured on {held_out}); global batch {per_device * steps * world_size()} = "
        f"{per_device} per device x {steps} accumulated x {world_size()} devices ({device}), "
        f"{recipe.vdim.n_jitters} views each; writing to {recipe.output_dir}",
        arguments,
    )


def build_trainer(
    recipe: VdimRecipe,
    arguments: TrainingArguments,
    module: VdimModule,
    pictures: PictureSet,
    folder: Path,
) -> VdimTrainer:
    """The trainer.

    Raises:
        UserError: arguments that the library refuses.
    """
    transform = build_transform(recipe, module)
    try:
        return VdimTrainer(
            recipe=recipe,
            pictures=pictures,
            transform=transform,
            model=module,
            args=arguments,
            train_dataset=Pictures(pictures.train, transform, arguments.seed),
            data_collator=stack_pictures,
            callbacks=[JsonLog(folder)],
        )
    except (ValueError, ImportError, RuntimeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def conclude(recipe: VdimRecipe, trainer: VdimTrainer, folder: Path) -> None:
    """Measures, draws, writes the manifest, and says how the run ended."""
    arguments = trainer.args
    step = trainer.state.global_step
    trainer.draw(step)
    rows = trainer.measure(step)
    if arguments.process_index > 0:
        return
    losses = [entry for entry in read_log(folder) if "loss" in entry]
    if not losses:
        raise UserError(f"{folder}: no loss was logged: lower trainer.logging_steps")
    draw_curves(losses, folder / CURVE_FILE)
    write_report(recipe, rows, step, folder)
    write_manifest(
        folder,
        kind="vdim",
        stage="vdim",
        recipe=recipe.name,
        vision_tower=tower_name(recipe),
        width=trainer.model.features.width,
        scale=recipe.vdim.scale,
        steps=step,
        final_loss=losses[-1]["loss"],
        measured=rows,
        finished=True,
    )
    console.print(measure_table(rows))
    say(f"final loss {losses[-1]['loss']} after {step} steps: {folder}", arguments)


if __name__ == "__main__":
    command(main)
