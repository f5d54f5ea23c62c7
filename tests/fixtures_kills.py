"""Training runs in processes of their own that are killed at chosen or random moments.

The processes are forked from one that has imported everything, so a start takes seconds less than
one of the real command.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from llava_uhd.errors import command
from llava_uhd.train.log import JsonLog
from llava_uhd.train.saving import checkpoints, problem

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
COUNT_FILE = "events.txt"
# What a run imports only when it needs it.
PRELOADED = [
    "fixtures_kills",
    "llava_uhd.train.__main__",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
]


@dataclass
class Fault:
    """What happens to a process.

    Attributes:
        event: it is killed before its n-th change of a file in the output folder, from 1.
        after_start: it is killed so many seconds after its start.
        seconds: it is killed so long after it has begun to write its first checkpoint.
        before: it is killed before a file of this name is moved.
        in_checkpoint: counts ``event`` and ``seconds`` only from the n-th checkpoint on.
        torch_save: half a file is written by the n-th ``torch.save``, then it is killed.
        largest_file: in bytes; the system refuses to write beyond.
        signal: name of one that it and its children get, behind step ``step``.
        step: see ``signal``.
        workers: how it starts those of its data loader.
        environment: of the process.
    """

    event: int | None = None
    after_start: float | None = None
    seconds: float | None = None
    before: str | None = None
    in_checkpoint: int = 0
    torch_save: int | None = None
    largest_file: int | None = None
    signal: str | None = None
    step: int = 0
    workers: str = "fork"
    environment: dict[str, str] = field(default_factory=dict)


def die() -> None:
    """As the kernel or a scheduler does it: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


class Events:
    """Counts changes of files in a folder, and kills at the chosen one."""

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.folder, self.fault = str(folder.resolve()), fault
        self.count = self.begun = 0

    def __call__(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "open":
            path, _, flags = args
            if not (isinstance(flags, int) and flags & WRITING):
                return
        elif name in CHANGES:
            path = args[0]
        else:
            return
        if isinstance(path, int) or not os.path.abspath(os.fsdecode(path)).startswith(self.folder):
            return
        if name == "os.rename" and Path(path).name == self.fault.before:
            die()
        if name == "os.mkdir" and "unfinished/checkpoint-" in os.fsdecode(path):
            self.begun += 1
            if self.fault.seconds is not None and self.begun == max(self.fault.in_checkpoint, 1):
                threading.Timer(self.fault.seconds, die).start()
        if self.begun < self.fault.in_checkpoint:
            return
        self.count += 1
        if self.count == self.fault.event:
            die()


def signal_group(fault: Fault) -> None:
    """Sends a signal to this process and its children once a step is in the log."""
    original = JsonLog.on_log

    def on_log(self: JsonLog, *given: Any, **named: Any) -> None:
        original(self, *given, **named)
        if given[1].global_step == fault.step:
            for _ in range(2):  # launchers and terminals repeat them
                os.killpg(0, getattr(signal, fault.signal or ""))

    JsonLog.on_log = on_log  # type: ignore[method-assign]


def half_save(number: int) -> Callable[..., None]:
    """A ``torch.save`` whose n-th call breaks off in the middle."""
    import io

    import torch

    original, seen = torch.save, []

    def save(values: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(target)
        if len(seen) == number:
            buffer = io.BytesIO()
            original(values, buffer, *args, **kwargs)
            with open(target, "wb") as stream:
                stream.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
            die()
        original(values, target, *args, **kwargs)

    return save


def train_here(workplace: str, output: str, words: list[str], fault: Fault, log: str) -> None:
    """One run of the command, in a new process."""
    os.setsid()
    os.chdir(workplace)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(fault.environment)
    # It would be that of this very process.
    multiprocessing.set_start_method(fault.workers, force=True)
    import torch

    from llava_uhd.train import __main__ as training

    torch.set_num_threads(1)
    if fault.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.largest_file, fault.largest_file))
    if fault.torch_save is not None:
        torch.save = half_save(fault.torch_save)
    if fault.after_start is not None:
        threading.Timer(fault.after_start, die).start()
    if fault.signal is not None:
        signal_group(fault)
    events = Events(Path(output), fault)
    sys.addaudithook(events)
    sys.argv = ["train", *words, "--trainer.output_dir", output, "--trainer.disable_tqdm", "true"]

    def main() -> int:
        status = training.main()
        Path(workplace, COUNT_FILE).write_text(str(events.count))
        return status

    command(main)


@dataclass
class Runs:
    """Starts runs in a folder."""

    workplace: Path
    context: Any

    def begin(self, output: str, *words: str, fault: Fault | None = None) -> BaseProcess:
        """Starts a run; it goes on beside the test."""
        log = str(self.workplace / f"{Path(output).name}.txt")
        given = (str(self.workplace), output, list(words), fault or Fault(), log)
        process = self.context.Process(target=train_here, args=given, name=log)
        process.start()
        return process

    def run(self, output: str, *words: str, fault: Fault | None = None) -> int:
        """Runs to the end; the status, negative for a signal."""
        return finished(self.begin(output, *words, fault=fault))

    def said(self, output: str) -> str:
        """What all starts of a run have printed."""
        path = self.workplace / f"{Path(output).name}.txt"
        return path.read_text() if path.is_file() else ""

    def begin_ranks(
        self, ranks: int, output: str, *words: str, fault: Fault | None = None
    ) -> list[BaseProcess]:
        """Starts the processes of one run; the fault is that of the last one."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(ranks):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            places |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            own = fault if fault is not None and rank == ranks - 1 else Fault()
            given = replace(own, environment={key: str(value) for key, value in places.items()})
            processes.append(self.begin(output, *words, fault=given))
        return processes


def assert_only_whole(folder: Path) -> None:
    """What bears the name of a checkpoint is one."""
    for _, path in checkpoints(folder):
        assert problem(path) is None


def finished(process: BaseProcess, seconds: float = 240) -> int:
    """Waits for a process; one that hangs is an error."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"no end after {seconds} s")
    return process.exitcode


def random_fault(draw: random.Random, events: int, seconds: float, saves: int) -> Fault:
    """A kill at a random moment.

    Args:
        draw: random numbers.
        events: changes of files in a whole run.
        seconds: that a whole run takes.
        saves: calls of ``torch.save`` in a whole run.
    """
    kind = draw.choice(("start", "event", "seconds", "half"))
    if kind == "start":
        return Fault(after_start=draw.uniform(0, seconds))
    if kind == "event":
        return Fault(event=draw.randint(1, events))
    if kind == "half":
        return Fault(torch_save=draw.randint(1, saves))
    return Fault(seconds=draw.uniform(0, seconds / 5))


@pytest.fixture(scope="module")
def runs(workplace: Path) -> Runs:
    """Runs in `workplace`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return Runs(workplace, context)
