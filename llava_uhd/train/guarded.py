"""A Trainer whose runs survive kills, signals, full disks and numbers that go wrong."""

from __future__ import annotations

import errno
import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer

from llava_uhd.errors import STOPPED_STATUS, UserError
from llava_uhd.train.diagnostics import write_bundle
from llava_uhd.train.elastic import fitting, mend, seal_facts, settings_of
from llava_uhd.train.optimizers import make_schedule
from llava_uhd.train.saving import (
    SEAL_FILE,
    UNFINISHED,
    newest,
    publish,
    publish_result,
    remove_unfinished,
    rotate,
    seal,
)
from llava_uhd.train.signals import QuietWorker, StopOnSignal
from llava_uhd.train.start import part_ways, say

logger = logging.getLogger(__name__)

# Steps in a row whose gradients may overflow in float16 while its scale is sought.
FLOAT16_PATIENCE = 25
# How torch's writer tells that a disk is full.
_TORCH_WRITER = ("PytorchStreamWriter", "iostream error", ". unexpected pos ")
# What only writing meets; other errors of a disk count where the file lies in the output folder.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def disk_reason(error: Exception, folder: Path) -> str | None:
    """What a disk refused, if that is what an error means; None for any other error.

    The writers of torch and safetensors wrap it in errors of their own.
    """
    if isinstance(error, OSError):
        inside = folder.resolve() in Path(os.fsdecode(error.filename or "")).resolve().parents
        if error.errno is not None and (inside or error.errno in _WRITING):
            return os.strerror(error.errno)
        return None
    text = str(error)
    if isinstance(error, SafetensorError) and "os error" in text:
        return text.partition("I/O error: ")[2].partition(" (os error")[0] or text
    if isinstance(error, RuntimeError) and any(word in text for word in _TORCH_WRITER):
        return "the disk is full, or a file grew too large"
    return None


@contextmanager
def told_of_the_disk(folder: Path) -> Iterator[None]:
    """Turns what a disk refuses into one line.

    Raises:
        UserError: with how much is free, and what is left to go on from.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_reason(error, folder)
        if reason is None:
            raise
        raise UserError(_refused(folder, reason, getattr(error, "filename", None))) from error


def _refused(folder: Path, reason: str, file: str | None) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB free"
    except OSError:
        free = "not readable either"
    left = newest(folder)
    advice = f"{left.name} is whole, start again to go on from it" if left else "start again"
    what = f"{file}: {reason}" if file else reason
    return f"{folder} cannot be written ({what}; {free}): make room or mend it; {advice}"


def stopped(trainer: GuardedTrainer) -> int:
    """Says that a signal ended the run, and where it goes on; the status to leave with."""
    number = trainer.signals.received
    name = "a signal to another process" if number is None else signal.Signals(number).name
    step = trainer.state.global_step
    say(f"stopped by {name} after step {step}: checkpoint-{step} is whole, start again to go on")
    part_ways()
    return STOPPED_STATUS


def release_workers(loader: Any) -> None:
    """Ends workers that outlive an epoch; the library keeps their loader for as long as it runs."""
    inner = getattr(loader, "base_dataloader", loader)
    if getattr(inner, "_iterator", None) is not None:
        inner._iterator = None


class GuardedTrainer(Trainer):
    """Whole checkpoints, stops on signals, and no step with numbers that are none.

    A subclass sets ``recipe`` before it calls ``__init__``, and ``sampler``.
    """

    recipe: Any
    sampler: Any
    optimizer: torch.optim.Optimizer | None
    lr_scheduler: Any

    def __init__(self, **kwargs: Any) -> None:
        self.signals = StopOnSignal()
        self.micro_batches = 0
        self.step_losses: list[torch.Tensor] = []
        self.converted = False  # the checkpoint to go on from, for DeepSpeed
        self._aside = False
        self._overflows = 0
        super().__init__(**kwargs)
        self.add_callback(self.signals)

    # --- to the end, or to a signal ---------------------------------------------------------------

    def run(self, checkpoint: Path | None) -> bool:
        """Trains.

        Args:
            checkpoint: to go on from.

        Returns:
            Whether all steps are done; False: a signal ended the run, its checkpoint is written.

        Raises:
            UserError: numbers or a disk that no step can be taken with.
        """
        with self.signals, told_of_the_disk(Path(self.args.output_dir)):
            start = str(fitting(self, checkpoint)) if checkpoint else None
            self.converted = start is not None and Path(start) != checkpoint
            try:
                self.train(resume_from_checkpoint=start)
            finally:
                release_workers(self.callback_handler.train_dataloader)
        return not self.signals.stopped

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if not self.converted:
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        settings = settings_of(self.create_optimizer())
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        mend(self.deepspeed.optimizer.optimizer, settings, self.lr_scheduler.get_last_lr())
        return prepared

    def get_train_dataloader(self) -> DataLoader:
        """The library's, with workers that leave signals to the run."""
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = QuietWorker(inner.worker_init_fn)
        return loader

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The recipe's schedule; shares of the run are steps now."""
        if self.lr_scheduler is None:
            target = self.optimizer if optimizer is None else optimizer
            assert target is not None, "the optimizer comes first"
            self.lr_scheduler = make_schedule(self.args, target, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- numbers ----------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Micro-batches of the next step."""
        batches, learned = super().get_batch_samples(*args, **kwargs)
        self.micro_batches = len(batches)
        self.step_losses = []
        return batches, learned

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; keeps its loss where it is."""
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss)
        return loss

    def _before_clipping(self) -> bool:
        """Whether whole gradients are at hand before they are clipped, and before the step."""
        plain = not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        return plain and not self.args.fp16

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._before_clipping():
            return super()._clip_grad_norm(model)
        # What the library does, with a look between measuring and clipping, which would spread one
        # bad value over all gradients.
        parameters = list(model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.check_norm(norm)
        torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        checked = grad_norm is not None and self._before_clipping()
        norm = super()._get_grad_norm(model, grad_norm)
        if not checked and norm is not None:
            self.check_norm(norm)
        return norm

    def check_norm(self, norm: torch.Tensor | float) -> None:
        """Stops before a step whose gradients are not finite, or beyond the recipe's bound.

        One number is read from the device in each optimizer step. All processes read the same.

        Raises:
            UserError: after the bundle of `llava_uhd.train.diagnostics` is written.
        """
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        bound = self.recipe.trainer.max_grad_norm_stop
        if math.isfinite(value):
            self._overflows = 0
            if bound is None or value <= bound:
                return
            self.give_up(
                f"the gradient norm is {value:.6g}, above trainer.max_grad_norm_stop {bound:g}",
                {"gradient_norm": value},
            )
        self._overflows += 1
        if self.args.fp16 and self._overflows < FLOAT16_PATIENCE:
            return  # such a step is left out, and the scale lowered
        losses = [float(loss) for loss in self.step_losses]
        bad = [loss for loss in losses if not math.isfinite(loss)]
        what = f"the loss is {bad[0]}" if bad else f"the gradient norm is {value}"
        self.give_up(what, {"gradient_norm": value})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Refuses an entry whose loss is no number: no checkpoint follows it."""
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            self.give_up(f"the loss is {loss}", {"loss": loss}, taken=True)
        super().log(logs, *args, **kwargs)

    def give_up(self, what: str, facts: dict[str, Any], taken: bool = False) -> None:
        """Ends the run.

        Args:
            what: went wrong.
            facts: for the bundle.
            taken: the step with it was taken already.

        Raises:
            UserError: always.
        """
        step = self.state.global_step + (not taken)
        folder = write_bundle(self, what, facts)
        left = newest(Path(self.args.output_dir))
        told = [f"step {step}: {what}: training has stopped and saved nothing of this step"]
        if folder is not None:
            told.append(f"{folder} names its samples and the gradients of each part")
        told.append(
            f"{left.name} is whole, the same command goes on from it"
            if left
            else "there is no checkpoint yet, the same command begins anew"
        )
        raise UserError("; ".join(told))

    # --- writing ----------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._aside else folder

    def _alone_in_writing(self) -> bool:
        """Whether processes can fail in writing each by itself: nothing is gathered meanwhile."""
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output, step = Path(self.args.output_dir), self.state.global_step
        target = output / f"checkpoint-{step}"
        if (target / SEAL_FILE).is_file():
            return  # the state of this very step, written a moment ago
        source = output / UNFINISHED / target.name
        with self._all_or_none(output, source, self._alone_in_writing()):
            self._aside = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = False
        with self._all_or_none(output, source):
            if self.args.should_save:
                self._settle_best(source, target)
                seal(source, step=step, **seal_facts(self))
                publish(source, target)
                keep, best = self.args.save_total_limit, self.state.best_model_checkpoint
                rotate(output, keep, best)
                remove_unfinished(output)

    def _settle_best(self, source: Path, target: Path) -> None:
        """The best checkpoint is known by the name that it will have."""
        if self.state.best_model_checkpoint == str(source):
            self.state.best_model_checkpoint = str(target)
            self.state.save_to_json(str(source / "trainer_state.json"))

    @contextmanager
    def _all_or_none(self, output: Path, source: Path, together: bool = True) -> Iterator[None]:
        """What one process cannot write no process goes on without.

        Args:
            output: folder of the run.
            source: what was being written; removed if it cannot be, to give the room back.
            together: all processes come to the end of this, whatever happens to one.

        Raises:
            UserError: on all processes.
        """
        failed: UserError | None = None
        try:
            with told_of_the_disk(output):
                yield
        except UserError as error:
            failed = error
            shutil.rmtree(source, ignore_errors=True)
        if failed is not None and not together:
            raise failed
        if self.args.world_size > 1:
            told: list[str | None] = [None] * self.args.world_size
            torch.distributed.all_gather_object(
                told, str(failed) if failed else None, group=self.signals.group
            )
            reasons = [each for each in told if each]
            if reasons and failed is None:
                failed = UserError(reasons[0])
        if failed is not None:
            raise failed

    def write_result(self, save: Any) -> None:
        """Writes a finished stage aside, then moves it into the output folder.

        Args:
            save: writes it into the folder it is given; called on all processes.
        """
        output = Path(self.args.output_dir)
        source = output / UNFINISHED / "result"
        with self._all_or_none(output, source, self._alone_in_writing()):
            source.mkdir(parents=True, exist_ok=True)
            save(source)
        with self._all_or_none(output, source):
            if self.args.should_save:
                publish_result(source, output)
                remove_unfinished(output)
