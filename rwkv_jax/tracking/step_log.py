"""step_log.tsv: a run's metrics, one line per step; the source of the loss curves."""

import math
from pathlib import Path

import numpy as np

from rwkv_jax.errors import UserError
from rwkv_jax.tracking.log_file import LogFile

STEP_LOG = "step_log.tsv"
COLUMNS = ("step", "Gtokens", "loss", "lr", "grad_norm", "kt/s")


class StepLog:
    """step_log.tsv: a header, then one line per step; after a resume each step still occurs once.

    train_log.txt has one line per 40320 samples; loss curves are drawn from this file. Unknown
    values (the speed of a process's first step) are nan.

    Args:
        first: as for `LogFile`: the step at which a resumed run starts.
    """

    def __init__(self, folder: Path, first: int | None):
        self._file = LogFile(folder / STEP_LOG, first, "\t".join(COLUMNS) + "\n")

    def log(self, step: int, values: dict[str, float]) -> None:
        numbers = (f"{values.get(name, math.nan):.7g}" for name in COLUMNS[1:])
        self._file.append("\t".join((str(step), *numbers)) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.flush()


def read_step_log(path: Path) -> dict[str, np.ndarray]:
    """Reads the columns of a step_log.tsv, [steps] float64 each; steps ascend, each occurs once.

    If a line goes back to an earlier step, the run was resumed there: earlier lines from that step
    on are dropped. Truncated or damaged lines are skipped.

    Raises:
        UserError: the file is missing, or has no line of numbers.
    """
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            names = tuple(next(lines, "").split())
            numbers = [_numbers(line) for line in lines if line.strip("\0\n ")]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if names != COLUMNS:
        raise UserError(f"{path}: does not begin with the header of a {STEP_LOG}")
    rows = [row for row in numbers if row]
    if numbers and not rows:
        raise UserError(f"{path}: no line of it has {len(COLUMNS)} numbers, as a {STEP_LOG} has")
    table = np.array(rows, np.float64).reshape(-1, len(COLUMNS))
    # A row counts if no later one is of the same or an earlier step.
    later = np.minimum.accumulate(np.append(table[1:, 0], np.inf)[::-1])[::-1]
    return dict(zip(COLUMNS, table[table[:, 0] < later].T, strict=True))


def _numbers(line: str) -> list[float]:
    """The numbers of a line; empty if the line is incomplete."""
    try:
        row = [float(word) for word in line.split()]
    except ValueError:
        return []
    return row if len(row) == len(COLUMNS) and line.endswith("\n") else []
