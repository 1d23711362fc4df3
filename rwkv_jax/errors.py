"""The one error class that a person is meant to read, and how commands meet it."""

import argparse
import contextlib
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from rwkv_jax import __version__


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the file or option, the value, and the way out.
    Commands print it without a traceback; library callers catch it as a `ValueError`.
    """


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong command line as the one line of a `UserError`."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's leaves out -1e-4
        version = f"rwkv-jax {__version__}"
        self.add_argument("--version", action="version", version=version, help="Print the version.")

    def error(self, message: str) -> NoReturn:
        _, found, unknown = message.partition("unrecognized arguments: ")
        near = self._near(unknown.split()[0].partition("=")[0]) if found else []
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        if found and os.path.exists(unknown.split()[0]):  # the shell has made names of a pattern
            hint = "; of several files give the folder, or a pattern in quotes"
        raise UserError(f"{message}{hint} (--help lists the options)")

    def _near(self, typed: str) -> list[str]:
        """The options that one may have meant: a longer or shorter name, else a similar one."""
        if not typed.startswith("--"):
            return []
        typed = "--" + typed[2:].replace("-", "_")
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        known = [name for action in shown for name in action.option_strings if len(name) > 2]
        related = [name for name in known if name.startswith(typed) or typed.startswith(name)]
        return related[:3] or difflib.get_close_matches(typed, known, 1, 0.82)


@contextlib.contextmanager
def _no_traceback_in_a_notebook() -> Iterator[None]:
    """What the exit of a command means is printed; IPython's `%run -m` adds nothing to it."""
    try:
        yield
    except SystemExit as status:
        setattr(status, "_render_traceback_", list)  # noqa: B010  # IPython asks for it
        raise


@_no_traceback_in_a_notebook()
def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command's `main` and exits: 0 on success, 2 on `UserError`, 130 on Ctrl-C.

    What a terminal that is not UTF-8 cannot show becomes a question mark, and no error. A standard
    stream that is closed (`>&-`) is empty, or takes everything.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _clean_up_on_signals():
            main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `… | head` closed our output: not an error of ours
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # without a file name: of standard output
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        if not where:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it is tried once more
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


@contextlib.contextmanager
def _clean_up_on_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a terminal that goes away, exit as an exception does: so that what has
    to be removed or saved is. `nohup` and handlers that are already there stay.
    """

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
