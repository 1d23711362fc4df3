"""When and in which order a run saves, and how it handles failures."""

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import jax

from rwkv_jax.checkpoints.store import Checkpoints, Metadata
from rwkv_jax.errors import UserError
from rwkv_jax.tracking.progress import print_line
from rwkv_jax.tracking.train_log import MiniepochLoss
from rwkv_jax.training.exports import Exporter
from rwkv_jax.training.optimizer import with_updates
from rwkv_jax.training.report import Report
from rwkv_jax.training.run import Run
from rwkv_jax.training.run_folder import FINAL
from rwkv_jax.training.step import TrainState

RETRY_SECONDS = 60.0  # between a failed save and the next try


class Saver:
    """Saves the checkpoints and the .pth files of a run, in an order that loses neither.

    The .pth files of a step are written before its checkpoint, so that no earlier file is missing
    after a resume. The first export waits for the first checkpoint, because weights without a
    checkpoint look like another trainer's run or one whose checkpoints were removed; a resumed run
    writes the missing files. As a context manager it waits for the last checkpoint.
    """

    def __init__(self, run: Run, report: Report):
        self._run, self._report = run, report
        self.exporter = Exporter(run, report.log)
        config = run.config
        self._writer = CheckpointWriter(
            run.checkpoints, config.save_every_steps, config.save_every_minutes, report.log
        )

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.finish()

    def due(self, step: int) -> bool:
        """Whether a file or a checkpoint is due after a step, by the number of steps."""
        return bool(self.exporter.names_after(step)) or self._writer.due_after(step)

    def overdue(self) -> bool:
        """Whether a checkpoint is due by time, on this process's clock."""
        return self._writer.overdue()

    def save(self, step: int, state: TrainState, stopping: bool) -> None:
        """Saves the state after a step.

        While steps are skipped, only .pth files are written, except when the run ends or stops.
        """
        self._report.catch_up()
        exports = self.exporter.names_after(step)
        keep = FINAL in exports or stopping or not self._report.skipped
        checkpoint_first = bool(exports) and self.exporter.is_first
        if keep and checkpoint_first:
            self._checkpoint(step + 1, state, self._report.running)
            self._writer.finish()
        self.exporter.write(exports, state.params)
        if keep and not checkpoint_first:
            self._checkpoint(step + 1, state, self._report.running)

    def save_before_bad_data(self, step: int, state: TrainState) -> None:
        """Saves the state before a step whose batch cannot be read."""
        if jax.process_count() == 1:  # else other processes have already started this step
            self._report.catch_up()
            self._checkpoint(step, state, self._report.running)

    def stop_diverged(self, state: TrainState) -> NoReturn:
        """Saves the state before the skipped steps, and stops the run.

        Raises:
            UserError: always.
        """
        first = self._report.skipped[0]  # since then only the schedule has advanced
        updates = first - self._run.schedule.first_step
        state = state._replace(opt_state=with_updates(state.opt_state, updates))
        self._checkpoint(first, state, self._report.before)
        saved = ", saved in the state before them" if self._writer.finish() else ""
        raise UserError(
            f"no finite loss or gradient in {self._report.PATIENCE} steps from step {first} on "
            f"({self._report.at(first)}): stopped{saved}; try a lower --lr_init, "
            "--precision fp32 or other data"
        )

    def stop_early(self, step: int) -> NoReturn:
        """Ends the process after a saved step.

        Raises:
            SystemExit: always, with status 1.
        """
        if self._writer.finish():
            print_line(f"stopped and saved at step {step + 1}: the same command resumes from there")
        sys.exit(1)

    def _checkpoint(self, step: int, state: TrainState, loss: MiniepochLoss) -> None:
        self._report.flush()
        metadata = dataclasses.replace(self._run.start.metadata, loss=loss)
        self._writer.save(step, state, metadata)


class CheckpointWriter:
    """Writes checkpoints. Errors are reported and the save is retried; they are not raised.

    Args:
        every_steps: steps between two checkpoints; 0 disables this interval.
        every_minutes: minutes between two checkpoints; 0 disables this interval.
        log: prints a line for the user.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        every_steps: int,
        every_minutes: float,
        log: Callable[[str], None],
    ):
        self._checkpoints, self._log = checkpoints, log
        self._every_steps = every_steps
        self._seconds = 60.0 * every_minutes or float("inf")
        self._due_at = time.monotonic() + self._seconds
        self._started = True

    def due_after(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by `every_steps`."""
        return bool(self._every_steps) and (step + 1) % self._every_steps == 0

    def overdue(self) -> bool:
        """Whether a checkpoint is due by time, on this process's clock."""
        self._reporting(self._checkpoints.check)
        return time.monotonic() >= self._due_at

    def save(self, step: int, state: TrainState, metadata: Metadata) -> None:
        """Starts to write a checkpoint; the arrays may be overwritten after it returns."""
        self._due_at = time.monotonic() + self._seconds
        self._reporting(self._checkpoints.close)  # an earlier failure does not prevent this save
        self._started = self._reporting(lambda: self._checkpoints.save(step, state, metadata))

    def finish(self) -> bool:
        """Waits for the last checkpoint; returns whether it is on disk."""
        return self._reporting(self._checkpoints.close) and self._started

    def _reporting(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except UserError as error:
            self._log(f"warning: {error}; the earlier checkpoints are unchanged")
            self._due_at = time.monotonic() + RETRY_SECONDS
            return False
        return True
