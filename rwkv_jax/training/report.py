"""Where the numbers of a step go: to the person, the logs and the trackers. Trouble shows here."""

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rwkv_jax.checkpoints import weights
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.model.rwkv7 import Params
from rwkv_jax.parallel import distributed
from rwkv_jax.text.dataset import Dataset
from rwkv_jax.tracking.progress import LossWatch, ProgressLine, print_line
from rwkv_jax.tracking.step_log import StepLog
from rwkv_jax.tracking.trackers import open_trackers
from rwkv_jax.tracking.train_log import TrainLog
from rwkv_jax.training.resume import Start
from rwkv_jax.training.schedule import Schedule
from rwkv_jax.training.step import Metrics

PATIENCE = 8  # steps in a row without a finite loss and gradient, then a run stops


class Report(contextlib.ExitStack):
    """Takes the metrics of each step, in order.

    Args:
        rates: learning rate of each step, from the schedule's first on.
        begin: with the step that is done next, and the mean loss of its miniepoch so far.
        peak: as in `metrics.ProgressLine`.

    Attributes:
        running: that mean, kept.
        skipped: the last steps, in a row, that were not finite.
        before: `running` as it was before them.
    """

    def __init__(
        self,
        config: TrainConfig,
        schedule: Schedule,
        data: Dataset,
        rates: np.ndarray,
        begin: Start,
        peak: float = 0.0,
    ):
        super().__init__()
        self._config, self._schedule, self._data, self._rates = config, schedule, data, rates
        self.running, self.skipped = begin.about.loss, list[int]()
        self.before = copy.copy(self.running)
        folder, bar = Path(config.proj_dir), {"auto": None, "True": True, "False": False}
        is_first = distributed.is_first()
        if not is_first:
            folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        # Before a bar is drawn: a tracker may ask the person who watches.
        self.say: Callable[[str], None] = print_line
        options = _resolved(config, schedule, data, begin.about.model)
        trackers = open_trackers(
            config, begin.about.model, options, folder, lambda text: self.say(text), begin.resumed
        )
        with contextlib.ExitStack() as opened:  # closed here if one cannot be opened
            self._trackers = [
                opened.enter_context(contextlib.closing(tracker))
                for tracker in (trackers if is_first else ())
            ]
            self.push(opened.pop_all())
        self._watch = LossWatch()
        self._pending: tuple[int, Metrics] | None = None
        first = begin.step if begin.resumed else None
        miniepoch = schedule.miniepoch(begin.step) if begin.resumed else None
        self._train_log = TrainLog(folder, miniepoch, config.epoch_begin)
        self._step_log = StepLog(folder, first)
        self._progress = ProgressLine(
            begin.step,
            schedule.last_step,
            schedule.tokens_per_step,
            bar[config.enable_progress_bar],
            peak,
        )
        self.say = self._progress.print_line
        self.callback(self._progress.close)
        self.callback(self.flush)

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes a step that is under way, and reports the one before, which is done."""
        self.catch_up()
        self._pending = step, metrics

    def catch_up(self) -> None:
        """Waits for the step that is under way, and reports it."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._report(*pending)

    def try_export(self, path: Path, params: Params) -> bool:
        """Writes a .pth; whether that worked."""
        params, worked = distributed.gather_to_first(params), False
        if distributed.is_first():
            try:
                weights.save_pth(path, params)
                worked = True
                self.say(f"wrote {path}")
            except UserError as error:
                self.say(f"warning: {error}; a checkpoint of this step can be converted to it")
        return bool(distributed.from_first(worked))

    def _report(self, step: int, metrics: Metrics) -> None:
        loss, norm, skipped = (value.item() for value in jax.device_get(metrics))
        rate = float(self._rates[step - self._schedule.first_step])
        if skipped:
            if not self.skipped:
                self.before = copy.copy(self.running)
            self.skipped.append(step)
            halved = "; the loss scale is halved" if self._config.precision == "fp16" else ""
            self.say(
                f"step {step}: loss {loss}, gradient norm {norm}: skipped{halved} ({self.at(step)})"
            )
        else:
            self.skipped.clear()
            self.running.add(loss)
            if words := self._watch.add(loss):
                self.say(f"step {step}: {words} ({self.at(step)})")
        speed = self._progress.show(step, loss, self.running.mean, rate, norm)
        values = {
            "loss": loss,
            "lr": rate,
            "wd": self._config.weight_decay,
            "Gtokens": (step + 1) * self._schedule.tokens_per_step / 1e9,
            "grad_norm": norm,
        }
        if speed:
            values["kt/s"] = speed / 1000
        if speed and self._progress.peak:
            values["mfu"] = speed / self._progress.peak
        for tracker in (self._step_log, *self._trackers):
            tracker.log(step, values)
        ends = self._schedule.ends_miniepoch(step)
        if ends or (step + 1 == self._schedule.last_step and not self._schedule.ends_a_miniepoch):
            self._train_log.add(self._schedule.miniepoch(step), self.running.mean, rate)
        if ends:
            self.running.reset()

    def at(self, step: int) -> str:
        """Where the samples of a step lie in the data, in words."""
        batch = self._schedule.batch
        offsets = self._data.offsets(1 + step * batch + np.arange(batch)).tolist()
        more = f" and {batch - 8} more" if batch > 8 else ""
        return f"samples at the tokens {', '.join(map(str, offsets[:8]))}{more}"

    def stalled(self, seconds: float) -> None:
        """The next batch is late."""
        self.say(f"warning: waiting for data for {seconds:.0f} s: is the disk slow or gone?")

    def flush(self) -> None:
        """Makes the logs survive a power cut, before a checkpoint says that the steps are done."""
        self._train_log.flush()
        self._step_log.flush()


def _resolved(
    config: TrainConfig, schedule: Schedule, data: Dataset, model: ModelConfig
) -> dict[str, Any]:
    """The options as the run takes them, and the official real_bsz: what trackers keep of a run."""
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
