"""Checkpoints that are whole or not there: written aside, sealed, then given their name.

Everything is written into the folder ``unfinished`` inside the output folder, and only renamed into
its place when all processes are done and the disk has it. Whatever lies in ``unfinished`` is
worthless after a kill and is removed at the next start. The seal, ``complete.json``, lists files,
sizes and digests; nothing is loaded whose files are not those of its seal.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from llava_uhd.checkpoint.manifest import write_whole
from llava_uhd.checkpoint.weights import read_json
from llava_uhd.errors import UserError

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished"
SEAL_FILE = "complete.json"
UNREADABLE = "unreadable"
# Larger files are known by their ends: reading all of a large checkpoint twice would take minutes.
DIGESTED_WHOLE = 64 * 2**20
DIGESTED_ENDS = 2**20
_NAME = re.compile(r"checkpoint-(\d+)")


def digest(path: Path) -> str:
    """SHA-256 of a file, or of its first and last MiB if it is larger than 64 MiB."""
    found = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size > DIGESTED_WHOLE:
            found.update(stream.read(DIGESTED_ENDS))
            stream.seek(size - DIGESTED_ENDS)
        while piece := stream.read(DIGESTED_ENDS):
            found.update(piece)
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL_FILE)


def to_disk(path: Path) -> None:
    """Waits until the disk has a file or the names in a folder (where the file system can tell)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems have no such call for folders.
        if not path.is_dir():
            raise
        logger.debug("%s: %s", path, error)
    finally:
        os.close(handle)


def seal(folder: Path, **facts: Any) -> None:
    """Writes the list of a folder's files, after the disk has them.

    Args:
        folder: with all of its files written.
        **facts: that stand in the seal too: ``step`` and ``ranks`` of a checkpoint.
    """
    listed = {}
    for path in _files(folder):
        to_disk(path)
        name = path.relative_to(folder).as_posix()
        listed[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    values = {"format": 1, **facts, "files": listed}
    write_whole(folder / SEAL_FILE, json.dumps(values, indent=1) + "\n")
    to_disk(folder)


def problem(folder: Path) -> str | None:
    """Why a sealed folder cannot be trusted; None if all of its files are as they were written."""
    try:
        listed = read_json(folder / SEAL_FILE)["files"]
    except (UserError, KeyError) as error:
        missing = not (folder / SEAL_FILE).is_file()
        return f"it has no {SEAL_FILE}" if missing else str(error)
    for name, facts in listed.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes, not the {facts['bytes']} that were written"
            if digest(path) != facts["sha256"]:
                return f"{name} is not what was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints of a run, oldest first; not looked into."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def newest(folder: Path) -> Path | None:
    """The checkpoint that a run goes on from, as far as names tell."""
    found = [path for _, path in checkpoints(folder) if (path / SEAL_FILE).is_file()]
    return found[-1] if found else None


def remove_unfinished(folder: Path) -> None:
    """Removes what a kill left in the middle of writing or removing."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Takes a checkpoint that cannot be trusted out of the way, with all that is in it."""
    target = path.with_name(f"{UNREADABLE}-{path.name}")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{UNREADABLE}-{number}-{path.name}")
    path.rename(target)
    return target


def last_whole(folder: Path) -> Path | None:
    """Newest checkpoint whose files are all as they were written.

    Newer ones that are not are set aside with a warning, because the run will write their steps
    again.
    """
    remove_unfinished(folder)
    for _, path in reversed(checkpoints(folder)):
        reason = problem(path)
        if reason is None:
            return path
        target = set_aside(path)
        logger.warning("%s cannot be used: %s; it is kept as %s", path, reason, target.name)
    return None


def publish(source: Path, target: Path) -> None:
    """Gives a sealed folder its name, in one step."""
    source.rename(target)
    to_disk(target.parent)


def rotate(folder: Path, keep: int | None, best: str | None = None) -> None:
    """Removes the oldest checkpoints.

    A checkpoint first leaves its name, so that a kill in between leaves no half of one there.

    Args:
        folder: output folder.
        keep: how many stay; None or 0: all.
        best: one that stays in any case.
    """
    if not keep or keep < 0:
        return
    found = [path for _, path in checkpoints(folder)]
    protected = {found[-1].resolve()} if found else set()
    if best is not None:
        protected.add(Path(best).resolve())
    surplus = len(found) - max(keep, len(protected))
    for path in [each for each in found if each.resolve() not in protected][: max(surplus, 0)]:
        leaving = folder / UNFINISHED / f"removed-{path.name}"
        leaving.parent.mkdir(exist_ok=True)
        path.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def publish_result(source: Path, folder: Path) -> None:
    """Moves the files of a finished stage into the output folder.

    Weights come last, their index last of all: a folder that has weights has all that belongs to
    them. That the stage is finished is written by the manifest, after this.

    Args:
        source: folder with the files, inside ``unfinished``.
        folder: output folder.
    """
    for path in _files(source):
        to_disk(path)

    def rank(path: Path) -> tuple[int, str]:
        weights = path.suffix in (".safetensors", ".bin")
        return (2 if path.name.endswith(".index.json") else int(weights)), path.name

    for path in sorted(source.iterdir(), key=rank):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    to_disk(folder)
    source.rmdir()
