"""When a run stops: a signal, or --max_minutes."""

import contextlib
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import Any

STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # the last when ssh or a terminal goes
ONE_PRESS_SECONDS = 0.5  # a launcher may pass on the Ctrl-C that the terminal has sent already


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
