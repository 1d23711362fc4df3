"""A run as a thing with an identity: what makes it this one, who may resume it, when it stops and
when it saves.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from rwkv_jax.checkpoint import MANIFEST, About, Checkpoints
from rwkv_jax.config import TrainConfig
from rwkv_jax.dataset import Dataset, fingerprint
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors
from rwkv_jax.step import TrainState

RETRY_SECONDS = 60.0  # after a checkpoint that could not be written
STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # the last when ssh or a terminal goes
ONE_PRESS_SECONDS = 0.5  # a launcher may pass on the Ctrl-C that the terminal has sent already

WEIGHTS = "weights of load_model"  # in a run's identity: what they are, not where
_GONE = "missing"  # instead of these, where --load_model names nothing

# Options that may change when a run is resumed; every later step is another for it.
_CHANGEABLE = (
    "my_exit_tokens",
    "lr_init",
    "lr_final",
    "warmup_steps",
    "beta1",
    "beta2",
    "adam_eps",
    "weight_decay",
    "grad_clip",
    "precision",
)


def identity(config: TrainConfig, data: Dataset, batch: int) -> dict[str, Any]:
    """What a run is made of besides its model: with the step number, all that a step depends on.

    Nothing is drawn at random but the initial weights, by random_seed: there is no other key.
    """
    return {
        "data": fingerprint(data.tokens),
        "samples a step": batch,
        "ctx_len": config.ctx_len,
        "magic_prime": data.magic_prime,
        "epoch_begin": config.epoch_begin,
        "random_seed": config.random_seed,
        WEIGHTS: weights_fingerprint(config.load_model),
        **{name: getattr(config, name) for name in _CHANGEABLE},
    }


def weights_fingerprint(load_model: str) -> str:
    """Tells the content of one --load_model from another's; empty for none.

    A folder is known by the manifest of its newest checkpoint, which has the hash of every file.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(load_model)
    if load_model and path.is_dir() and not (path / MANIFEST).exists():
        path = path / "checkpoints" / str(next(iter(Checkpoints(path / "checkpoints").steps()), ""))
    file = path / MANIFEST if path.is_dir() else path
    if not load_model or not file.exists():
        return _GONE if load_model else ""
    with reporting_os_errors(file, "read"):
        content = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
    return fingerprint(content)


def resumed_weights(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The `WEIGHTS` of a resumed run, which needs no --load_model: it may be left out, or be gone.

    None: not known, of a checkpoint from before they were recorded.
    """
    begun, given = then.get(WEIGHTS), now[WEIGHTS]
    return begun if not given or (given == _GONE and begun != "") else given


def changes(then: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What has changed, as "name old, not new": what makes it another run, and what may change.

    A run that began with --load_model continues without it, too.
    """
    now = {**now, WEIGHTS: resumed_weights(then, now)}
    if then.get(WEIGHTS) is None:
        then = {**then, WEIGHTS: now[WEIGHTS]}
    differing = [name for name in now if then.get(name) != now[name]]
    given = {name: "unset" if now[name] is None else now[name] for name in differing}
    told = {name: f"{name} {then.get(name) or 'unset'}, not {given[name]}" for name in differing}
    return (
        [told[name] for name in differing if name not in _CHANGEABLE],
        [told[name] for name in differing if name in _CHANGEABLE],
    )


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run's output folder, cleared of exports that were cut short.

    The system lets go of it when the process ends, however that happens.

    Raises:
        UserError: another process holds it.
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
                f"--proj_dir {folder}: another trainer is at work there ({holder}); wait for it, "
                "or give another folder"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"note: {folder} cannot be locked: {error.strerror}", file=sys.stderr)
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
        for leftover in folder.glob(".*.pth.*.tmp"):  # of an export that was killed
            leftover.unlink(missing_ok=True)
        yield


class Stop:
    """True from the moment at which the run should save and end: a signal, or its time is up.

    A second SIGINT ends the process at once, also while XLA compiles and Python waits for it. Every
    file that a run writes appears complete or not at all, so that costs the steps since the last
    checkpoint and no more.

    Args:
        at: by `time.monotonic`, or None.
    """

    def __init__(self, at: float | None):
        self._at = at
        self.reason = ""

    def __bool__(self) -> bool:
        if not self.reason and self._at is not None and time.monotonic() >= self._at:
            self.reason = "--max_minutes are over"
        return bool(self.reason)

    def __enter__(self) -> "Stop":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            numbers, self._wake = socket.socketpair()
            self._wake.setblocking(False)
            self._woken_before = signal.set_wakeup_fd(self._wake.fileno())
            for number in STOPPING:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                    self._before[number] = signal.signal(number, self._note)
            threading.Thread(target=_answer, args=(numbers,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._woken_before)
            self._wake.close()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name


def _answer(numbers: socket.socket) -> None:
    """Tells of the first signal, and leaves at a later SIGINT; in a thread of its own.

    Python calls handlers in the main thread, when it next gets there: not ahead of the compiler's
    end, which can be a minute away. The numbers of signals come here when they happen.
    """
    first_at = None
    with numbers:
        while received := numbers.recv(1):
            number, now = received[0], time.monotonic()
            if number not in STOPPING:
                continue
            if first_at is None:
                first_at = now
                _write_error(b"\nstopping after this step; Ctrl-C again stops at once\n")
            elif number == signal.SIGINT and now - first_at > ONE_PRESS_SECONDS:
                _write_error(b"\x1b[?25h\n" if os.isatty(2) else b"\n")  # bars hide the cursor
                # Not an exception: clean-up would wait for the checkpoint that is being written.
                os._exit(130)


def _write_error(text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading any more: that stops nothing
        os.write(2, text)


class Saver:
    """Writes checkpoints when it is time to. What goes wrong is reported and retried, not raised.

    Args:
        say: takes a line for the person who watches.
    """

    def __init__(self, checkpoints: Checkpoints, config: TrainConfig, say: Callable[[str], None]):
        self._checkpoints, self._say = checkpoints, say
        self._every_steps = config.save_every_steps
        self._seconds = 60.0 * config.save_every_minutes or float("inf")
        self._due_at = time.monotonic() + self._seconds
        self._begun = True

    def due(self, done: int) -> bool:
        """Whether a checkpoint should be written now that so many steps are done."""
        return bool(self._every_steps) and done % self._every_steps == 0

    def overdue(self) -> bool:
        """Whether one should be written for the time that has passed, as this process sees it."""
        self._telling(self._checkpoints.check)
        return time.monotonic() >= self._due_at

    def save(self, step: int, state: TrainState, about: About) -> None:
        """Starts a checkpoint; the arrays may be overwritten when this returns."""
        self._due_at = time.monotonic() + self._seconds
        self._telling(
            self._checkpoints.close
        )  # if that of before failed, this is tried all the same
        self._begun = self._telling(lambda: self._checkpoints.save(step, state, about))

    def finish(self) -> bool:
        """Waits for the last checkpoint; whether it is on disk."""
        return self._telling(self._checkpoints.close) and self._begun

    def _telling(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except UserError as error:
            self._say(f"warning: {error}; the earlier checkpoints are as they were")
            self._due_at = time.monotonic() + RETRY_SECONDS
            return False
        return True
