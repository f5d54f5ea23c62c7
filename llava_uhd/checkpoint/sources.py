"""Where a model comes from: a local folder or a hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from llava_uhd.checkpoint.manifest import read_manifest
from llava_uhd.checkpoint.weights import read_json, weight_files
from llava_uhd.errors import UserError

CHECKPOINT_FOLDERS = ("checkpoints", "checkpoints_new")
# Weights of a LoRA training: the adapter, and in published folders the projector beside it.
ADAPTER_FILE = "adapter_model.safetensors"
PUBLISHED_LEARNED_FILE = "non_lora_trainables.bin"

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


def find_checkpoint(name: str | Path | None = None) -> str | Path:
    """What a user means by a checkpoint: a folder, the name of a run, a hub id, or nothing.

    Args:
        name: a folder; or a name under ``checkpoints/`` or ``checkpoints_new/``; or a hub id. None
            takes the newest finished model under ``checkpoints/``.

    Returns:
        The folder, or the hub id as it is.

    Raises:
        UserError: there is no such checkpoint; the message says how to get one.
    """
    if name is None:
        finished = list(_finished_models(Path("checkpoints")))
        if not finished:
            raise UserError(
                "there is no finished model under checkpoints/: make one with "
                "'bash scripts/quickstart.sh', or name the folder of a model"
            )
        return max(finished)[1]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not folder.is_absolute():
        for place in CHECKPOINT_FOLDERS:
            if (Path(place) / folder).is_dir():
                return Path(place) / folder
    if folder.exists() or _HUB_ID.fullmatch(str(name)):
        return str(name)  # `resolve_folder` knows what to say
    raise UserError(
        f"checkpoint {name} does not exist (looked here and in {', '.join(CHECKPOINT_FOLDERS)}): "
        "pass a folder or a hub id, or make one with 'bash scripts/quickstart.sh'"
    )


def _finished_models(root: Path, depth: int = 3) -> Iterator[tuple[float, Path]]:
    """(time of the weights, folder) of models up to ``depth`` levels below ``root``."""
    for place, names, files in os.walk(root):
        folder = Path(place)
        level = len(folder.relative_to(root).parts)
        # Snapshots of a running training are not finished.
        names[:] = [name for name in names if not name.startswith("checkpoint-") and level < depth]
        if "config.json" not in files:
            continue
        try:
            kind = read_manifest(folder).get("kind", "model")
            adapter = [folder / ADAPTER_FILE] if (folder / ADAPTER_FILE).is_file() else []
            weights = adapter if kind == "lora" else weight_files(folder)
            config = read_json(folder / "config.json")
        except UserError:
            continue  # cut short while it was written or copied
        multimodal = config.get("model_type") == "llava_uhd" or "mm_projector_type" in config
        if weights and kind in ("model", "lora") and multimodal:
            yield max(file.stat().st_mtime for file in weights), folder


def _how_to_get(name: str) -> str:
    known = {
        "vicuna-7b-v1.5": "lmsys/vicuna-7b-v1.5",
        "vicuna-13b-v1.5": "lmsys/vicuna-13b-v1.5",
        "Qwen2-0.5B-Instruct": "Qwen/Qwen2-0.5B-Instruct",
        "Qwen2-7B-Instruct": "Qwen/Qwen2-7B-Instruct",
        "Qwen2-72B-Instruct": "Qwen/Qwen2-72B-Instruct",
        "llava-v1.5-7b": "liuhaotian/llava-v1.5-7b",
        "llava-onevision-qwen2-7b-si": "lmms-lab/llava-onevision-qwen2-7b-si",
        "clip-vit-large-patch14": "openai/clip-vit-large-patch14",
        "clip-vit-large-patch14-336": "openai/clip-vit-large-patch14-336",
        "siglip-so400m-patch14-384": "google/siglip-so400m-patch14-384",
    }
    if name in known:
        return f"fetch it with 'hf download {known[name]} --local-dir pretrained_models/{name}'"
    return "put the model folder there (see pretrained_models/README.md)"


def _fetch(name: str, what: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    kept = ["*.json", "*.model", "*.jinja", "*.txt", "*.safetensors", PUBLISHED_LEARNED_FILE]
    try:
        try:
            files = HfApi().model_info(name).siblings or []
            if not any(file.rfilename.endswith(".safetensors") for file in files):
                kept.append("*.bin")
        except Exception:  # of the network library, whose kinds change with its releases
            # Offline: the cache, if it has the model, is good enough.
            kept.append("*.bin")
        return Path(snapshot_download(name, allow_patterns=kept))
    except Exception as error:  # see above
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what} '{name}' is neither a local folder nor reachable on the hub ({reason[:200]}): "
            f"check the name, or download it where there is a network and pass the folder"
        ) from error
