"""``report.html`` of a training run: what it did, in one page without anything beside it.

::

    python -m llava_uhd.train.report FOLDER [FOLDER2 ...] [--out FILE]

writes it for any output folder, or for several side by side.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llava_uhd.checkpoint.manifest import read_manifest, write_whole
from llava_uhd.checkpoint.weights import read_json
from llava_uhd.config.typed import load_yaml
from llava_uhd.errors import UserError, command
from llava_uhd.page import render
from llava_uhd.train.drawn import DATA_FILE
from llava_uhd.train.heldout_page import read_answers
from llava_uhd.train.log import LOG_FILE
from llava_uhd.train.record import SECRET
from llava_uhd.train.report_figures import Run, charts, flat_recipe, summary, times
from llava_uhd.train.start import console

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
RECIPE = "recipe.yaml"


def main() -> None:
    """Command line, see the module's first lines."""
    parser = argparse.ArgumentParser(
        prog="python -m llava_uhd.train.report", description="Write the report of training runs."
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="output folder of a run")
    parser.add_argument("--out", metavar="FILE", help="page to write; default: in the first folder")
    options = parser.parse_args()
    folders = [Path(each) for each in options.folders]
    for folder in folders:
        if not (folder / LOG_FILE).is_file():
            raise UserError(f"{folder} has no {LOG_FILE}: name the output folder of a training run")
    name = REPORT_FILE if len(folders) == 1 else "comparison.html"
    target = Path(options.out) if options.out else folders[0] / name
    try:
        write_report(folders, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
    console.print(str(target), soft_wrap=True)


def write_report(folders: Sequence[Path], target: Path | None = None) -> Path:
    """Writes the page.

    Args:
        folders: output folders of runs, finished or not.
        target: file to write; None: `REPORT_FILE` in the first folder.

    Returns:
        The file.
    """
    runs = [Run.read(folder, name) for folder, name in zip(folders, _names(folders))]
    conventions = {run.record["flop_convention"] for run in runs if "flop_convention" in run.record}
    page = render(
        "training.html",
        title="Training report" if len(runs) == 1 else f"{len(runs)} runs side by side",
        lead=", ".join(f"{run.name} in {run.folder}" for run in runs),
        runs=[_shown(run) for run in runs],
        summary=summary(runs),
        charts=charts(runs),
        times=times(runs),
        convention=" ".join(sorted(conventions)),
        differences=_differences(runs) if len(runs) > 1 else [],
    )
    target = target or folders[0] / REPORT_FILE
    write_whole(target, page)
    return target


def _names(folders: Sequence[Path]) -> list[str]:
    """Recipe names, or folder names where recipes have the same."""
    recipes = [str(read_manifest(f).get("recipe") or _recipe(f).get("name") or "") for f in folders]
    if len(set(recipes)) == len(folders) and all(recipes):
        return recipes
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(folders) else [str(folder) for folder in folders]


def _recipe(folder: Path) -> dict[str, Any]:
    path = folder / RECIPE
    return load_yaml(path) if path.is_file() else {}


def _shown(run: Run) -> dict[str, Any]:
    """A run as the page writes it."""
    starts = [_shown_start(start) for start in run.record.get("starts", [])]
    last = run.record.get("starts", [{}])[-1:] or [{}]
    data = read_json(run.folder / DATA_FILE) if (run.folder / DATA_FILE).is_file() else {}
    manifest = read_manifest(run.folder)
    answers = read_answers(run.folder)
    return {
        "name": run.name,
        "samples": run.samples,
        "answers": answers[-1] if answers else None,
        "starts": starts,
        "peak": last[0].get("peak", {}).get("source"),
        "last_start": _json(last[0]),
        "data": _json(data.get("sources")) if data else None,
        "data_title": f"{data.get('samples', 0):,} samples, sha256 {data.get('sha256')}",
        "manifest": _json(manifest) if manifest else None,
        "recipe": _recipe_text(run.folder),
    }


def _recipe_text(folder: Path) -> str | None:
    recipe = _recipe(folder)
    if not recipe:
        return None
    trainer = recipe.get("trainer")
    if isinstance(trainer, dict):
        recipe["trainer"] = {
            key: "(left out)" if SECRET.search(key) and isinstance(value, str) else value
            for key, value in trainer.items()
        }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _shown_start(start: dict[str, Any]) -> dict[str, Any]:
    hosts: dict[str, dict[str, int]] = {}
    for rank in start.get("ranks", []):
        names = hosts.setdefault(str(rank.get("host")), {})
        names[str(rank.get("name"))] = names.get(str(rank.get("name")), 0) + 1
    words = [
        f"{host}: " + ", ".join(f"{count} x {name}" for name, count in names.items())
        for host, names in hosts.items()
    ]
    code = start.get("code", {})
    commit, changed = code.get("commit"), code.get("changed")
    text = str(code.get("version", ""))
    if commit:
        text += f", commit {commit[:10]}{', with changes' if changed else ''}"
    return {**start, "hosts": "; ".join(words), "code_text": text}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def _differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Keys whose values are not the same in all recipes."""
    flat = [flat_recipe(_recipe(run.folder)) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = []
    for key in keys:
        values = ["" if key not in each else str(each[key]) for each in flat]
        if len(set(values)) > 1 and key != "trainer.output_dir" and not SECRET.search(key):
            rows.append({"name": key, "values": values})
    return rows


class ReportCallback(TrainerCallback):
    """Writes the report at each checkpoint.

    Args:
        folder: output folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes it; a run does not end because its report could not be written."""
        if not state.is_world_process_zero:
            return
        try:
            write_report([self.folder])
        except OSError as error:
            logger.warning("%s was not written: %s", self.folder / REPORT_FILE, error)


if __name__ == "__main__":
    command(main)
