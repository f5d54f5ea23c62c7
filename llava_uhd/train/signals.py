"""Signals of schedulers: the step at hand is finished, a checkpoint written, the run left."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal and a launcher may both pass one key press on.
SAME_PRESS = 1.0  # seconds


class StopOnSignal(TrainerCallback):
    """Ends a run between two steps when a signal has come, with a checkpoint of the last one.

    SIGTERM and SIGUSR1 may come as often as they like: schedulers repeat them, and what comes after
    their patience is SIGKILL, which does no harm to the checkpoint before. A second SIGINT (Ctrl-C)
    ends the process at once. Of several processes it suffices that one gets the signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped = False
        self._when = 0.0
        self._owner = os.getpid()
        self._before: dict[int, Any] = {}
        self.group: Any = None

    def __enter__(self) -> StopOnSignal:
        if multiprocessing.get_start_method() == "forkserver":
            start_quiet_server()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        # A run that stops is not disturbed while it leaves: its launcher signals again.
        if not self.stopped:
            for number, before in self._before.items():
                signal.signal(number, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a worker, between its birth and `ignore_signals`
            return
        now = time.monotonic()
        if number == signal.SIGINT and self.received is not None and now > self._when + SAME_PRESS:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self._when = number, now
            name = signal.Signals(number).name
            # Not through the log: the signal may have come in the middle of one of its lines.
            os.write(2, f"{name}: a checkpoint is written after this step\n".encode())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Opens a way between the processes that does not wait for their GPUs."""
        if args.world_size > 1:
            self.group = torch.distributed.new_group(backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """All processes stop behind the same step."""
        if self._wanted():
            self.stopped = True
            control.should_save = control.should_log = control.should_training_stop = True

    def _wanted(self) -> bool:
        if self.group is None:
            return self.received is not None
        flag = torch.tensor([int(self.received is not None)])
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self.group)
        return bool(flag)


def start_quiet_server() -> None:
    """Starts the process that forks workers (the default from Python 3.14) deaf to the signals.

    It lives in the job too, and workers whose server has died count as dead.
    """
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()  # what is blocked here is blocked there
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_workers() -> None:
    """Ends the workers that this process still has when it leaves.

    The interpreter would send them SIGTERM, which they leave alone, and wait for them for ever.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler calls their end an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class QuietWorker:
    """Start of a data loader's worker that leaves the signals of a scheduler to its run.

    A scheduler signals every process of a job. A worker that died of it would take the run along
    before its checkpoint is written. Workers end with their run, however that ends: made in the run
    itself, this sees to it.

    Args:
        first: what else a worker does when it starts.
    """

    def __init__(self, first: Callable[[int], None] | None) -> None:
        self.first = first
        atexit.unregister(end_workers)
        atexit.register(end_workers)  # once, and before those that were registered earlier

    def __call__(self, number: int) -> None:
        """In the worker."""
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        if self.first is not None:
            self.first(number)
