"""Files on disk: where ours are kept, written whole or not at all, and errors in one line."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax.errors import UserError


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/rwkv_jax`, or `~/.cache/rwkv_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rwkv_jax"


@contextlib.contextmanager
def reporting_os_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError into the `UserError` "PATH: cannot ACTION: reason"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot {action}: {error.strerror or error}") from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under, which then replaces it; gone if anything fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def flush_folder(folder: Path) -> None:
    """Makes new names survive a power cut, on systems where folders can be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_utf8(path: Path) -> str:
    """A text file's content, without a byte order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    with reporting_os_errors(path, "read"):
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is not UTF-8") from None
