"""``python -m llava_uhd.merge_lora LORA_DIR --out DIR``: an adapter merged into its base.

Reads an output folder of LoRA or QLoRA training, ours or a published one, and writes a whole model
folder of ours. The base is read unquantised, whatever the training kept it in: merging into rounded
weights would round twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transformers.utils import logging as library_logging

from llava_uhd.checkpoint.load import parse_dtype
from llava_uhd.checkpoint.lora_merge import merge_folder
from llava_uhd.checkpoint.sources import find_checkpoint, resolve_folder
from llava_uhd.errors import command


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.merge_lora",
        description="Merges the adapter of a LoRA folder into its base and writes a whole model.",
    )
    parser.add_argument("lora", metavar="LORA_DIR", help="folder, name of a run, or hub id")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="new or empty")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="what the adapter was trained on: a language model or a whole multimodal checkpoint; "
        "as recorded without it",
    )
    parser.add_argument("--vision-tower", metavar="DIR", help="as recorded without it")
    parser.add_argument("--dtype", help="of the written weights; that of the base without it")
    return parser


def main() -> int:
    """Merges one adapter."""
    options = make_parser().parse_args()
    if not sys.stderr.isatty():
        library_logging.disable_progress_bar()
    folder = resolve_folder(find_checkpoint(options.lora), "LoRA folder")
    dtype = None if options.dtype is None else parse_dtype(options.dtype)
    merge_folder(folder, options.out, options.base, options.vision_tower, dtype)
    print(f"{folder} -> {options.out}")
    return 0


if __name__ == "__main__":
    command(main)
