"""Which model, which data, which software: what a score has to be read with."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from llava_uhd.checkpoint.manifest import library_versions
from llava_uhd.checkpoint.weights import weight_files
from llava_uhd.errors import UserError
from llava_uhd.eval.task import Item, Task
from llava_uhd.images.stored import StoredFile

_BLOCK = 1 << 16  # bytes read at a place
_PLACES = 64  # places read in a large file


def file_digest(path: Path) -> str:
    """Hash of a file's size and of 64 blocks spread over it: the whole of it up to 4 MiB.

    Weights of two trainings differ everywhere, so that samples tell them apart in no time.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _BLOCK * _PLACES:
            digest.update(file.read())
        else:
            for place in range(_PLACES):
                file.seek((size - _BLOCK) * place // (_PLACES - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def model_digest(folder: Path) -> str:
    """Hash of a model folder: its configuration, tokenizer and weights; 16 digits."""
    files = [folder / "config.json", *weight_files(folder)]
    names = ["*projector*", "tokenizer*", "processor_config.json", "*.jinja"]
    names += ["adapter_*", "non_lora_trainables.*"]
    files += [path for name in names for path in sorted(folder.glob(name)) if path.is_file()]
    digest = hashlib.sha256()
    for path in files:
        if path.is_file():
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
    return digest.hexdigest()[:16]


def data_digest(task: Task, items: Iterable[Item]) -> str:
    """Hash of ids, conversations and image files (name and size) of a task; 16 digits."""
    digest = hashlib.sha256()
    for item in items:
        images = []
        for source in item.images:
            if isinstance(source, str | os.PathLike):
                path = Path(source)
                images.append((path.name, path.stat().st_size if path.is_file() else None))
            else:
                images.append(_content_digest(source))
        for video in item.videos:
            path = Path(str(video))
            images.append((path.name, path.stat().st_size if path.is_file() else None))
        digest.update(repr((item.id, task.turns(item), images)).encode("utf-8", "replace"))
    return digest.hexdigest()[:16]


def _content_digest(source: Any) -> tuple[str, int | None]:
    """Hash and size of an image that is no file of its own; no size where it cannot be read."""
    if isinstance(source, StoredFile):
        try:
            source = source.open().read()
        except UserError:
            return str(source), None  # answering it will say why
    content = source if isinstance(source, bytes) else source.tobytes()
    return hashlib.sha256(content).hexdigest(), len(content)


def provenance(device: torch.device, processes: int) -> dict[str, Any]:
    """Software and machine of a run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m llava_uhd.eval", *sys.argv[1:]]),
        "git_commit": git_commit(Path(__file__).resolve().parent),
        "versions": {"python": platform.python_version(), **library_versions()},
        "device": f"{device.type} {name}".strip(),
        "processes": processes,
    }


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that ``folder`` is in, with "+" if files were changed, or None."""
    try:
        found = [
            subprocess.run(
                ["git", *words],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] + "+" * bool(found[1])
