"""Samples that are kept from training, to evaluate on them."""

from __future__ import annotations

import dataclasses
import hashlib
import math

from llava_uhd.config.data import DataConfig
from llava_uhd.data.reading import open_records
from llava_uhd.data.records import Records
from llava_uhd.errors import UserError


def open_split(config: DataConfig) -> tuple[Records, Records | None]:
    """Records to train on, and those that are held out; None: there are none.

    Raises:
        UserError: see `llava_uhd.data.reading.read_records`; nothing would be left to train on.
    """
    records = open_records(config)
    if config.holdout_path is not None:
        held = dataclasses.replace(config, path=config.holdout_path, holdout_path=None)
        return records, open_records(held)
    if config.holdout is None:
        return records, None
    return hold_out(records, config.holdout)


def hold_out(records: Records, amount: float) -> tuple[Records, Records]:
    """Divides records, in the same way in every run and on every machine.

    Records of the same image (of the same id, where there is none) stay together, so that no image
    is seen on both sides; the last of them may make the number a little larger. Which ones are held
    out depends on their names alone: more of them hold the fewer.

    Args:
        records: all of them.
        amount: a share below 1, or a number.

    Returns:
        Records to train on, and those held out, each once.

    Raises:
        UserError: nothing would be left to train on.
    """
    groups: dict[bytes, list[int]] = {}
    single: dict[int, int] = {}  # of repeated records the first
    for index in range(len(records)):
        single.setdefault(records.row_of(index), index)
        name = hashlib.sha256(records.key(index).encode("utf-8", "surrogatepass")).digest()
        groups.setdefault(name, []).append(index)
    wanted = math.ceil(amount * len(single)) if amount < 1 else int(amount)
    first, found = set(single.values()), 0
    held: set[int] = set()
    for name in sorted(groups):
        if found >= wanted:
            break
        held.update(groups[name])
        found += sum(index in first for index in groups[name])
    kept = [index for index in range(len(records)) if index not in held]
    if not kept:
        raise UserError(
            f"data.holdout {amount:g} leaves nothing of {len(single)} records to train on: lower it"
        )
    return records.take(kept), records.take(sorted(held & first))
