"""A log that a resumed run does not double, a full disk does not tear, and neither stops a run."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_MOST_WAITING = 8 << 20  # bytes of lines that are kept in memory while they cannot be written


class LogFile:
    """Lines that begin with an ascending number: a step, a miniepoch.

    A resumed run does some steps again, so the lines from `first` on are dropped, and so is what a
    kill or a power cut left at the end: each number is there once. A run that starts without a
    checkpoint appends: what is there may be another's, but for NUL bytes at the end. Lines that
    cannot be written wait, in order, for the next try.

    Args:
        header: line of a new file.
        first: number of the first line that is going to be written; None: append.
    """

    def __init__(self, path: Path, first: int | None, header: str = ""):
        self._path = path
        self._waiting = b""
        self._size, line_ends = 0, True  # of what stays
        with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
            self._size, line_ends = _what_stays(lines, first, header.encode())
        if not self._size:
            self._waiting = header.encode()
        elif not line_ends:
            self._waiting = b"\n"
        self.append("")

    def append(self, line: str) -> str:
        """Writes a line (it ends in a newline); returns why that has to wait, or ""."""
        if len(self._waiting) < _MOST_WAITING:
            self._waiting += line.encode()
        try:
            with open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0) as file:
                self._size = min(self._size, os.fstat(file.fileno()).st_size)  # or it was removed
                file.truncate(self._size)
                file.seek(self._size)
                written = file.write(self._waiting)
            if written != len(self._waiting):
                return "no space left"
        except OSError as error:
            return error.strerror or str(error)
        self._size += written
        self._waiting = b""
        return ""

    def flush(self) -> None:
        """Makes what is written survive a power cut."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            os.fsync(file.fileno())


def _what_stays(lines: Iterable[bytes], first: int | None, header: bytes) -> tuple[int, bool]:
    """How many bytes of a file `LogFile` leaves, and whether they end a line."""
    size, cut, last, line = 0, None, -1, b""
    for line in lines:
        number = _number(line)
        if number is not None and _is_whole(line):
            if number <= last or (first is not None and number < first):
                cut = None  # a run began to append here, or resumed after what a crash had left
            if cut is None and first is not None and number >= first:
                cut = size
            last = number
        elif cut is None and not _is_whole(line):
            cut = size
        size += len(line)
    if first is not None:
        return (size, True) if cut is None else (cut, True)
    text = line.rstrip(b"\0")
    size -= len(line) - len(text)
    if header.startswith(text) and size == len(text):  # that is all
        return 0, True
    return size, not text or text.endswith(b"\n")


def _number(line: bytes) -> int | None:
    try:
        return int(line.split(maxsplit=1)[0])
    except (ValueError, IndexError):
        return None  # a header


def _is_whole(line: bytes) -> bool:
    """Whether it ends, and has no bytes but text: a power cut leaves others, NUL for the most."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return False
    return text.endswith("\n") and text.rstrip().expandtabs().isprintable()
