"""Files on disk: where ours are kept, written whole or not at all, and errors in one line."""

import contextlib
import errno
import functools
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax.errors import UserError, signals_raise


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/rwkv_jax`, or `~/.cache/rwkv_jax`; if it cannot be written, one in `$TMPDIR`
    that is removed when the process ends.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "rwkv_jax")
    try:
        if cache.startswith("~"):
            raise FileNotFoundError(2, "no home folder is known")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return Path(_folder_of_this_process(str(folder), error.strerror or str(error)).name)
    return folder


@functools.cache
def _folder_of_this_process(instead_of: str, why: str) -> tempfile.TemporaryDirectory:
    print(
        f"note: {instead_of}: {why}: nothing is kept for the next time; set XDG_CACHE_HOME to a "
        "folder that can be written",
        file=sys.stderr,
    )
    return tempfile.TemporaryDirectory(prefix="rwkv_jax-", ignore_cleanup_errors=True)


@contextlib.contextmanager
def reporting_os_errors(path: Path, action: str) -> Iterator[None]:
    """Turns an OSError into the `UserError` "PATH: cannot ACTION: reason".

    A device is not read: some have no end.
    """
    try:
        if action == "read" and path.is_char_device():
            raise OSError(errno.EINVAL, "it is a device")
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot {action}: {error.strerror or error}") from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write under, which then replaces it; gone if anything fails."""
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path: Path) -> None:
    """Raises before long work what `written_whole` would raise at its end; leaves nothing behind.

    Raises:
        UserError: a file cannot be written there.
    """
    with reporting_os_errors(path, "write"):
        temporary = _beside(path)
        temporary.touch()
        temporary.unlink()


def _beside(path: Path) -> Path:
    if path.exists() and not path.is_file():  # a folder; a device, which has to stay one
        raise OSError(errno.EINVAL, "it is not a regular file; give another name")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def try_lock(file: int, shared: bool = False) -> bool:
    """Whether an open file could be locked: until it is closed, or the process ends in any way.

    False where another process has it, and also where the system or the disk has no locks.
    """
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder `.NAME.…` beside `target` for what is unfinished, removed when the block ends.

    SIGTERM and SIGHUP end the block, and with it the process, by SystemExit. What a process left
    that had no time for that (SIGKILL, a power cut) is removed by the next: each folder holds a
    file that is locked as long as its process lives.

    Raises:
        UserError: it cannot be made.
    """
    with signals_raise():
        with reporting_os_errors(target, "write"):
            target.parent.mkdir(parents=True, exist_ok=True)
            for old in target.parent.glob(f".{glob.escape(target.name)}.*/lock"):
                with contextlib.suppress(OSError):
                    holder = os.open(old, os.O_RDWR)
                    if try_lock(holder):
                        shutil.rmtree(old.parent, ignore_errors=True)
                    os.close(holder)
            folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            with reporting_os_errors(target, "write"):
                # Renamed when it is locked: nobody finds it unlocked while we live.
                lock = os.open(folder / "new", os.O_RDWR | os.O_CREAT)
                try_lock(lock)
                os.rename(folder / "new", folder / "lock")
            try:
                yield folder
            finally:
                os.close(lock)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Makes new names survive a power cut, on systems where folders can be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
