"""Commands about data.

::

    python -m llava_uhd.data validate RECIPE|MIXTURE.yaml|FILE [--images all|N] [--report DIR]
    python -m llava_uhd.data shard SOURCE --out DIR [--image-folder DIR] [--size 1GB]

``validate`` looks at data before a run; ``shard`` packs them into tar files that are read in place.
``docs/data.md`` describes both.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as library_logging

from llava_uhd.checkpoint.recipe_parts import read_processor
from llava_uhd.config.recipe import list_recipes, load_recipe
from llava_uhd.config.training import DataConfig, Recipe
from llava_uhd.config.typed import load_yaml
from llava_uhd.data.demo_tokenizer import build_demo_tokenizer
from llava_uhd.data.lengths import processors
from llava_uhd.data.pack_shards import Packing, pack_shards
from llava_uhd.data.synthetic import embedded_split
from llava_uhd.data.validate import Report, Sampling, validate
from llava_uhd.data.validate_report import HTML_FILE, write_report
from llava_uhd.data.validate_walk import KINDS
from llava_uhd.errors import UserError, command
from llava_uhd.text.processor import LlavaUHDProcessor

console = Console(highlight=False)

STOPS = 1  # exit status where training would stop
SHOWN = 10  # problems of a kind that are printed
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", re.IGNORECASE)


def main() -> int:
    """Command line, see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m llava_uhd.data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="validate|shard")
    _add_validate(commands.add_parser("validate", help="look at data before a run"))
    _add_shard(commands.add_parser("shard", help="pack data into tar files"))
    given, overrides = parser.parse_known_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    library_logging.set_verbosity_error()
    if given.command == "validate":
        return run_validate(given, overrides)
    if overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    return run_shard(given)


def _add_validate(parser: argparse.ArgumentParser) -> None:
    parser.description = "Recipes take overrides of their keys too: --data.path mine.json"
    parser.add_argument("source", help="recipe, YAML mixture, or data file")
    _add_folders(parser)
    parser.add_argument("--images", default="2000", metavar="all|N", help="records to decode")
    parser.add_argument("--workers", type=int, help="processes; default: the processors")
    parser.add_argument("--report", type=Path, metavar="DIR", help="default: data_report/NAME")


def _add_shard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", help="data files or YAML mixtures")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_folders(parser)
    parser.add_argument("--size", default="1GB", help="of a shard; default 1GB")
    parser.add_argument("--missing", choices=("error", "skip"), default="error",
                        help="what a record with a missing file, or a wrong one, does")  # fmt: skip


def _add_folders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-folder", metavar="DIR", help="image paths are relative to it")
    parser.add_argument("--video-folder", metavar="DIR", help="default: the image folder")


def run_validate(given: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Looks at data and writes the report.

    Returns:
        0, or `STOPS`.
    """
    config, processor, name = open_source(given, overrides)
    if given.images != "all" and not given.images.isdigit():
        raise UserError(f"--images {given.images} must be a number, or all")
    images = None if given.images == "all" else int(given.images)
    workers = processors() if given.workers is None else given.workers
    with _progress() as bar:
        task = bar.add_task("reading", total=None)

        def told(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        report = validate(config, processor, Sampling(images, max(workers, 0)), told)
    folder = given.report or Path("data_report") / name
    write_report(report, folder, name)
    _print(report)
    console.print(f"report: {folder / HTML_FILE}", soft_wrap=True)
    return STOPS if report.stops else 0


def open_source(
    given: argparse.Namespace, overrides: Sequence[str]
) -> tuple[DataConfig, LlavaUHDProcessor | None, str]:
    """What is to be looked at: data section, processor of the model, a name for the report."""
    source = given.source
    if not _is_recipe(source):
        if overrides:
            raise UserError(f"{overrides[0]}: only a recipe takes overrides")
        folders = {"image_folder": given.image_folder, "video_folder": given.video_folder}
        return DataConfig(path=source, **folders), None, re.sub(r"\W+", "_", Path(source).stem)
    recipe = load_recipe(source, overrides)
    data = _use_embedded(recipe)
    named = {
        key: getattr(given, key)
        for key in ("image_folder", "video_folder")
        if getattr(given, key) is not None
    }
    processor = read_processor(recipe.model, build_demo_tokenizer)
    return dataclasses.replace(data, **named), processor, recipe.name.replace("/", "_")


def _is_recipe(source: str) -> bool:
    if source in list_recipes():
        return True
    path = Path(source)
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
        return "datasets" not in load_yaml(path)
    return not path.suffix and not path.exists() and "*" not in source and "{" not in source


def _use_embedded(recipe: Recipe) -> DataConfig:
    data = recipe.data
    if data.embedded is None:
        return data
    split = embedded_split(data.embedded, recipe.stage.name, Path("playground/data"))
    videos = None if split.video_folder is None else str(split.video_folder)
    return dataclasses.replace(
        data,
        embedded=None,
        path=str(split.file),
        image_folder=str(split.image_folder),
        video_folder=videos,
    )


def _print(report: Report) -> None:
    """The short form of a report."""
    counts = report.counts
    console.print(
        f"{counts['records']:,} records of {counts['sources']} sources, {counts['usable']:,} "
        f"usable; {counts['files_decoded']:,} images and videos decoded",
        soft_wrap=True,
    )
    if report.tokens.get("samples"):
        total, visual = report.tokens["total"], report.tokens["visual"]
        console.print(
            f"{report.tokens['unit']} of a sample: {total['mean']:,.0f} on average, of them "
            f"{visual['mean']:,.0f} visual; the longest of {report.tokens['samples']:,} has "
            f"{total['max']:,.0f}",
            soft_wrap=True,
        )
    for kind, (title, advice) in KINDS.items():
        own = [problem for problem in report.problems if problem.kind == kind]
        if not own:
            continue
        console.print(f"{title}: {len(own):,} ({advice})", style="bold", soft_wrap=True)
        for problem in own[:SHOWN]:
            console.print(f"  {problem.line()} [{problem.outcome}]", soft_wrap=True, markup=False)
        if len(own) > SHOWN:
            console.print(f"  ... and {len(own) - SHOWN:,} more")
    if report.overlong:
        console.print(
            f"longer than data.max_length: {len(report.overlong):,}", style="bold", soft_wrap=True
        )
        for entry in report.overlong[:SHOWN]:
            console.print(
                f"  {entry['file']}, record {entry['record']} (id {entry['id']!r}): "
                f"{entry['tokens']:,} tokens [{entry['outcome']}]",
                soft_wrap=True,
                markup=False,
            )
    for note in report.notes:
        console.print(note, soft_wrap=True, markup=False)
    verdict = "training would stop" if report.stops else "nothing here would stop training"
    console.print(verdict, style="bold")


def run_shard(given: argparse.Namespace) -> int:
    """Packs data into shards."""
    match = SIZE.fullmatch(given.size)
    unit = match[2].upper() if match else ""
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--size {given.size} must be a size such as 500MB or 1GB")
    size = int(float(match[1]) * UNITS[unit if unit.endswith("B") or not unit else f"{unit}B"])
    options = Packing(
        [os.fspath(each) for each in given.source],
        given.out,
        given.image_folder,
        given.video_folder,
        max(size, 1),
        given.missing,
    )
    with _progress() as bar:
        task = bar.add_task("packing", total=None)

        def told(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        made = pack_shards(options, told)
    console.print(
        f"{given.out}: {made.samples:,} samples in {made.shards:,} shards, {made.bytes / 1e9:,.2f} "
        f"GB; {made.left_out:,} records left out. Train on them with --data.path {given.out}",
        soft_wrap=True,
    )
    return 0


def _progress() -> Progress:
    columns = (TextColumn("{task.description:.60}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


if __name__ == "__main__":
    command(main)
