"""``python -m llava_uhd.convert CHECKPOINT [DIR] --to LAYOUT``: another layout, same model.

Writes a checkpoint as a published system has it on disk (weight names, ``config.json``, tokenizer
files), or as transformers' own classes read it, so that tools made for those read it; or a
published checkpoint as ours. Afterwards the logits of both are compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava_uhd.checkpoint.export import TARGETS, ExportOptions, export_checkpoint
from llava_uhd.checkpoint.load import parse_dtype
from llava_uhd.checkpoint.sources import find_checkpoint, resolve_folder
from llava_uhd.errors import UserError, command


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.convert",
        description="Writes a checkpoint in a published layout, or a published one in ours.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, name of a run, or hub id")
    parser.add_argument("target", metavar="DIR", nargs="?", type=Path, help="new or empty")
    parser.add_argument(
        "--to",
        required=True,
        metavar="LAYOUT",
        help=f"{', '.join(TARGETS)} (the layout of the system that the model belongs to)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the same as the second word")
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
    parser.add_argument("--max-shard", metavar="SIZE", help="of the largest file of weights (5GB)")
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not load both models and compare their logits afterwards",
    )
    return parser


def main() -> int:
    """Converts one checkpoint and tells what the new layout leaves unsaid."""
    options = make_parser().parse_args()
    if (options.target is None) == (options.out is None):
        raise UserError("name one folder to write: as the second word, or with --out")
    out = options.out or options.target
    source = resolve_folder(find_checkpoint(options.checkpoint), "checkpoint")
    keep = options.keep_unused
    done = export_checkpoint(
        source,
        options.to,
        out,
        ExportOptions(
            keep_unused=None if keep is None else resolve_folder(keep, "--keep-unused"),
            tokenizer=options.tokenizer,
            vision_tower=options.vision_tower,
            dtype=None if options.dtype is None else parse_dtype(options.dtype),
            max_shard=options.max_shard,
            check=not options.no_check,
        ),
    )
    for note in done.notes:
        print(f"note: {note}")
    if done.agreement is not None:
        print(f"checked: {done.agreement}")
    print(f"{source} -> {out} ({done.layout})")
    return 0


if __name__ == "__main__":
    command(main)
