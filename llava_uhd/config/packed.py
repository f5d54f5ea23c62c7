"""What packed rows cannot be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_uhd.errors import UserError


def check_packed(
    by_modality: bool, global_batch_size: int | None, arguments: Mapping[str, Any]
) -> None:
    """Refuses settings of the trainer that have no meaning with ``data.batching: packed``.

    Args:
        by_modality: ``trainer.group_by_modality_length``.
        global_batch_size: of the trainer.
        arguments: its other keys.

    Raises:
        UserError: another order, or another way to choose the size of a step.
    """
    if by_modality:
        raise UserError(_other_order("group_by_modality_length", "false"))
    if arguments.get("train_sampling_strategy") not in (None, "random"):
        raise UserError(_other_order("train_sampling_strategy", "random"))
    if global_batch_size is not None and arguments.get("gradient_accumulation_steps") is not None:
        raise UserError(
            "trainer.global_batch_size and trainer.gradient_accumulation_steps exclude each other "
            "with data.batching packed, where rows differ in samples: set one of them to null"
        )
    if arguments.get("auto_find_batch_size"):
        raise UserError(
            "trainer.auto_find_batch_size cannot shrink packed rows: leave it out and lower "
            "data.pack_tokens"
        )


def _other_order(name: str, value: str) -> str:
    return (
        f"trainer.{name} and data.batching packed exclude each other: packed rows have no padding "
        f"to save and an order of their own. Set --trainer.{name} {value}, or --data.batching "
        "padded"
    )
