"""The .pth files of a run: rwkv-{n}.pth after miniepochs, rwkv-final.pth after the last step."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rwkv_jax.checkpoints import weights
from rwkv_jax.errors import UserError
from rwkv_jax.model.rwkv7 import Params
from rwkv_jax.parallel import distributed
from rwkv_jax.training.run import Run
from rwkv_jax.training.run_folder import FINAL
from rwkv_jax.training.schedule import Schedule


def exports_after(schedule: Schedule, step: int, epoch_begin: int, epoch_save: int) -> list[str]:
    """Returns the names of the .pth files that are due after a step.

    Args:
        epoch_begin: the run's first miniepoch.
        epoch_save: miniepochs between two files; 0: no such interval. The last complete miniepoch
            always has a file.
    """
    names, miniepoch = [], schedule.miniepoch(step)
    if schedule.ends_miniepoch(step):
        is_last = schedule.miniepoch(step + 1) == schedule.miniepoch(schedule.last_step)
        if is_last or (epoch_save and (miniepoch - epoch_begin) % epoch_save == 0):
            names.append(f"rwkv-{miniepoch}.pth")
    return names + ([FINAL] if step + 1 == schedule.last_step else [])


class Exporter:
    """Writes the .pth files. A failed write is reported and does not stop the run.

    Args:
        log: prints a line for the user.
    """

    def __init__(self, run: Run, log: Callable[[str], None]):
        self._run, self._log = run, log
        self._written: dict[str, bool] = {}

    @property
    def is_first(self) -> bool:
        """Whether the next file is the first of the run."""
        return not (self._run.start.resumed or self._written)

    def names_after(self, step: int) -> list[str]:
        """Returns the names of the files to write after a step."""
        config = self._run.config
        return exports_after(self._run.schedule, step, config.epoch_begin, config.epoch_save)

    def write(self, names: Sequence[str], params: Params) -> None:
        """Writes these files. Every process has to call it."""
        for name in names:
            self._written[name] = self._try(self._run.folder / name, params)

    def write_missing(self, params: Params) -> None:
        """Writes the files that are due after the step before the start but do not exist.

        They are missing if the process was killed or the disk was full.
        """
        start = self._run.start
        if start.resumed and start.step > self._run.schedule.first_step:
            for name in self.names_after(start.step - 1):
                if not distributed.from_first((self._run.folder / name).exists()):
                    self.write([name], params)

    def require_final(self, params: Params) -> None:
        """Writes rwkv-final.pth if it has not been written yet.

        Raises:
            UserError: the file cannot be written.
        """
        if not self._written.get(FINAL):
            params = distributed.gather_to_first(params)
            if distributed.is_first():
                weights.save_pth(self._run.folder / FINAL, params)

    def _try(self, path: Path, params: Params) -> bool:
        params, worked = distributed.gather_to_first(params), False
        if distributed.is_first():
            try:
                weights.save_pth(path, params)
                worked = True
                self._log(f"wrote {path}")
            except UserError as error:
                self._log(f"warning: {error}; convert a checkpoint of this step instead")
        return bool(distributed.from_first(worked))
