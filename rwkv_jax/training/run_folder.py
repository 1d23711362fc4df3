"""The files of a run's output folder, and the lock on the folder."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rwkv_jax.errors import UserError
from rwkv_jax.tracking.step_log import STEP_LOG, read_step_log

INIT = "rwkv-init.pth"
FINAL = "rwkv-final.pth"
_NUMBERED = re.compile(r"rwkv-(\d+)\.pth")


def exported(folder: Path) -> list[int]:
    """Returns the n of all rwkv-{n}.pth in a folder, largest first."""
    names = (_NUMBERED.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in names if match), reverse=True)


def logged_tokens(folder: Path) -> float:
    """Returns a run's token count according to its log (seven digits); 0 if there is no log."""
    with contextlib.suppress(UserError):
        return 1e9 * read_step_log(folder / STEP_LOG)["Gtokens"].max(initial=0.0)
    return 0.0


def export_path(folder: Path, number: int) -> Path:
    """Returns the path of rwkv-{number}.pth; of rwkv-init.pth for −1."""
    return folder / (f"rwkv-{number}.pth" if number >= 0 else INIT)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Locks a run's output folder and removes its incomplete exports.

    The system releases the lock when the process ends for any reason.

    Raises:
        UserError: another process has locked the folder, or the lock file cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    try:
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--proj_dir {folder}: {error.strerror}; give another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip()
            raise UserError(
                f"--proj_dir {folder}: another trainer is using this folder ({holder}); wait for "
                "it, or give another folder"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"note: {folder} cannot be locked: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
        for leftover in folder.glob(".*.pth.*.tmp"):  # of exports that were killed
            leftover.unlink(missing_ok=True)
        yield
