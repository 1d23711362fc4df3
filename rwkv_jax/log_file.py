"""A log that a kill does not double, a full disk does not tear, and neither lets stop a run."""

import contextlib
import os
from pathlib import Path

_MOST_WAITING = 8 << 20  # bytes of lines that are kept in memory while they cannot be written


class LogFile:
    """Lines that begin with an ascending number (a step, a miniepoch), each of them once.

    A run that goes on does some steps again, so opening the file drops the lines from `first` on,
    and one that a kill cut short. Lines that cannot be written wait, in order, for the next try.

    Args:
        header: line of a new file.
        first: number of the first line that is going to be written.
    """

    def __init__(self, path: Path, first: int, header: str = ""):
        self._path = path
        self._waiting = b""
        self._size = 0  # of the whole lines in the file
        with contextlib.suppress(FileNotFoundError), path.open("rb") as lines:
            for line in lines:
                number = line.split(maxsplit=1)[:1]
                if not line.endswith(b"\n") or number and _number(number[0]) >= first:
                    break
                self._size += len(line)
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


def _number(word: bytes) -> int:
    try:
        return int(word)
    except ValueError:
        return -1  # a header
