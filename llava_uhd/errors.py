"""The one exception for mistakes a user can mend, and how commands report it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_STATUS = 2


class UserError(ValueError):
    """A mistake in a path, value or file: one line that names it and says what to do.

    Commands print it without a traceback and leave with status 2; library callers can catch it
    as a ``ValueError``.
    """


def command(main: Callable[[], int | None]) -> NoReturn:
    """Runs the ``main`` of a command and leaves the process with its status.

    Status 0 is success, 2 a `UserError` (printed as one line on stderr), 130 an interrupt.
    """
    try:
        status = main() or 0
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # Most mistakes are made by all processes alike: the launcher ends this one as soon as
            # the first has spoken. What only this one met is still told.
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
        status = USER_ERROR_STATUS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader (`| head`) left: nothing to say, and nobody to say it to.
        sys.stderr.close()
        status = 0
    sys.exit(status)
