"""``llava_uhd.json``: what an output folder says about itself."""

from __future__ import annotations

import json
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from llava_uhd import __version__
from llava_uhd.checkpoint.weights import read_json

MANIFEST_FILE = "llava_uhd.json"
# Those that decide numbers; what is not installed is left out.
LIBRARIES = (
    *("llava_uhd", "torch", "transformers", "tokenizers", "accelerate", "safetensors", "deepspeed"),
    *("peft", "bitsandbytes", "flash-attn", "liger-kernel", "pillow", "numpy"),
)


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide numbers."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def code_version() -> dict[str, Any]:
    """Version of this package; from a clone also its commit, and whether files differ from it.

    Returns:
        ``version``, ``commit`` and ``changed`` (the last two None where git does not know).
    """
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    facts: dict[str, Any] = {"version": __version__, "commit": None, "changed": None}
    # Inside somebody else's repository an installed package has no commit.
    if top is None or Path(top).resolve() != root:
        return facts
    status = _git(root, "status", "--porcelain")
    changed = None if status is None else bool(status)
    return {**facts, "commit": _git(root, "rev-parse", "HEAD"), "changed": changed}


def _git(folder: Path, *words: str) -> str | None:
    """What git says, None where it is missing or says no."""
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


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
    values = {"format": 1, **facts, "code": code_version(), "versions": library_versions()}
    text = json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"
    write_whole(folder / MANIFEST_FILE, text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, empty if it has none."""
    path = folder / MANIFEST_FILE
    return read_json(path) if path.is_file() else {}
