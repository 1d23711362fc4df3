"""train_log.txt: one line per miniepoch, in the official format."""

import dataclasses
import datetime
import math
from pathlib import Path

from rwkv_jax.tracking.log_file import LogFile


@dataclasses.dataclass
class MiniepochLoss:
    """The mean loss of the current miniepoch so far, for the progress line and train_log.txt."""

    total: float = 0.0
    steps: int = 0

    def add(self, loss: float) -> None:
        self.total += loss
        self.steps += 1

    def reset(self) -> None:
        self.total, self.steps = 0.0, 0

    @property
    def mean(self) -> float:
        return self.total / max(self.steps, 1)


class TrainLog:
    """train_log.txt in the official format: one line per miniepoch, each miniepoch once.

    `{miniepoch} {mean loss:.6f} {exp(loss):.4f} {lr:.8f} {timestamp} {miniepoch of this run}`

    Args:
        first: as for `LogFile`: the miniepoch in which a resumed run starts.
        begin: the run's first miniepoch.
    """

    def __init__(self, folder: Path, first: int | None, begin: int):
        self._file = LogFile(folder / "train_log.txt", first)
        self._begin = begin

    def add(self, miniepoch: int, mean_loss: float, rate: float) -> None:
        perplexity = math.exp(min(mean_loss, 700.0))  # exp overflows float64 at 709.8
        self._file.append(
            f"{miniepoch} {mean_loss:.6f} {perplexity:.4f} {rate:.8f} "
            f"{datetime.datetime.now()} {miniepoch - self._begin}\n"
        )

    def flush(self) -> None:
        self._file.flush()
