"""Weights that are shared out over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations import deepspeed as library

from llava_uhd.model.modeling import LlavaUHDForConditionalGeneration

State = dict[str, torch.Tensor]


@contextmanager
def built_whole(arguments: TrainingArguments) -> Iterator[None]:
    """A model that is built inside has all its weights in every process, also for ZeRO-3.

    The library would share them out while it makes a language model, before any of its own checks
    and before the other parts exist. Here a model is complete, checked and filled first (from
    memory-mapped files, on the CPU); DeepSpeed shares it out when the trainer starts.

    Args:
        arguments: of the run.
    """
    settings = getattr(arguments, "hf_deepspeed_config", None)
    if settings is None:
        yield
        return
    library.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        library.set_hf_deepspeed_config(settings)


class Sharing:
    """What a model needs so that its weights can be shared out, and be saved afterwards.

    Args:
        model: before the trainer starts.
        arguments: of the run.
    """

    def __init__(
        self, model: LlavaUHDForConditionalGeneration, arguments: TrainingArguments
    ) -> None:
        self.scalars: list[str] = []
        if arguments.deepspeed or arguments.fsdp:
            self.scalars = widen_scalars(model)

    def tidy(self, model: nn.Module, state: State | None) -> State | None:
        """The state to save: that of a model that was never shared out; None: the model's own."""
        if not self.scalars:
            return state
        state = dict(model.state_dict()) if state is None else state
        return state | {name: state[name].reshape(()) for name in self.scalars if name in state}


def widen_scalars(model: nn.Module) -> list[str]:
    """Gives parameters without an axis one of length 1: they cannot be shared out otherwise.

    Returns:
        Their names.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.reshape(1)
    return names
