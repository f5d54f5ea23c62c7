"""``python -m llava_uhd.launch [options] -m MODULE ...``: torchrun, but brief when a user errs.

torchrun turns the one line of a `UserError` into a page of its own traceback and status 1. Here
the launcher leaves with the status of the process that failed first and adds nothing to a line
that has said it all.
"""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from llava_uhd.errors import USER_ERROR_STATUS, command


def worth_showing(record: logging.LogRecord) -> bool:
    """Whether a line of torchrun's log tells more than the failed process has told."""
    text = record.getMessage()
    return f"(exitcode: {USER_ERROR_STATUS})" not in text and "closing signal" not in text


def main() -> int:
    """Starts the processes and waits for them; returns the status to leave with."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(worth_showing)
    try:
        run(parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR_STATUS:
            raise
        return USER_ERROR_STATUS
    return 0


if __name__ == "__main__":
    command(main)
