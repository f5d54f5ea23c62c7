"""The output folder of a run: what it is, whether it is done, where it goes on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from llava_uhd.checkpoint.manifest import read_manifest, write_whole
from llava_uhd.config.resolved import Resolved
from llava_uhd.config.typed import load_yaml
from llava_uhd.errors import UserError
from llava_uhd.train.saving import SEAL_FILE, last_whole, newest
from llava_uhd.train.start import is_first_rank

RECIPE_FILE = "recipe.yaml"

# Changing these between a kill and the next start does not change what is computed.
_HARMLESS = (
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "save_strategy",
    "report_to",
    "dataloader_num_workers",
    "disable_tqdm",
    "max_grad_norm_stop",
    "check_room",
    "loss",  # another order of adding, nothing else
    "output_dir",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
)
# So is what only decides whether and how a run starts.
_HARMLESS_DATA = ("preview", "max_unlearned", "holdout_samples")


def _comparable(values: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(json.dumps(values, default=str))
    for key in _HARMLESS:
        values.get("trainer", {}).pop(key, None)
    for key in _HARMLESS_DATA:
        (values.get("data") or {}).pop(key, None)
    values.pop("name", None)
    return values


def _filled(path: Path, recipe: Resolved) -> dict[str, Any]:
    """A written recipe, with the defaults of keys that did not exist yet when it was written."""
    written = load_yaml(path)
    try:
        return type(recipe).from_dict(written).to_dict()
    except UserError:
        return written


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested recipes, with both values."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {old}, is {new}")
    return found


def is_finished(recipe: Resolved) -> bool:
    """Whether this very run has written its result already.

    A run that left neither a result nor a checkpoint is forgotten: nothing of it would be mixed
    into this one.

    Raises:
        UserError: the output folder holds a run with other settings.
    """
    folder = Path(recipe.output_dir)
    path = folder / RECIPE_FILE
    finished = bool(read_manifest(folder).get("finished"))
    begun = finished or newest(folder) is not None
    if begun and path.is_file():
        changed = differences(_comparable(_filled(path, recipe)), _comparable(recipe.to_dict()))
        if changed:
            raise UserError(
                f"{folder} holds a run with other settings ({'; '.join(changed[:4])}): set "
                "--trainer.output_dir to a new folder, or remove this one"
            )
    return finished


def prepare_output(recipe: Resolved) -> Path:
    """Makes the output folder and writes the resolved recipe (the first process does).

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(recipe.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if is_first_rank():
            write_whole(folder / RECIPE_FILE, recipe.to_yaml())
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be written: {error}") from error
    return folder


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Newest ``checkpoint-N`` whose files are all as they were written.

    Newer ones are set aside with a warning; what a kill left half-written is removed. For the first
    process only; `agreed` tells the others.
    """
    return last_whole(folder)


def agreed(checkpoint: Path | None) -> Path | None:
    """The first process's checkpoint, on every process.

    Raises:
        UserError: a process does not see it.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return checkpoint
    told: list[Path | None] = [checkpoint]
    torch.distributed.broadcast_object_list(told)
    if told[0] is not None and not (told[0] / SEAL_FILE).is_file():
        raise UserError(
            f"{told[0]} is not there on {platform.node()}: trainer.output_dir must be a folder "
            "that all machines share"
        )
    return told[0]
