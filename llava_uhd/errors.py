"""The one exception for mistakes a user can mend, and how commands report it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


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
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader (`| head`) left: nothing to say, and nobody to say it to.
        sys.stderr.close()
        status = 0
    sys.exit(status)
