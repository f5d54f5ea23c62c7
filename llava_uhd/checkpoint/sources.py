"""Where a model comes from: a local folder or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from llava_uhd.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_folder(path: str | Path, what: str) -> Path:
    """Local folder of a model, fetching it from the hub if the name is a hub id.

    Args:
        path: folder, or an id such as ``lmsys/vicuna-7b-v1.5``.
        what: named in errors ("language model", "vision tower", ...).

    Raises:
        UserError: no such folder, and not (or not reachable as) a hub id.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    name = str(path)
    if folder.exists():
        raise UserError(f"{what} {name} is a file, expected a folder")
    looks_local = name.startswith((".", "/", "~")) or folder.parts[:1] in (
        ("pretrained_models",),
        ("checkpoints",),
    )
    if looks_local or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{what} {name} does not exist: {_how_to_get(folder.name)}, or pass another path"
        )
    return _fetch(name, what)


def _how_to_get(name: str) -> str:
    known = {
        "vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5",
        "vicuna-13b-v1.5": "lmsys/vicuna-13b-v1.5",
        "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
    }
    if name in known:
        return f"fetch it with 'hf download {known[name]} --local-dir pretrained_models/{name}'"
    return "put the model folder there (see pretrained_models/README.md)"


def _fetch(name: str, what: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    kept = ["*.json", "*.model", "*.jinja", "*.txt", "*.safetensors"]
    try:
        try:
            files = HfApi().list_repo_files(name)
            if not any(file.endswith(".safetensors") for file in files):
                kept.append("*.bin")
        except (OSError, ValueError, HfHubHTTPError, RuntimeError):
            # Offline: the cache, if it has the model, is good enough.
            kept.append("*.bin")
        return Path(snapshot_download(name, allow_patterns=kept))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} '{name}' is neither a local folder nor reachable on the hub ({reason[:200]}): "
            f"check the name, or download it where there is a network and pass the folder"
        ) from error
