"""Reports the metrics of each step to the terminal, logs and trackers, and detects problems."""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rwkv_jax.parallel import distributed
from rwkv_jax.tracking.progress import LossWatch, ProgressLine, print_line
from rwkv_jax.tracking.step_log import StepLog
from rwkv_jax.tracking.trackers import open_trackers
from rwkv_jax.tracking.train_log import TrainLog
from rwkv_jax.training.run import Run
from rwkv_jax.training.step import Metrics


class Report(contextlib.ExitStack):
    """Reports the metrics of each step, in order.

    Attributes:
        running: the mean loss of the miniepoch so far.
        skipped: the latest consecutive steps that were skipped because they were not finite.
        before: `running` before these steps.
    """

    PATIENCE = 8  # a run stops after this many consecutive non-finite steps

    def __init__(self, run: Run):
        super().__init__()
        self._run, config, start = run, run.config, run.start
        self.running, self.skipped = start.metadata.loss, list[int]()
        self.before = copy.copy(self.running)
        self.log: Callable[[str], None] = print_line
        folder = run.folder
        if not distributed.is_first():
            folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        # Opened before the progress bar: a tracker may ask the user a question.
        self._trackers = self._open_trackers(folder)
        self._watch = LossWatch()
        self._pending: tuple[int, Metrics] | None = None
        self._rates = run.rates  # compiled before the first step, not beside it
        miniepoch = run.schedule.miniepoch(start.step)
        self._train_log = TrainLog(folder, miniepoch if start.resumed else None, config.epoch_begin)
        self._step_log = StepLog(folder, start.step if start.resumed else None)
        self._progress = ProgressLine(
            start.step,
            run.schedule.last_step,
            run.schedule.tokens_per_step,
            {"auto": None, "True": True, "False": False}[config.enable_progress_bar],
            run.peak_tokens_per_second,
        )
        self.log = self._progress.print_line
        self.callback(self._progress.close)
        self.callback(self.flush)

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes the step just launched and reports the previous one, which is complete."""
        self.catch_up()
        self._pending = step, metrics

    def catch_up(self) -> None:
        """Waits for the last launched step and reports it."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._report(*pending)

    def diverged(self, metrics: Metrics) -> bool:
        """Whether the last `PATIENCE` reported steps and the step just launched are not finite."""
        return len(self.skipped) >= self.PATIENCE and bool(metrics.skipped)

    def _open_trackers(self, folder: Path) -> list[Any]:
        """Opens the trackers of the first process, until this report is closed."""
        run = self._run
        trackers = open_trackers(
            run.config,
            run.model,
            _resolved_options(run),
            folder,
            lambda text: self.log(text),
            run.start.resumed,
        )
        with contextlib.ExitStack() as opened:  # closed here if one cannot be opened
            entered = [
                opened.enter_context(contextlib.closing(tracker))
                for tracker in (trackers if distributed.is_first() else ())
            ]
            self.push(opened.pop_all())
        return entered

    def _report(self, step: int, metrics: Metrics) -> None:
        schedule = self._run.schedule
        loss, norm, skipped = (value.item() for value in jax.device_get(metrics))
        rate = float(self._rates[step - schedule.first_step])
        if skipped:
            if not self.skipped:
                self.before = copy.copy(self.running)
            self.skipped.append(step)
            halved = "; the loss scale is halved" if self._run.config.precision == "fp16" else ""
            self.log(
                f"step {step}: loss {loss}, gradient norm {norm}: skipped{halved} ({self.at(step)})"
            )
        else:
            self.skipped.clear()
            self.running.add(loss)
            if warning := self._watch.add(loss):
                self.log(f"step {step}: {warning} ({self.at(step)})")
        speed = self._progress.show(step, loss, self.running.mean, rate, norm)
        values = {
            "loss": loss,
            "lr": rate,
            "wd": self._run.config.weight_decay,
            "Gtokens": (step + 1) * schedule.tokens_per_step / 1e9,
            "grad_norm": norm,
        }
        if speed:
            values["kt/s"] = speed / 1000
        if speed and self._progress.peak:
            values["mfu"] = speed / self._progress.peak
        for tracker in (self._step_log, *self._trackers):
            tracker.log(step, values)
        ends = schedule.ends_miniepoch(step)
        if ends or (step + 1 == schedule.last_step and not schedule.ends_a_miniepoch):
            self._train_log.add(schedule.miniepoch(step), self.running.mean, rate)
        if ends:
            self.running.reset()

    def at(self, step: int) -> str:
        """Returns the positions of a step's samples in the data, for a message."""
        batch = self._run.schedule.batch
        offsets = self._run.data.offsets(1 + step * batch + np.arange(batch)).tolist()
        more = f" and {batch - 8} more" if batch > 8 else ""
        return f"samples at tokens {', '.join(map(str, offsets[:8]))}{more}"

    def stalled(self, seconds: float) -> None:
        """Reports that the next batch is late."""
        self.log(f"warning: waiting for data for {seconds:.0f} s: check the disk")

    def flush(self) -> None:
        """Syncs the logs to disk against a power cut, before a checkpoint records their steps."""
        self._train_log.flush()
        self._step_log.flush()


def _resolved_options(run: Run) -> dict[str, Any]:
    """Returns the resolved options and the official real_bsz, for the trackers."""
    config, model, data, schedule = run.config, run.model, run.data, run.schedule
    lr_init, lr_final = config.learning_rates(model.n_embd)
    micro_batches = config.micro_bsz * config.accumulate_grad_batches * config.num_nodes
    return {
        **dataclasses.asdict(config),
        **dataclasses.asdict(model),
        "lr_init": lr_init,
        "lr_final": lr_final,
        "warmup_steps": max(config.warmup_steps, 0),
        "magic_prime": data.magic_prime,
        "my_exit_tokens": config.my_exit_tokens or len(data.tokens),
        "devices": schedule.batch // micro_batches,
        "real_bsz": schedule.batch,
    }
