"""What a run is trained on: a table before it starts, and a file in its output folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rich.table import Table

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.checkpoint.weights import read_json
from llava_uhd.data.drawn import data_manifest
from llava_uhd.data.records import Records
from llava_uhd.errors import UserError

DATA_FILE = "data_manifest.json"

# What makes a source another one; its path may change.
CONTENT = ("total", "drawn", "left_out", "file_sha256", "ids_sha256", "samples")


def write_data_manifest(
    records: Records, folder: Path, going_on: bool = False, held_out: Records | None = None
) -> None:
    """Writes `DATA_FILE`.

    Args:
        records: of the run.
        folder: its output folder.
        going_on: the run goes on from a checkpoint in that folder.
        held_out: records that are evaluated instead.

    Raises:
        UserError: it goes on, but the data are not what they were.
    """
    now = data_manifest(records.drawn)
    if held_out is not None:
        places = "".join(f"{held_out.place(index)}\n" for index in range(len(held_out)))
        digest = hashlib.sha256(places.encode("utf-8", "surrogatepass")).hexdigest()
        now |= {"samples": len(records), "held_out": len(held_out), "held_out_sha256": digest}
    path = folder / DATA_FILE
    if going_on and path.is_file():
        changed = _changed(read_json(path), now)
        if changed:
            raise UserError(
                f"{folder} has a checkpoint to go on from, but the data have changed since it was "
                f"written ({changed}): bring them back, or set --trainer.output_dir to a new folder"
            )
    write_whole(path, json.dumps(now, indent=2, ensure_ascii=False) + "\n")


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Names the first difference of two manifests; empty if there is none."""
    old, new = before.get("sources", []), now["sources"]
    if len(old) != len(new):
        return f"{len(old)} sources were read, now {len(new)}"
    for one, other in zip(old, new, strict=True):
        for name in CONTENT:
            if one.get(name) != other.get(name):
                return f"{name} of {other['path']} was {one.get(name)}, is {other.get(name)}"
    if before.get("held_out_sha256") != now.get("held_out_sha256"):
        return "other samples are held out"
    return ""


def is_plain(records: Records) -> bool:
    """Whether there is nothing to tell: one file, all of it."""
    return len(records.drawn) == 1 and records.drawn[0].source.strategy == "all"


def source_table(records: Records) -> Table:
    """One line per source: how many of its records are drawn."""
    table = Table(title="data", title_justify="left")
    for heading in ("file", "strategy", "seed", "records", "drawn", "left out"):
        justify = "left" if heading in ("file", "strategy") else "right"
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for each in records.drawn:
        source = each.source
        seed = str(source.seed) if source.strategy.startswith("random") else ""
        counts = [f"{number:,}" for number in (each.total, each.drawn, each.left_out)]
        table.add_row(str(source.path), source.strategy, seed, *counts)
    if len(records.drawn) > 1:
        sums = (
            sum(getattr(each, key) for each in records.drawn)
            for key in ("total", "drawn", "left_out")
        )
        table.add_section()
        table.add_row("all", "", "", *(f"{number:,}" for number in sums))
    return table
