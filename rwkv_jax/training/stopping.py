"""When a run stops: a signal, or --max_minutes."""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # SIGHUP: ssh or terminal closed
ONE_PRESS_SECONDS = 0.5  # a launcher may forward a Ctrl-C that the terminal has already sent


class Stop:
    """Becomes true when the run should save and stop: on a signal, or when its time is up.

    A second SIGINT ends the process at once, even while XLA compiles and Python waits for it. Every
    file that a run writes appears complete or not at all, so this loses only the steps since the
    last checkpoint.

    Args:
        at: the time to stop, in seconds of `time.monotonic`; None: no limit.

    Attributes:
        reason: the name of the signal, or a note about the time; empty until then.
    """

    def __init__(self, at: float | None):
        self._at = at
        self.reason = ""

    def __bool__(self) -> bool:
        if not self.reason and self._at is not None and time.monotonic() >= self._at:
            self.reason = "--max_minutes reached"
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
    """Reports the first signal and exits at a later SIGINT; runs in its own thread.

    Python runs signal handlers in the main thread, so not before XLA's compiler returns, which can
    take a minute. This thread receives the signal numbers at once.
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
                # An exception would let clean-up wait for the checkpoint that is being written.
                os._exit(130)


def _write_error(text: bytes) -> None:
    with contextlib.suppress(OSError):  # a closed standard error does not stop the run
        os.write(2, text)
