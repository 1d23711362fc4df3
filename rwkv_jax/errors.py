"""`UserError`, the error class for users, and how commands report it."""

import argparse
import contextlib
import difflib
import io
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rwkv_jax import __version__


class UserError(ValueError):
    """An input from the user cannot be used.

    The message is one line that names the file or option, the value, and a fix.
    Commands print it without a traceback; library callers catch it as a `ValueError`.
    """


def path_argument(text: str) -> str:
    """Expands `~` and `~user` in a path argument, as in `--proj_dir=~/out`.

    Shells do not expand them after an equals sign.

    Raises:
        argparse.ArgumentTypeError: it is empty, or there is no such user.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty; give a path")
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(
            f"{text}: there is no such user; for a file, write ./{text}"
        )
    return path


def whole_number(text: str) -> int:
    """Parses an integer of 64 bits, also written as 1e6.

    Raises:
        argparse.ArgumentTypeError: it is not an integer, or beyond 64 bits.
    """
    try:
        value = int(text)
    except ValueError:
        try:
            value = int(float(text))
            exact = value == float(text)
        except (ValueError, OverflowError):
            exact = False
        if not exact:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is beyond 64 bits")
    return value


def called_as() -> str:
    """The command as it was typed: `python -m rwkv_jax.train`, `python make_data.py`, `rwkv-jax`.

    argparse does the same from Python 3.14 on. `rwkv_jax.cli` adds the subcommand to `sys.argv[0]`.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.name != "rwkv_jax.__main__":
        return f"python -m {spec.name.removesuffix('.__main__')}"
    name = os.path.basename(sys.argv[0])
    return f"python {name}" if name.endswith(".py") else name


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong command line as a `UserError` of one line.

    Arguments of `type=Path` are parsed by `path_argument`, those of `type=int` by `whole_number`.
    The name of the program is `called_as`.
    """

    def __init__(self, **settings: Any):
        super().__init__(**{"prog": called_as()} | settings)
        self.register("type", int, whole_number)
        self.register("type", Path, lambda text: Path(path_argument(text)))
        self._negative_number_matcher = re.compile(
            r"-\.?\d"
        )  # argparse's own pattern does not match -1e-4
        version = f"rwkv-jax {__version__}"
        self.add_argument("--version", action="version", version=version, help="Print the version.")

    def parse_known_args(self, *arguments: Any, **settings: Any) -> Any:
        """As the base class; before Python 3.13 it turns `--name=--` into an empty list."""
        namespace, rest = super().parse_known_args(*arguments, **settings)
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if action.nargs is None and (value == [] or value == [[]]) and value != action.default:
                self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        _, _, unknown = message.partition("unrecognized arguments: ")
        first = next(iter(unknown.split()), "")
        similar = self._similar(first.partition("=")[0])
        hint = f"; did you mean {' or '.join(similar)}?" if similar else ""
        takes_files = any(action.dest == "data_file" for action in self._actions)
        if takes_files and first and os.path.exists(first):  # the shell has expanded a pattern
            hint = "; for several files, give the folder or a quoted pattern"
        raise UserError(f"{message}{hint} (--help lists the options)")

    def _similar(self, typed: str) -> list[str]:
        """Suggestions for an unknown option: longer or shorter names, else similar ones."""
        if not typed.startswith("--"):
            return []
        typed = "--" + typed[2:].replace("-", "_")
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS)
        known = [name for action in shown for name in action.option_strings if len(name) > 2]
        related = [name for name in known if name.startswith(typed) or typed.startswith(name)]
        return related[:3] or difflib.get_close_matches(typed, known, 1, 0.82)


@contextlib.contextmanager
def _no_traceback_in_a_notebook() -> Iterator[None]:
    """Keeps IPython's `%run -m` from adding a traceback to an error that is already printed."""
    try:
        yield
    except SystemExit as status:
        setattr(status, "_render_traceback_", list)  # noqa: B010  # IPython asks for it
        raise


@_no_traceback_in_a_notebook()
def run_command(main: Callable[[], None]) -> NoReturn:
    """Runs a command's `main` and exits: 0 on success, 2 on `UserError`, 130 on Ctrl-C.

    On a terminal that is not UTF-8, characters that cannot be shown become question marks. A closed
    standard stream (`>&-`) is replaced by the null device. Warnings of libraries are not shown,
    unless Python is asked for them (`-W`, `PYTHONWARNINGS`).

    A bug is also reported in one line, which names a file with the traceback. If jax or the system
    runs out of memory, one line says so.
    """

    def print_error(message: object) -> None:
        with contextlib.suppress(OSError):  # the stream may be closed
            print(one_line(message), file=sys.stderr, flush=True)

    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with signals_raise(), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            main()
        sys.stdout.flush()
    except BrokenPipeError:  # `… | head` closed our output: not an error
        sys.exit(141)
    except (Exception, KeyboardInterrupt) as error:
        message, status = message_and_status(error)
        print_error(message)
        sys.exit(status)
    finally:
        _discard_output()
    sys.exit(0)


def message_and_status(error: BaseException) -> tuple[str, int]:
    """The message and the exit status for an exception that ends a command."""
    if isinstance(error, UserError):
        return f"error: {error}", 2
    if isinstance(error, OSError):  # an error of standard output has no file name
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror or error}", 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    message, status = _unexpected(error)
    return f"error: {message}", status


def one_line(message: object) -> str:
    """The message in one line; characters that break the line or move the cursor are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))


def _unexpected(error: BaseException) -> tuple[str, int]:
    """The message and the exit status for an unexpected exception."""
    first = next(iter(str(error).splitlines()), "")
    jax = sys.modules.get("jax")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in first:
        return f"out of memory: {first}; use a smaller model or batch, or free some memory", 2
    if jax and isinstance(error, jax.errors.JaxRuntimeError):
        return f"jax: {first}", 2
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    if os.path.basename(raised_in) == "xla_bridge.py":  # jax raises no specific class for this
        platforms = os.environ.get("JAX_PLATFORMS", "")
        what = f"JAX_PLATFORMS={platforms}: jax does not start" if platforms else "jax fails"
        return f"{what}: {first or type(error).__name__}; run python -m rwkv_jax.doctor", 2
    name = f"{type(error).__name__}: {first}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="rwkv_jax-", suffix=".txt", encoding="utf-8", errors="replace", delete=False
        ) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        traceback.print_exception(error)
        return f"unexpected {name}; please report it with the traceback above", 1
    return f"unexpected {name}; please report it with the traceback in {file.name}", 1


def _open_closed_streams() -> None:
    """Replaces a closed standard stream: stdin by an empty one, stdout and stderr by a null device.

    Otherwise the next opened file would get its file descriptor, and libraries would print into
    that file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            try:
                os.fstat(number)
            except OSError:
                os.dup2(null, number)
            if null != number:
                os.close(null)
            setattr(sys, name, open(os.devnull, mode))


def _discard_output() -> None:
    """Discards output that cannot be written; otherwise Python would retry at exit."""
    for name in ("stdout", "stderr"):
        with contextlib.suppress(OSError, ValueError):
            number = getattr(sys, name).fileno()
            try:
                getattr(sys, name).flush()
            except OSError:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Context in which SIGTERM and SIGHUP (a closed terminal) raise SystemExit, so that clean-up
    code runs. Handlers that are already installed stay.
    """
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) == signal.SIG_DFL
    ]

    def leave(number: int, _: object) -> NoReturn:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # do not interrupt the clean-up
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def suppress_stderr() -> Iterator[None]:
    """Suppresses what libraries, in any language, write to standard error inside the block.

    It is shown if the block raises anything but a `UserError`.
    """
    if sys.stderr:
        sys.stderr.flush()
    try:
        before = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except BaseException:
            os.dup2(before, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
