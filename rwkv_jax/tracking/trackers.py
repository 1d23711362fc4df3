"""Where a run's numbers go, step by step: the trackers that were asked for."""

import datetime
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.tracking.charts import LivePlot

WANDB_ID = "wandb-run-id.txt"


class Tracker(Protocol):
    """Takes the numbers of each step, in order; step counts from 0.

    The keys are those of the official trainer's wandb log (loss, lr, wd, Gtokens, and kt/s from the
    second step on), and grad_norm: the gradient's global norm before clipping; on a GPU whose peak
    is known also mfu, a fraction.
    """

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases under the official keys; imported, and started, only when asked for.

    As in the official trainer, the first step is 1. `WANDB_MODE=offline` needs no account. Of what
    wandb prints, its question for an account stays (on a terminal).

    Args:
        name: of a new run.
        resumed: continue the run whose id an earlier start has left in the folder.
        say: takes a line for the person who watches: where the run is found.

    Raises:
        UserError: there is no API key, or a wrong one.
    """

    def __init__(
        self,
        project: str,
        folder: Path,
        name: str,
        options: dict[str, Any],
        resumed: bool,
        say: Callable[[str], None],
    ):
        import wandb

        id_file = folder / WANDB_ID
        known = id_file.read_text().strip() if resumed and id_file.exists() else ""
        given: dict[str, Any] = {"id": known, "resume": "allow"} if known else {"name": name}
        try:
            self._run = wandb.init(
                project=project,
                dir=folder,
                config=options,
                save_code=False,
                allow_val_change=True,
                settings={"silent": True},
                **given,
            )
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            why = str(error).partition(". ")[0]
            raise UserError(
                f"--wandb {project}: {why}; run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline to log into the folder alone"
            ) from None
        id_file.write_text(f"{self._run.id}\n")
        if self._run.offline:
            run = shlex.quote(str(Path(self._run.dir).parent))
            say(f"wandb: offline; `wandb sync {run}` uploads the run")
        elif not self._run.disabled:
            say(f"wandb: {self._run.url}")

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
    """A tracker that cannot stop a run: what it raises is reported once.

    Args:
        name: the option that asks for it.
        open_tracker: makes it; a `UserError` of this is raised, as the options are wrong then.
        say: takes a line for the person who watches.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], say: Callable[[str], None]):
        self._name, self._say, self._told = name, say, False
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
                self._say(f"warning: --{self._name} failed ({line}); training continues without it")
            self._told = True


def open_trackers(
    config: TrainConfig,
    model: ModelConfig,
    options: dict[str, Any],
    folder: Path,
    say: Callable[[str], None],
    resumed: bool,
) -> Iterator[Tracker]:
    """Those that the options ask for, one after the other (the step log is the trainer's own).

    Args:
        options: for those that keep them.
        resumed: the run continues from a checkpoint, and so do those that can.
    """
    time = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    name = f"{model.vocab_size} ctx{config.ctx_len} L{model.n_layer} D{model.n_embd} {time}"
    openers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb(config.wandb, folder, name, options, resumed, say),
        "tensorboard": lambda: TensorBoard(folder),
        "plot": lambda: LivePlot(folder),
    }
    for option, opener in openers.items():
        if getattr(config, option):
            yield Guarded(option, opener, say)
