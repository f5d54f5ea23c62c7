"""``python -m llava_uhd.launch [options] -m MODULE ...``: torchrun, but brief when a user errs.

torchrun turns the one line of a `UserError` into a page of its own traceback and status 1. Here
the launcher prints that line once, whatever the number of processes, and leaves with status 2.

torchrun answers SIGTERM with an end to all processes within half a minute. Here a signal is passed
on and the launcher waits: a training run writes a checkpoint, and both leave with status 75.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, parse_args, run

from llava_uhd.errors import (
    INTERRUPTED_STATUS,
    LAUNCHER_VARIABLE,
    STOPPED_STATUS,
    USER_ERROR_STATUS,
    UserError,
    command,
)

# Statuses that processes leave with after they have said why.
TOLD = (USER_ERROR_STATUS, STOPPED_STATUS, INTERRUPTED_STATUS)
# torchrun itself keeps these: they end all processes.
KEPT = "SIGHUP,SIGQUIT"
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def worth_showing(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's log tells more than the mistake itself."""
    text = record.getMessage()
    told = any(f"(exitcode: {code})" in text for code in TOLD)
    return not told and "closing signal" not in text


def children(process: int) -> list[int]:
    """Ids of the processes that a process has started; empty where the system does not tell."""
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(word) for word in file.read_text().split()]
    return found


def pass_on(number: int, frame: FrameType | None) -> None:
    """Hands a signal to all processes of the launch; without any the launcher itself ends."""
    processes = children(os.getpid())
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
    if not processes:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def hand_over_signals() -> list[str]:
    """Passes signals on from here; the options by which torchrun leaves them alone.

    Without such an option (torch before 2.9), or without ``/proc``, torchrun keeps them.
    """
    names = {name for action in get_args_parser()._actions for name in action.option_strings}
    if "--signals-to-handle" not in names or not Path(f"/proc/{os.getpid()}/task").is_dir():
        return []
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    return [f"--signals-to-handle={KEPT}"]


def main() -> int:
    """Starts the processes and waits for them; returns the status to leave with.

    Raises:
        UserError: what a process met.
    """
    os.environ[LAUNCHER_VARIABLE] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, at length
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(worth_showing)
    try:
        run(parse_args([*hand_over_signals(), *sys.argv[1:]]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode in (STOPPED_STATUS, INTERRUPTED_STATUS):
            return failure.exitcode
        if failure.exitcode != USER_ERROR_STATUS:
            raise
        reason = failure.error_file_data["message"]
        if isinstance(reason, dict):
            raise UserError(reason["message"]) from error
        return USER_ERROR_STATUS  # an argument parser has spoken
    return 0


if __name__ == "__main__":
    command(main)
