"""The one error class that a person is meant to read, and how commands print it."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or option, the value, and the way out.
    Commands print it without a traceback; library callers catch it as a `ValueError`.
    """


def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command's `main` and exits: 0 on success, 2 on `UserError`, 130 on Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `… | head` closed our output: not an error of ours
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
