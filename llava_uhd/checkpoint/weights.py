"""Weight files on disk: finding, reading and checking them. Nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from llava_uhd.errors import UserError

Tensors = dict[str, torch.Tensor]

# Where a folder may keep its weights, best first: index of shards, or one file.
_CANDIDATES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a checkpoint folder, safetensors before ``.bin``; empty if there are none.

    Raises:
        UserError: an index names shards that are missing, or paths outside the folder.
    """
    for name in _CANDIDATES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        table = read_json(path).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise UserError(f"{path} has no 'weight_map' from weight names to files")
        shards = sorted({str(shard) for shard in table.values()})
        for shard in shards:
            # The file itself may be a link, as in the cache of the hub.
            if Path(shard).name != shard:
                raise UserError(f"{path}: shard '{shard}' lies outside the folder")
        files = [folder / shard for shard in shards]
        missing = [shard for shard, file in zip(shards, files, strict=True) if not file.is_file()]
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} of {len(shards)} weight files named in {name} are "
                f"missing: {', '.join(missing[:5])}; download or copy them again"
            )
        return files
    return []


def read_json(path: Path) -> dict:
    """Reads a JSON object.

    Raises:
        UserError: missing or malformed file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected an object")
    return values


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of one ``.safetensors`` or ``.bin`` file, memory-mapped where the format allows.

    Raises:
        UserError: damaged file, or a ``.bin`` file that holds anything but tensors.
    """
    if path.suffix != ".safetensors":
        yield from _read_binary(path).items()
        return
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                yield key, file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as weights ({first_line(error)})") from error


def _read_binary(path: Path) -> Tensors:
    state = load_restricted(path)
    if not isinstance(state, dict) or not all(torch.is_tensor(x) for x in state.values()):
        raise UserError(f"{path} does not hold a plain dictionary of tensors")
    return state


def load_restricted(path: Path) -> Any:
    """What a pickled torch file holds, as long as that is tensors and plain Python values.

    Nothing else is ever built from a file.

    Raises:
        UserError: damaged file, or one that holds other objects; the first one is named.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of the old torch format cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way at all
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        more = f" ({foreign.group(1)})" if foreign else ""
        raise UserError(
            f"{path} cannot be read as weights: it is damaged, or holds more than tensors{more}, "
            "which is never loaded"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_folder(folder: Path, wanted: Callable[[str], bool] | None = None) -> Tensors:
    """Tensors of a checkpoint folder.

    Args:
        folder: with one weight file or an index of several.
        wanted: of a name; None takes all tensors.

    Raises:
        UserError: no weight file.
    """
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} has no weights (looked for {', '.join(_CANDIDATES)})")
    return {
        key: tensor
        for file in files
        for key, tensor in read_tensors(file)
        if wanted is None or wanted(key)
    }


def weight_names(folder: Path) -> list[str]:
    """Names of all weights of a checkpoint folder, without reading them; empty if it has none.

    Raises:
        UserError: damaged files.
    """
    names: list[str] = []
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            names += [key for key, _ in read_tensors(file)]
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as weights ({first_line(error)})") from error
    return names


def read_shapes(folder: Path, wanted: Callable[[str], bool]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of a checkpoint folder whose names are wanted; empty if it has none.

    Raises:
        UserError: damaged files.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            shapes |= {key: tuple(each.shape) for key, each in read_tensors(file) if wanted(key)}
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                names = [key for key in opened.keys() if wanted(key)]  # noqa: SIM118
                shapes |= {key: tuple(opened.get_slice(key).get_shape()) for key in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as weights ({first_line(error)})") from error
    return shapes


def check_state(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    what: str,
    may_miss: Iterable[str] = (),
) -> None:
    """Compares tensors with the parameters of a model (which may be on the meta device).

    Args:
        model: as configured; for tied parameters one of each pair suffices.
        state: tensors under the model's names.
        what: named in the error.
        may_miss: prefixes of parameters that are allowed to be absent.

    Raises:
        UserError: missing or surplus names, or other shapes; all in one message.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    allowed = tuple(may_miss)
    missing = [
        name
        for name in expected
        if name not in state
        and not (name in tied and tied[name] in state)
        and not (allowed and name.startswith(allowed))
    ]
    surplus = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, expected {expected[name]}"
        for name, tensor in state.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    problems = [
        listing("missing weights", missing),
        listing("surplus weights", surplus),
        listing("other shapes", shapes),
    ]
    if any(problems):
        raise UserError(
            f"{what} does not fit its configuration: " + "; ".join(filter(None, problems))
        )


def listing(title: str, items: list[str], shown: int = 8) -> str:
    """``2 TITLE: a, b``, at most ``shown`` of the items; an empty text without items."""
    if not items:
        return ""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} {title}: {', '.join(items[:shown])}{more}"
