"""A log that a resumed run does not double, a full disk does not tear, and neither stops a run."""

import contextlib
import os
from pathlib import Path

_MOST_WAITING = 8 << 20  # bytes of lines that are kept in memory while they cannot be written


class LogFile:
    """Lines that begin with an ascending number: a step, a miniepoch.

    A resumed run does some steps again, so the lines from `first` on are dropped, and one that a
    kill cut short: each number is there once. A run that starts without a checkpoint appends: what
    is there may be another's. Lines that cannot be written wait, in order, for the next try.

    Args:
        header: line of a new file.
        first: number of the first line that is going to be written; None: append.
    """

    def __init__(self, path: Path, first: int | None, header: str = ""):
        self._path = path
        self._waiting = b""
        size, cut, last, line = 0, None, -1, b"\n"
        with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
            for line in lines:
                number = _number(line)
                if number <= last:  # where a run began to append
                    cut = None
                if cut is None and first is not None:
                    if number >= first or not line.endswith(b"\n"):
                        cut = size
                size, last = size + len(line), number
        if first is None and not line.endswith(b"\n"):
            self._waiting = b"\n"
        self._size = size if cut is None else cut  # of what stays
        if not self._size:
            self._waiting = header.encode()
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


def _number(line: bytes) -> int:
    try:
        return int(line.split(maxsplit=1)[0])
    except (ValueError, IndexError):
        return -1  # a header
