"""The one exception for mistakes a user can mend, and how commands report it."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

USER_ERROR_STATUS = 2
# A signal ended a run after its checkpoint was written: the same command goes on (EX_TEMPFAIL).
STOPPED_STATUS = 75
INTERRUPTED_STATUS = 130
# Set by `llava_uhd.launch`: many processes make the same mistake, the launcher tells it once.
LAUNCHER_VARIABLE = "LLAVA_UHD_LAUNCHER"
# How torch begins the message of an error that it brings over from a worker.
CAUGHT = re.compile(r"Caught (\w+) in .*\nOriginal Traceback")


class UserError(ValueError):
    """A mistake in a path, value or file: one line that names it and says what to do.

    Commands print it without a traceback and leave with status 2; library callers can catch it
    as a ``ValueError``.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_own_words(message))


def _own_words(message: str) -> str:
    """The message, without the traceback that a data loader puts around that of its worker."""
    caught = CAUGHT.match(message)
    if caught is None:
        return message
    return message.rpartition(f"{caught[1]}: ")[2].strip() or message


def make_folder(path: Path, what: str) -> None:
    """Makes a folder to write into, before the work whose result it takes.

    Raises:
        UserError: it cannot be made, or a file stands there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{what} {path} cannot be made: {error.strerror or error}") from error


def _tell(error: UserError) -> None:
    """Prints the line, or leaves it for the launcher where torchrun looks for reasons."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and LAUNCHER_VARIABLE in os.environ:
        reason = {"message": str(error), "extraInfo": {"timestamp": int(time.time())}}
        Path(file).write_text(json.dumps({"message": reason}), encoding="utf-8")
    else:
        print(f"error: {error}", file=sys.stderr)


def command(main: Callable[[], int | None]) -> NoReturn:
    """Runs the ``main`` of a command and leaves the process with its status.

    Status 0 is success, 2 a `UserError` (printed as one line on stderr), 130 an interrupt; 75 is
    what a training run returns that a signal ended behind a checkpoint.
    """
    try:
        status = main() or 0
    except UserError as error:
        _tell(error)
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED_STATUS
    except BrokenPipeError:
        # The reader (`| head`) left: nothing to say, and nobody to say it to.
        sys.stderr.close()
        status = 0
    sys.exit(status)
