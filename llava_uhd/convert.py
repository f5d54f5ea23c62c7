"""``python -m llava_uhd.convert CHECKPOINT --to LAYOUT --out DIR``: another layout, same model.

Writes a checkpoint as a published system has it on disk (weight names, ``config.json``, tokenizer
files), so that tools made for that system read it; or a published checkpoint as ours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_uhd.checkpoint.export import TARGETS, ExportOptions, export_checkpoint
from llava_uhd.checkpoint.load import parse_dtype
from llava_uhd.checkpoint.sources import find_checkpoint, resolve_folder
from llava_uhd.errors import command


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.convert",
        description="Writes a checkpoint in a published layout, or a published one in ours.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, name of a run, or hub id")
    parser.add_argument("--to", required=True, metavar="LAYOUT", help=", ".join(TARGETS))
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty")
    parser.add_argument(
        "--keep-unused",
        metavar="SOURCE",
        type=Path,
        help="published folder whose unused weights (a copy of the tower inside the projector, "
        "left-over parameters) are written too: the published code loads some files strictly",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="copy the tokenizer files of this folder"
    )
    parser.add_argument(
        "--vision-tower",
        metavar="NAME",
        help="path or hub id that config.json records for the vision tower",
    )
    parser.add_argument("--dtype", help="of the written weights; as they are stored without it")
    return parser


def main() -> int:
    """Converts one checkpoint and tells what the new layout leaves unsaid."""
    options = make_parser().parse_args()
    source = resolve_folder(find_checkpoint(options.checkpoint), "checkpoint")
    keep = options.keep_unused
    notes = export_checkpoint(
        source,
        options.to,
        options.out,
        ExportOptions(
            keep_unused=None if keep is None else resolve_folder(keep, "--keep-unused"),
            tokenizer=options.tokenizer,
            vision_tower=options.vision_tower,
            dtype=None if options.dtype is None else parse_dtype(options.dtype),
        ),
    )
    for note in notes:
        print(f"note: {note}")
    print(f"{source} -> {options.out} ({options.to})")
    return 0


if __name__ == "__main__":
    command(main)
