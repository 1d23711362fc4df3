"""Where a run's numbers go, step by step: step_log.tsv always, other trackers when asked for."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.plot import LivePlot
from rwkv_jax.step_log import StepLog


class Tracker(Protocol):
    """Takes the numbers of each step, in order; step counts from 0.

    The keys are those of the official trainer's wandb log (loss, lr, wd, Gtokens, kt/s), and
    grad_norm: the gradient's global norm before clipping.
    """

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


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
    if config.plot:
        yield LivePlot(folder)
