"""``llava_uhd.json``: what an output folder says about itself."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_uhd.checkpoint.weights import read_json

MANIFEST_FILE = "llava_uhd.json"


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide numbers."""
    versions = {}
    for name in ("llava_uhd", "torch", "transformers", "tokenizers", "pillow", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is never seen half-written, whenever the process is killed."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def write_manifest(folder: Path, **facts: Any) -> None:
    """Writes the manifest of an output folder.

    Args:
        folder: exists already.
        **facts: ``kind`` ("model" or "projector"), ``stage``, ``language_model``,
            ``vision_tower``, ``template``, ``recipe``, ...
    """
    values = {"format": 1, **facts, "versions": library_versions()}
    text = json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"
    write_whole(folder / MANIFEST_FILE, text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, empty if it has none."""
    path = folder / MANIFEST_FILE
    return read_json(path) if path.is_file() else {}
