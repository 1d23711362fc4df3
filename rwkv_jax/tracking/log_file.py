"""Log files without duplicate or partial lines; write errors do not stop the run."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_MOST_WAITING = 8 << 20  # bytes of lines that wait in memory while they cannot be written


class LogFile:
    """A log whose lines begin with an ascending number: a step or a miniepoch.

    A resumed run repeats some steps, so the lines from `first` on are dropped, and so are the
    remains of a kill or a power loss at the end: each number occurs once. A run without a
    checkpoint appends and keeps existing lines, which may be another run's; only NUL bytes at the
    end are removed. Lines that cannot be written wait, in order, for the next try.

    Args:
        header: the first line of a new file.
        first: number of the first line to be written; None: append.
    """

    def __init__(self, path: Path, first: int | None, header: str = ""):
        self._path = path
        self._waiting = b""
        self._size, line_ends = 0, True  # of the part of the file that is kept
        with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
            self._size, line_ends = _kept_size(lines, first, header.encode())
        if not self._size:
            self._waiting = header.encode()
        elif not line_ends:
            self._waiting = b"\n"
        self.append("")

    def append(self, line: str) -> str:
        """Writes a line with its newline; returns the reason if the line has to wait, else ""."""
        if len(self._waiting) < _MOST_WAITING:
            self._waiting += line.encode()
        try:
            with open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", 0) as file:
                self._size = min(self._size, os.fstat(file.fileno()).st_size)  # may be removed
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
        """Flushes to disk, so that the lines survive a power loss."""
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            os.fsync(file.fileno())


def _kept_size(lines: Iterable[bytes], first: int | None, header: bytes) -> tuple[int, bool]:
    """The number of bytes of a file that `LogFile` keeps, and whether they end a line."""
    size, cut, last, line = 0, None, -1, b""
    for line in lines:
        number = _number(line)
        if number is not None and _is_complete(line):
            if number <= last or (first is not None and number < first):
                cut = None  # another run appended here, or a run resumed after a crash
            if cut is None and first is not None and number >= first:
                cut = size
            last = number
        elif cut is None and not _is_complete(line):
            cut = size
        size += len(line)
    if first is not None:
        return (size, True) if cut is None else (cut, True)
    text = line.rstrip(b"\0")
    size -= len(line) - len(text)
    if header.startswith(text) and size == len(text):  # nothing but (a part of) the header
        return 0, True
    return size, not text or text.endswith(b"\n")


def _number(line: bytes) -> int | None:
    try:
        return int(line.split(maxsplit=1)[0])
    except (ValueError, IndexError):
        return None  # a header


def _is_complete(line: bytes) -> bool:
    """Whether the line is complete text. A power loss may leave other bytes, mostly NUL."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return False
    return text.endswith("\n") and text.rstrip().expandtabs().isprintable()
