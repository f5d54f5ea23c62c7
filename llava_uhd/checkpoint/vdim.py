"""Files of a pre-trained upsampler (VDIM, "visual detail injection module").

Ours is a safetensors file with what it was trained for in its metadata. The published one is a
Lightning checkpoint, a pickled dictionary whose ``state_dict`` holds the upsampler beside much that
only its training needs; it is read with torch's restricted reader. Either way every weight of the
stack must be there: a mismatch is an error, never a stack that starts from nothing unnoticed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llava_uhd.checkpoint.weights import (
    Tensors,
    first_line,
    listing,
    load_restricted,
    read_folder,
    read_tensors,
    weight_files,
)
from llava_uhd.errors import UserError
from llava_uhd.vision.upsampler import UpsamplerStack

VDIM_FILE = "vdim.safetensors"
# Where the stack stands among the model's weights.
UPSAMPLER_PREFIX = "projector.upsampler."

_STACK_NAME = re.compile(r"(?:up\d+|fixup_proj(?:_\dx)?)\..+")


def read_vdim(path: Path, width: int, scale: int) -> Tensors:
    """Weights of a pre-trained upsampler stack.

    Args:
        path: a file of ours or a published ``.ckpt`` (also any other file that holds a stack, such
            as a projector), or a folder with one.
        width: channels of the maps.
        scale: of the stack: 2, 4 or 8.

    Returns:
        Stack name (``up1.range_temp``, ``fixup_proj.1.weight``, ...) -> tensor, as stored.

    Raises:
        UserError: unreadable file, or one without exactly the weights of this stack.
    """
    file = find_vdim(path)
    found = _read_stack(file)
    with torch.device("meta"):
        expected = UpsamplerStack(width, scale).state_dict()
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems = [
        listing("missing weights", missing, 4),
        listing("surplus weights", surplus, 4),
        listing("other shapes", shapes, 4),
    ]
    if any(problems):
        raise UserError(
            f"{file} does not hold the {scale}x upsampler of width {width} that the model has "
            f"({_describe(found)}): {'; '.join(filter(None, problems))}. Name a file that was made "
            "for this tower and these scales"
        )
    return found


def find_vdim(path: Path) -> Path:
    """The file of an upsampler: ``path`` itself, or the one in the folder ``path``.

    A folder with a whole model is returned as it is: the upsampler is in its weights.

    Raises:
        UserError: there is none, or more than one.
    """
    if path.is_file():
        return path
    if (path / VDIM_FILE).is_file():
        return path / VDIM_FILE
    published = sorted(path.glob("*.ckpt")) if path.is_dir() else []
    if len(published) > 1:
        names = ", ".join(file.name for file in published)
        raise UserError(f"{path} holds several upsampler files ({names}): name one of them")
    if published:
        return published[0]
    if path.is_dir() and weight_files(path):
        return path
    raise UserError(
        f"{path} has no upsampler ({VDIM_FILE}, or a published .ckpt): make one with "
        "'bash scripts/vdim_pretrain.sh'"
    )


def vdim_facts(path: Path) -> dict[str, str]:
    """What a file of ours says about itself: width, scale, tower, mean, std; else empty.

    Raises:
        UserError: there is no upsampler, or its file is damaged.
    """
    file = find_vdim(path)
    if file.is_dir() or file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            facts = dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as weights ({first_line(error)})") from error
    facts.pop("format", None)
    return facts


def write_vdim(
    path: Path, stack_state: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Writes an upsampler in our format.

    Args:
        path: of the file; in a folder it is called `VDIM_FILE`.
        stack_state: of an `UpsamplerStack`.
        metadata: width, scale, tower, mean, std and whatever else should be remembered.

    Raises:
        ValueError: width or scale are not those of the weights.
    """
    facts = (str(stack_width(stack_state)), str(named_scale(stack_state)))
    if (metadata.get("width"), metadata.get("scale")) != facts:
        raise ValueError(f"metadata {metadata} do not fit a stack of width and scale {facts}")
    file = path / VDIM_FILE if path.is_dir() else path
    unfinished = file.with_name(file.name + ".part")
    save_file(_plain(stack_state), unfinished, metadata={"format": "pt", **metadata})
    unfinished.replace(file)


def write_published_vdim(
    path: Path,
    stack_state: Mapping[str, torch.Tensor],
    others: Mapping[str, torch.Tensor] | None = None,
    settings: dict[str, Any] | None = None,
    epoch: int = 0,
    global_step: int = 0,
) -> None:
    """Writes an upsampler as the published training does: a Lightning checkpoint.

    Args:
        path: of the ``.ckpt`` file.
        stack_state: of an `UpsamplerStack`.
        others: further entries of the ``state_dict`` under their published names
            (``downsampler.*``, ``scale_net.*``, ...), which loading into a model ignores.
        settings: the hyper-parameters; plain values only.
        epoch: finished epochs.
        global_step: optimizer steps.
    """
    state = {f"upsampler.{name}": tensor for name, tensor in _plain(stack_state).items()}
    state |= _plain(others or {})
    whole = {
        "epoch": epoch,
        "global_step": global_step,
        "pytorch-lightning_version": "2.1.2",
        "state_dict": state,
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": dict(settings or {}),
    }
    unfinished = path.with_name(path.name + ".part")
    torch.save(whole, unfinished)
    unfinished.replace(path)


def stack_width(stack: Mapping[str, torch.Tensor]) -> int | None:
    """Channels of a stack's maps, from its weights; None if that weight is not among them."""
    final = stack.get("fixup_proj.1.weight")
    return None if final is None or final.ndim == 0 else int(final.shape[0])


def named_scale(names: Iterable[str]) -> int | None:
    """Scale of a stack from the names of its weights (one stage doubles); None without a stage."""
    stages = {name.partition(".")[0] for name in names if re.match(r"up\d+\.", name)}
    return 2 ** len(stages) if stages else None


def _plain(state: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _read_stack(file: Path) -> Tensors:
    """The stack's weights among all that a file holds."""
    if file.is_dir():
        tensors: Any = read_folder(file, lambda name: "upsampler." in name)
    elif file.suffix == ".safetensors":
        tensors = dict(read_tensors(file))
    else:
        tensors = load_restricted(file)
        if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
            tensors = tensors["state_dict"]
    if not isinstance(tensors, dict):
        raise UserError(f"{file} holds a {type(tensors).__name__}, expected weights by name")
    stack: Tensors = {}
    for key, tensor in tensors.items():
        # In the training's downsamplers and uncertainty nets are layers of the same names.
        if not torch.is_tensor(tensor) or re.search("scale_net|downsampler", str(key)):
            continue
        name = str(key).rpartition("upsampler.")[2]
        if _STACK_NAME.fullmatch(name):
            stack[name] = tensor
    return stack


def _describe(stack: Tensors) -> str:
    scale, width = named_scale(stack), stack_width(stack)
    if scale is None:
        return "found no upsampler in it"
    return f"found a {scale}x upsampler of width {width if width is not None else 'unknown'}"
