"""The progress line of a run, and the detection of loss spikes."""

import collections
import datetime
import math
import os
import statistics
import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 10.0  # without a terminal


def print_line(text: str) -> None:
    """Prints a line; a closed pipe or a full disk does not stop the run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Otherwise Python would try to write it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass


class ProgressLine:
    """Step, loss, running loss, learning rate, speed, time left, and MFU if the peak is known.

    On a terminal it is a bar; elsewhere a line every ten seconds (and for the first and the last
    step), so that a log file stays readable. The speed is that of the last minute or so.

    Args:
        first, last: steps of this run, [first, last).
        tokens: tokens of one step.
        bar: draw the bar; None: if standard output is a terminal.
        peak: tokens per second at the peak of the devices; 0: unknown.
    """

    def __init__(
        self, first: int, last: int, tokens: int, bar: bool | None = None, peak: float = 0.0
    ):
        self.last, self.tokens, self.peak = last, tokens, peak
        self._times: list[tuple[int, float]] = []  # (step, time at which it was complete)
        self._printed = -math.inf
        console = Console()
        self._bar: Progress | None = None
        if console.is_terminal if bar is None else bar:
            columns = (BarColumn(16), TextColumn("{task.description}", markup=False))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("compiling the step …", total=last, completed=first)
            self._bar.start()
        else:
            print_line("compiling the step …")

    def show(self, step: int, loss: float, running: float, rate: float, norm: float) -> float:
        """Shows a completed step; returns its speed in tokens per second (0: not known yet).

        It shows the speed over the last minute or so, and returns the speed of this step alone,
        including the time that a checkpoint or export took.

        Args:
            running: mean loss of the miniepoch so far.
            norm: global norm of the gradient before clipping.
        """
        now = time.monotonic()
        self._times = [at for at in self._times if now - at[1] < 60.0 or at is self._times[-1]]
        self._times.append((step, now))
        (old_step, old), done = self._times[0], step + 1
        pace = (step - old_step) / (now - old) if step > old_step else 0.0  # steps per second
        text = f"step {done}/{self.last} loss {loss:.4f} running {running:.4f} lr {rate:.2e}"
        more = f"norm {norm:.2f}"
        if pace:  # known from the second step on
            left = datetime.timedelta(seconds=round((self.last - done) / pace))
            more += f" {pace:.2f} it/s {pace * self.tokens / 1000:.2f} Kt/s left {left}"
            if self.peak:
                more += f" MFU {pace * self.tokens / self.peak:.1%}"
        if self._bar:  # on two lines: next to the bar, 80 columns hold only half of the text
            self._bar.update(self._task, completed=done, description=f"{text}\n{more}")
        elif now - self._printed >= SECONDS_BETWEEN_LINES or done == self.last:
            print_line(f"{text} {more}")
            self._printed = now
        last_step, last = self._times[-2] if len(self._times) > 1 else (step, now)
        return (step - last_step) / (now - last) * self.tokens if now > last else 0.0

    def print_line(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print_line(text)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


class LossWatch:
    """Detects loss spikes.

    A spike is a loss more than `SIGMAS` standard deviations, and more than `LEAST`, above the mean
    of the last `WINDOW` losses (at least 32 of them).
    """

    WINDOW, SIGMAS, LEAST = 128, 6.0, 0.5

    def __init__(self) -> None:
        self._last: collections.deque[float] = collections.deque(maxlen=self.WINDOW)

    def add(self, loss: float) -> str:
        """Adds a loss; returns a description if it is a spike, else ""."""
        description = ""
        if len(self._last) >= self.WINDOW // 4:
            mean, deviation = statistics.fmean(self._last), statistics.pstdev(self._last)
            if loss > mean + max(self.SIGMAS * deviation, self.LEAST):
                description = f"loss {loss:.4f} after a mean of {mean:.4f}, a spike"
        self._last.append(loss)
        return description
