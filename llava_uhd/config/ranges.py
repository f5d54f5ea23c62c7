"""Values of the library's training arguments that it would misread, or find out too late."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llava_uhd.errors import UserError


class Range(NamedTuple):
    """What a value has to be.

    Attributes:
        holds: whether it is.
        words: the same, for people.
    """

    holds: Callable[[Any], bool]
    words: str


_COUNT = Range(lambda value: value >= 1, "at least 1")
_LENGTH = Range(lambda value: value > 0, "above 0")
_SIZE = Range(lambda value: value >= 0, "at least 0")
_SHARE = Range(lambda value: 0 <= value < 1, "at least 0 and below 1")
_SEED = Range(lambda value: 0 <= value < 2**32, "at least 0 and below 2^32")

RANGES = {
    "per_device_eval_batch_size": _COUNT,
    # The library takes every value below 1 for "no bound"; -1 is its own word for it.
    "max_steps": Range(lambda value: value >= 1 or value == -1, "at least 1, or -1 for no bound"),
    "num_train_epochs": _LENGTH,
    "logging_steps": _LENGTH,
    "save_steps": Range(
        _LENGTH.holds, "above 0 (--trainer.save_strategy no saves at the end only)"
    ),
    "save_total_limit": Range(_COUNT.holds, "at least 1, or null to keep all checkpoints"),
    "eval_steps": _LENGTH,
    "weight_decay": _SIZE,
    "max_grad_norm": Range(_SIZE.holds, "at least 0 (0 clips nothing)"),
    "warmup_steps": _SIZE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _SIZE,
    "dataloader_num_workers": _SIZE,
    "seed": _SEED,
    "data_seed": _SEED,
}


def check_ranges(arguments: Mapping[str, Any]) -> None:
    """Refuses values that end a run after its model is loaded, or quietly make another run of it.

    Args:
        arguments: fields of transformers' ``TrainingArguments``.

    Raises:
        UserError: naming the key and what it has to be.
    """
    for name, allowed in RANGES.items():
        value = arguments.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not allowed.holds(value):
            raise UserError(f"trainer.{name} must be {allowed.words}, got {value}")
    if arguments.get("resume_from_checkpoint") is not None:
        raise UserError(
            "trainer.resume_from_checkpoint: a run goes on from the newest whole checkpoint of its "
            "output folder by itself; leave it out, or set --trainer.output_dir to that folder"
        )
