"""Where a run's numbers go, step by step: step_log.tsv always, other trackers when asked for."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import UserError

STEP_LOG = "step_log.tsv"
COLUMNS = ("step", "Gtokens", "loss", "lr", "grad_norm", "kt/s")


class Tracker(Protocol):
    """Takes the numbers of each step, in order; step counts from 0.

    The keys are those of the official trainer's wandb log (loss, lr, wd, Gtokens, kt/s), and
    grad_norm: the gradient's global norm before clipping.
    """

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class StepLog:
    """step_log.tsv: a header, then a line a step; appended to when a run goes on.

    train_log.txt has one line in 40320 samples; this is what curves are drawn from. After a crash
    a run goes on from its last checkpoint, so steps can come twice: `read_step_log` takes the later
    ones.
    """

    def __init__(self, folder: Path):
        path = folder / STEP_LOG
        new = not path.exists() or path.stat().st_size == 0
        self._file = path.open("a", encoding="utf-8", buffering=1)
        if new:
            self._file.write("\t".join(COLUMNS) + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        numbers = (f"{values[name]:.7g}" for name in COLUMNS[1:])
        self._file.write("\t".join((str(step), *numbers)) + "\n")

    def close(self) -> None:
        self._file.close()


def read_step_log(path: Path) -> dict[str, np.ndarray]:
    """The columns of a step_log.tsv, [steps] float64 each, in the order of steps, each step once.

    Where a line goes back to an earlier step, the run went on from there: what was logged from that
    step on before is dropped. A line that a crash cut short is passed over.

    Raises:
        UserError: it is not there, or not such a file.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            names = tuple(next(lines, "").split())
            rows = [line.split() for line in lines]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if names != COLUMNS:
        raise UserError(f"{path}: does not begin with the header of a {STEP_LOG}")
    try:
        numbers = [[float(word) for word in row] for row in rows if len(row) == len(COLUMNS)]
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    table = np.array(numbers, np.float64).reshape(-1, len(COLUMNS))
    # A row counts if no later one is of the same or an earlier step.
    later = np.minimum.accumulate(np.append(table[1:, 0], np.inf)[::-1])[::-1]
    return dict(zip(COLUMNS, table[table[:, 0] < later].T, strict=True))


class Wandb:
    """Weights & Biases under the official keys; imported, and started, only when asked for.

    `WANDB_MODE=offline` needs no account.
    """

    def __init__(self, project: str, folder: Path, options: dict[str, Any]):
        import wandb

        self._run = wandb.init(project=project, dir=folder, config=options)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the folder's `tensorboard/`, under the same keys.

    Raises:
        UserError: the extra `tensorboard` is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "--tensorboard 1: not installed; pip install tensorboardX tensorboard "
                "(the extra tensorboard)"
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def open_trackers(config: TrainConfig, folder: Path) -> Iterator[Tracker]:
    """Those that the options ask for, one after the other."""
    yield StepLog(folder)
    if config.wandb:
        yield Wandb(config.wandb, folder, dataclasses.asdict(config))
    if config.tensorboard:
        yield TensorBoard(folder)
