"""Where a run's numbers go, step by step: the trackers that were asked for."""

import dataclasses
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.plot import LivePlot

WANDB_ID = "wandb-run-id.txt"


class Tracker(Protocol):
    """Takes the numbers of each step, in order; step counts from 0.

    The keys are those of the official trainer's wandb log (loss, lr, wd, Gtokens, kt/s), and
    grad_norm: the gradient's global norm before clipping; on a GPU whose peak is known also mfu, a
    fraction.
    """

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases under the official keys; imported, and started, only when asked for.

    As in the official trainer, the first step is 1. `WANDB_MODE=offline` needs no account.

    Args:
        name: of a new run.
        resumed: continue the run whose id an earlier start has left in the folder.
    """

    def __init__(
        self, project: str, folder: Path, name: str, options: dict[str, Any], resumed: bool
    ):
        import wandb

        id_file = folder / WANDB_ID
        known = id_file.read_text().strip() if resumed and id_file.exists() else ""
        given: dict[str, Any] = {"id": known, "resume": "allow"} if known else {"name": name}
        self._run = wandb.init(
            project=project,
            dir=folder,
            config=options,
            save_code=False,
            allow_val_change=True,
            **given,
        )
        id_file.write_text(f"{self._run.id}\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step + 1)

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
    config: TrainConfig,
    model: ModelConfig,
    folder: Path,
    say: Callable[[str], None],
    resumed: bool,
) -> Iterator[Tracker]:
    """Those that the options ask for, one after the other (the step log is the trainer's own).

    Args:
        resumed: the run continues from a checkpoint, and so do those that can.
    """
    time = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    name = f"{model.vocab_size} ctx{config.ctx_len} L{model.n_layer} D{model.n_embd} {time}"
    options = dataclasses.asdict(config)
    openers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb(config.wandb, folder, name, options, resumed),
        "tensorboard": lambda: TensorBoard(folder),
        "plot": lambda: LivePlot(folder),
    }
    for option, opener in openers.items():
        if getattr(config, option):
            yield Guarded(opener, say)
