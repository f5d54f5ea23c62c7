"""``python -m llava_uhd.launch [options] -m MODULE ...``: torchrun, but brief when a user errs.

torchrun turns the one line of a `UserError` into a page of its own traceback and status 1. Here
the launcher prints that line once, whatever the number of processes, and leaves with status 2.
"""

from __future__ import annotations

import logging
import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from llava_uhd.errors import LAUNCHER_VARIABLE, USER_ERROR_STATUS, UserError, command


def worth_showing(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's log tells more than the mistake itself."""
    text = record.getMessage()
    return f"(exitcode: {USER_ERROR_STATUS})" not in text and "closing signal" not in text


def main() -> int:
    """Starts the processes and waits for them; returns the status to leave with.

    Raises:
        UserError: what a process met.
    """
    os.environ[LAUNCHER_VARIABLE] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, at length
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(worth_showing)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR_STATUS:
            raise
        reason = failure.error_file_data["message"]
        if isinstance(reason, dict):
            raise UserError(reason["message"]) from error
        return USER_ERROR_STATUS  # an argument parser has spoken
    return 0


if __name__ == "__main__":
    command(main)
