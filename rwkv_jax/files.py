"""Files: the cache folder, atomic writes, and one-line errors."""

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
    """The cache folder: `$XDG_CACHE_HOME/rwkv_jax`, or `~/.cache/rwkv_jax`.

    If it is not writable, a folder in `$TMPDIR` that is removed when the process ends.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "rwkv_jax")
    try:
        if cache.startswith("~"):
            raise FileNotFoundError(2, "no home folder is known")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return Path(_temporary_cache(str(folder), error.strerror or str(error)).name)
    return folder


@functools.cache
def _temporary_cache(instead_of: str, why: str) -> tempfile.TemporaryDirectory:
    print(
        f"note: {instead_of}: {why}: the cache is not writable, so nothing is cached; set "
        "XDG_CACHE_HOME to a writable folder",
        file=sys.stderr,
    )
    return tempfile.TemporaryDirectory(prefix="rwkv_jax-", ignore_cleanup_errors=True)


@contextlib.contextmanager
def reporting_os_errors(path: Path, action: str) -> Iterator[None]:
    """Converts an OSError into the `UserError` "PATH: cannot ACTION: reason".

    Reading a device is refused, because some never end.
    """
    try:
        if action == "read" and path.is_char_device():
            raise OSError(errno.EINVAL, "it is a device")
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot {action}: {error.strerror or error}") from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it replaces `path` at the end, or is removed on failure."""
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path: Path) -> None:
    """Checks, before long work, that `written_whole` can write there; leaves no file.

    Raises:
        UserError: a file cannot be written there.
    """
    with reporting_os_errors(path, "write"):
        temporary = _beside(path)
        temporary.touch()
        temporary.unlink()


def _beside(path: Path) -> Path:
    if path.exists() and not path.is_file():  # a folder, or a device, which must not be replaced
        raise OSError(errno.EINVAL, "it is not a regular file; give another name")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def try_lock(file: int, shared: bool = False) -> bool:
    """Locks an open file until it is closed or the process ends; returns whether it succeeded.

    False if another process holds the lock, and also if the system or the disk has no locks.
    """
    try:
        import fcntl

        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder `.NAME.…` beside `target` for unfinished files, removed when the block ends.

    SIGTERM and SIGHUP end the block and the process by SystemExit. The remains of a process that
    could not clean up (SIGKILL, power loss) are removed by the next one: each folder contains a
    file that stays locked while its process lives.

    Raises:
        UserError: the folder cannot be created.
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
                # Locked before the rename, so that no other process sees it unlocked.
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
    """Flushes a folder so that new names survive a power loss (where the system supports it)."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
