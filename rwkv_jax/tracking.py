"""Where a run's numbers go, step by step: the trackers that were asked for."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.plot import LivePlot


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


class Guarded:
    """A tracker that cannot stop a run: what it raises is told, the first time, and no more.

    Args:
        open_tracker: makes it; a `UserError` of this is raised, as the options are wrong then.
        say: takes a line for the person who watches.
    """

    def __init__(self, open_tracker: Callable[[], Tracker], say: Callable[[str], None]):
        self._say, self._told = say, False
        self._tracker: Tracker | None = None
        self._guard(lambda: setattr(self, "_tracker", open_tracker()), UserError)

    def log(self, step: int, values: dict[str, float]) -> None:
        if tracker := self._tracker:
            self._guard(lambda: tracker.log(step, values))

    def close(self) -> None:
        if tracker := self._tracker:
            self._guard(tracker.close)

    def _guard(self, act: Callable[[], None], *passed: type[Exception]) -> None:
        try:
            act()
        except passed:
            raise
        except Exception as error:
            if not self._told:
                line = next(iter(str(error).splitlines()), type(error).__name__)
                self._say(f"warning: a tracker failed ({line}); training goes on without it")
            self._told = True


def open_trackers(
    config: TrainConfig, folder: Path, say: Callable[[str], None]
) -> Iterator[Tracker]:
    """Those that the options ask for, one after the other (the step log is the trainer's own)."""
    openers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb(config.wandb, folder, dataclasses.asdict(config)),
        "tensorboard": lambda: TensorBoard(folder),
        "plot": lambda: LivePlot(folder),
    }
    for name, opener in openers.items():
        if getattr(config, name):
            yield Guarded(opener, say)
