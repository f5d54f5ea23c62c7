"""Weights that are shared out over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainingArguments
from transformers.integrations import deepspeed as library


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
