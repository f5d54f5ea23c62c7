"""Checkpoints of runs that FSDP2 shares out, in torch's distributed format.

Every process writes its own shares of what learns and of the optimizer's state, tensor by tensor.
They can be read by any number of processes, also by one alone without FSDP; and a run under FSDP
reads what a run without it wrote. What is read is laid into the tensors that are there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_uhd.checkpoint.weights import read_folder, read_tensors
from llava_uhd.errors import UserError

# What learns, in a checkpoint of a run without FSDP in which a part is frozen.
TRAINABLE_FILE = "trainable.safetensors"
FOLDER = "shares"
# What the entries of the folder begin with: weights, moments of their shape, counters.
MODEL, MOMENTS, NUMBERS = "model/", "moments/", "numbers/"
OPTIMIZER_FILE = "optimizer.pt"  # of the library, without FSDP
State = dict[str, torch.Tensor]
Moments = dict[torch.Tensor, State]


def holds_shares(checkpoint: Path) -> bool:
    """Whether a checkpoint was written by `save_shares`."""
    return (checkpoint / FOLDER / ".metadata").is_file()


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside the library's wrapper."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def settle(model: nn.Module) -> None:
    """Takes units apart again that a pass without a backward pass has left whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that learn, by name."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor that may be shared out, put together on every process."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value
    # Shares in the memory of the host are put together on the device.
    shared: Any = value.to(value.device_mesh.device_type)
    full: torch.Tensor = shared.full_tensor()
    return full


def _with_axis(value: torch.Tensor) -> torch.Tensor:
    """The same memory, with an axis at least: parameters without one have it under FSDP."""
    return value.detach().reshape(1) if value.ndim == 0 else value.detach()


def check_same(found: Iterable[str], model: nn.Module, source: Path) -> None:
    """Refuses a checkpoint of other parameters than those that learn.

    Raises:
        UserError: names some of them.
    """
    different = sorted(set(found) ^ set(learning(model)))
    if different:
        raise UserError(
            f"{source} was written by a run in which other parts learn "
            f"({', '.join(different[:4])}, ...): use another trainer.output_dir"
        )


# --- writing --------------------------------------------------------------------------------------


@contextmanager
def _one_error() -> Iterator[None]:
    """What a process met in writing, raised as it was: torch wraps it, on all processes."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        met = [failure for failure, _ in error.failures.values()]
        raise next((each for each in met if isinstance(each, OSError)), met[0]) from error


def save_shares(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Writes what learns and the optimizer's state; all processes call it.

    Args:
        model: as it is shared out.
        optimizer: of its parameters.
        checkpoint: folder, which exists.

    Raises:
        OSError: what one of the processes met in writing.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    settle(model)
    state: State = {}
    for name, parameter in learning(model).items():
        state[MODEL + name] = _with_axis(parameter)
        for key, value in inner(optimizer).state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.ndim == 0:
                state[f"{NUMBERS}{name}/{key}"] = _with_axis(whole(value)).cpu()
            elif torch.is_tensor(value):
                state[f"{MOMENTS}{name}/{key}"] = value.detach()
    with _one_error():
        save(state, storage_writer=FileSystemWriter(checkpoint / FOLDER))


# --- reading --------------------------------------------------------------------------------------


def _read(state: State, checkpoint: Path) -> None:
    """Fills tensors with what the folder holds under their names."""
    from torch.distributed import is_available, is_initialized
    from torch.distributed.checkpoint.state_dict_loader import load

    from llava_uhd.train.share_reader import ShareReader

    alone = not (is_available() and is_initialized())
    reader = ShareReader(checkpoint / FOLDER)
    with _one_error(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is so on purpose
        load(state, storage_reader=reader, no_dist=alone)


def entries(checkpoint: Path) -> Mapping[str, Any]:
    """Name -> description of everything in the folder."""
    from llava_uhd.train.share_reader import ShareReader

    return ShareReader(checkpoint / FOLDER).read_metadata().state_dict_metadata


def _lay_into(target: torch.Tensor, full: torch.Tensor) -> None:
    """Copies a whole tensor into one that may be shared out."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    full = full.reshape(target.shape)
    shared = target.detach()
    if isinstance(shared, DTensor):
        # Every process has the whole: none needs to be sent.
        full = distribute_tensor(
            full.to(shared.device), shared.device_mesh, shared.placements, src_data_rank=None
        )
    shared.copy_(full)


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Reads what learns, from shares or from the file of a run without FSDP.

    Args:
        model: whole or shared out.
        checkpoint: folder.

    Raises:
        UserError: it was written by a run in which other parts learn.
    """
    settle(model)
    parameters = learning(model)
    if holds_shares(checkpoint):
        found = [name for name in entries(checkpoint) if name.startswith(MODEL)]
        check_same((name.removeprefix(MODEL) for name in found), model, checkpoint)
        _read({MODEL + name: _with_axis(each) for name, each in parameters.items()}, checkpoint)
        return
    file = checkpoint / TRAINABLE_FILE
    tensors = dict(read_tensors(file)) if file.is_file() else read_folder(checkpoint)
    if file.is_file():
        check_same(tensors, model, file)
    for name, parameter in parameters.items():
        _lay_into(parameter, tensors[name])


def load_optimizer(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Reads the optimizer's state, from shares or from the file of a run without FSDP.

    Settings of its groups stay those of the recipe; their rates belong to the schedule.

    Args:
        model: whole or shared out.
        optimizer: of its parameters, in one group per part.
        checkpoint: folder.
    """
    read = _shared_moments if holds_shares(checkpoint) else _whole_moments
    moments = read(learning(model), inner(optimizer), checkpoint)
    own = inner(optimizer).state_dict()
    order = [each for group in inner(optimizer).param_groups for each in group["params"]]
    numbers = [number for group in own["param_groups"] for number in group["params"]]
    own["state"] = {n: moments[p] for n, p in zip(numbers, order, strict=True) if p in moments}
    inner(optimizer).load_state_dict(own)


def _shared_moments(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, checkpoint: Path
) -> Moments:
    state: State = {}
    for entry, facts in entries(checkpoint).items():
        prefix, name = entry.partition("/")[0] + "/", entry.partition("/")[2].rpartition("/")[0]
        if prefix == MOMENTS:
            like = _with_axis(parameters[name])
            state[entry] = torch.zeros_like(like, dtype=facts.properties.dtype)
        elif prefix == NUMBERS:
            state[entry] = torch.zeros(facts.size, dtype=facts.properties.dtype)
    _read(state, checkpoint)
    moments: Moments = {}
    for entry, value in state.items():
        name, _, key = entry.partition("/")[2].rpartition("/")
        parameter = parameters[name]
        shape = () if entry.startswith(NUMBERS) else parameter.shape
        moments.setdefault(parameter, {})[key] = value.reshape(shape)
    return moments


def _whole_moments(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, checkpoint: Path
) -> Moments:
    saved = torch.load(checkpoint / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    # Groups are made in the same way in all runs: their parameters stand in the same order.
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    order = [each for group in optimizer.param_groups for each in group["params"]]
    moments: Moments = {}
    for number, parameter in zip(numbers, order, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            if torch.is_tensor(value) and key != "step":
                target = torch.zeros_like(parameter, dtype=value.dtype)
                _lay_into(target, value)
                value = target
            moments.setdefault(parameter, {})[key] = value
    return moments


# --- the result -----------------------------------------------------------------------------------


def gathered(model: nn.Module, wanted: Callable[[str], bool], keep: bool) -> State:
    """Whole tensors of a model's state, put together one after another; all processes call it.

    Args:
        model: as it is shared out.
        wanted: which names.
        keep: whether this process holds the result, in the memory of the host.

    Returns:
        Name -> tensor, tied names sharing one; nothing on processes that do not keep it.
    """
    settle(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: State = {}
    put_together: dict[int, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not wanted(name):
            continue
        number = id(parameters.get(name, value))
        if number not in put_together:
            full = whole(value.detach())
            put_together[number] = full.cpu() if keep else torch.empty(0)
        if keep:
            found[name] = put_together[number]
    return found
