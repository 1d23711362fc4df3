"""Trackers: Weights & Biases, TensorBoard and the live plot."""

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
    """Receives the metrics of each step, in order; `step` counts from 0.

    The keys are those of the official trainer's wandb log (loss, lr, wd, Gtokens, and kt/s from the
    second step on), and grad_norm, the gradient's global norm before clipping. On a GPU whose peak
    is known there is also mfu, a fraction.
    """

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Weights & Biases with the official keys; imported and started only if requested.

    As in the official trainer, the first step is 1. `WANDB_MODE=offline` needs no account. wandb's
    output is suppressed, except its login question on a terminal.

    Args:
        name: of a new run.
        resumed: continue the run whose id an earlier start wrote to the folder.
        print_line: prints a line for the user: where to find the run.

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
        print_line: Callable[[str], None],
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
                "WANDB_MODE=offline to log to the folder only"
            ) from None
        id_file.write_text(f"{self._run.id}\n")
        if self._run.offline:
            run = shlex.quote(str(Path(self._run.dir).parent))
            print_line(f"wandb: offline; `wandb sync {run}` uploads the run")
        elif not self._run.disabled:
            print_line(f"wandb: {self._run.url}")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step + 1)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the folder's `tensorboard/`, with the same keys.

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
    """Wraps a tracker so that its errors are reported once and do not stop the run.

    Args:
        name: the option that selects the tracker.
        open_tracker: opens it; its `UserError` is raised, because then an option is wrong.
        print_line: prints a line for the user.
    """

    def __init__(
        self, name: str, open_tracker: Callable[[], Tracker], print_line: Callable[[str], None]
    ):
        self._name, self._print_line, self._reported = name, print_line, False
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
            if not self._reported:
                line = next(iter(str(error).splitlines()), type(error).__name__)
                self._print_line(
                    f"warning: --{self._name} failed ({line}); training continues without it"
                )
            self._reported = True


def open_trackers(
    config: TrainConfig,
    model: ModelConfig,
    options: dict[str, Any],
    folder: Path,
    print_line: Callable[[str], None],
    resumed: bool,
) -> Iterator[Tracker]:
    """The trackers selected by the options (the step log is always written, by the trainer).

    Args:
        options: recorded by trackers that support it.
        resumed: the run continues from a checkpoint, and trackers that can, continue, too.
    """
    time = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    name = f"{model.vocab_size} ctx{config.ctx_len} L{model.n_layer} D{model.n_embd} {time}"
    openers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: Wandb(config.wandb, folder, name, options, resumed, print_line),
        "tensorboard": lambda: TensorBoard(folder),
        "plot": lambda: LivePlot(folder),
    }
    for option, opener in openers.items():
        if getattr(config, option):
            yield Guarded(option, opener, print_line)
