"""A guarded Trainer that writes and reads the shares of FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_uhd.train.fsdp import share_on_cpu
from llava_uhd.train.guarded import GuardedTrainer
from llava_uhd.train.shares import (
    gathered,
    holds_shares,
    inner,
    load_optimizer,
    load_weights,
    save_shares,
)

SCHEDULE_FILE = "scheduler.pt"  # as the library calls it


class SharedTrainer(GuardedTrainer):
    """Writes shares where FSDP shares out; reads them, and other checkpoints, with and without it.

    Attributes:
        finishing: what is saved now is the result of the stage, not a checkpoint.
    """

    finishing = False

    def create_accelerator_and_postprocess(self) -> None:
        """The library's; it leaves FSDP out on CPUs without a word."""
        super().create_accelerator_and_postprocess()
        share_on_cpu(self)

    def belongs_to_result(self, name: str) -> bool:
        """Whether the result of the stage needs a weight."""
        return True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The library's; under FSDP only a result is written as a model, from gathered weights."""
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif self.finishing:
            keep = self.args.should_save
            self._save(output_dir, gathered(self.model, self.belongs_to_result, keep))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_shares(self.model, self.optimizer, folder)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULE_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if not (self.is_fsdp_enabled or holds_shares(folder)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(self.model if model is None else model, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if checkpoint is None or not (self.is_fsdp_enabled or holds_shares(Path(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        load_optimizer(self.model, self.optimizer, folder)
        schedule = torch.load(folder / SCHEDULE_FILE, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
        groups = inner(self.optimizer).param_groups
        for group, rate in zip(groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
