"""Several processes of one evaluation: who does what, and waiting for each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from llava_uhd.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all of them.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        local_rank: on this machine; chooses the GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """Reads what torchrun and accelerate set: RANK, WORLD_SIZE, LOCAL_RANK.

        Raises:
            UserError: values that make no sense.
        """
        values = os.environ if environment is None else environment
        found = [values.get(name, default) for name, default in
                 (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]  # fmt: skip
        try:
            rank, size, local_rank = (int(value) for value in found)
        except ValueError:
            rank, size, local_rank = 0, 0, 0
        if not 0 <= rank < size:
            raise UserError(
                f"RANK={found[0]}, WORLD_SIZE={found[1]} is no process of a launch: start with "
                "torchrun, or unset them"
            )
        return cls(rank, size, local_rank)

    def connect(self) -> None:
        """Joins the process group, if there is more than one process.

        Raises:
            UserError: the launcher did not say where to meet.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            return
        try:
            # Only for waiting; a slow rank may take days longer than a quick one.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
        except ValueError as error:
            raise UserError(
                f"WORLD_SIZE={self.size} but the processes cannot meet ({error}): start them with "
                "torchrun or accelerate"
            ) from error

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def disconnect(self) -> None:
        """Leaves the process group."""
        if self.size > 1:
            import torch.distributed as dist

            if dist.is_initialized():
                dist.destroy_process_group()

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part: every ``size``-th item, so that sorted items spread evenly.

        Example: rank 1 of 2 gets items 1, 3, 5, ...
        """
        return list(items[self.rank :: self.size])
