"""``python -m llava_uhd.bench COMMAND``: measurements, each with its plain form beside it.

A command is a module of this package with ``register(commands)``, which adds its parser and sets
``run``; it is listed in `COMMANDS`.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from llava_uhd.bench import compress, cost, encode, loss, pack, project, train, upsample
from llava_uhd.errors import command

COMMANDS = (encode, cost, upsample, project, compress, loss, train, pack)


def _about(module: ModuleType) -> str:
    """A description by the first paragraph of a command's module, without its name.

    Example: ```bench cost``: what a model takes.`` is ``What a model takes.``
    """
    told = " ".join((module.__doc__ or "").partition("\n\n")[0].partition("``: ")[2].split())
    return told[:1].upper() + told[1:]


def make_parser() -> argparse.ArgumentParser:
    """The command line with all subcommands."""
    parser = argparse.ArgumentParser(prog="python -m llava_uhd.bench", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.register(commands)
        added = commands.choices[module.__name__.rpartition(".")[2]]
        added.description = added.description or _about(module)
    return parser


def main() -> int:
    """Runs one subcommand and returns its status."""
    options = make_parser().parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    command(main)
