"""How a training command begins: from its words to a recipe, and which process speaks."""

from __future__ import annotations

import argparse
import logging
import os

import torch
from rich.console import Console
from transformers.utils import logging as library_logging

from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.config.training import Recipe

console = Console(highlight=False)


def parse(module: str, description: str) -> Recipe:
    """Reads the command line.

    Args:
        module: of the command.
        description: of it, for ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"{description} Any recipe key can be overridden: --trainer.max_steps 10",
        epilog="Recipes: " + ", ".join(list_recipes()),
    )
    parser.add_argument("recipe", help="name of a recipe, or a YAML file")
    known, overrides = parser.parse_known_args()
    level = logging.INFO if is_first_rank() else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    library_logging.set_verbosity_error()
    return load_recipe(known.recipe, overrides)


def is_first_rank() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Prints on the first rank."""
    if is_first_rank():
        console.print(text, soft_wrap=True)


def part_ways() -> None:
    """Ends the processes of a launch together.

    A process that leaves while others still talk to it may be aborted by the threads of its process
    group, after all work is done, and the launcher then reports a failure.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
