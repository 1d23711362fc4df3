"""The loss curve of a run, read from its logs, and the official reference curve."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from rwkv_jax.errors import UserError
from rwkv_jax.text.sampler import MINIEPOCH
from rwkv_jax.tracking.step_log import STEP_LOG, read_step_log

# The official curve: RWKV-LM, RWKV-v7/train_temp. 0.1b, ctx_len 512, micro_bsz 16, lr 6e-4 to 6e-5,
# MiniPile of 1,498,226,207 tokens; mean loss of the first miniepochs.
REFERENCE = (
    4.875856, 4.028621, 3.801625, 3.663070, 3.578974, 3.510906,
    3.462345, 3.412196, 3.376724, 3.336911, 3.313411, 3.295895,
)  # fmt: skip

REFERENCE_WITHIN = 0.01  # largest difference of a correct trainer
REFERENCE_CTX_LEN = 512
REFERENCE_NAME = "official 0.1b on MiniPile"


@dataclasses.dataclass(frozen=True)
class Curve:
    """Losses over tokens.

    `tokens` and `loss` are [points], finite. `trend` is the moving average of `loss` for per-step
    points, and equals `loss` for miniepoch means.
    """

    name: str
    tokens: np.ndarray
    loss: np.ndarray
    trend: np.ndarray
    by_step: bool
    reference: bool = False


def read_run(path: Path, ctx_len: int = REFERENCE_CTX_LEN) -> Curve:
    """Reads the curve of a run.

    Args:
        path: a run's folder, its step_log.tsv, or a train_log.txt in the official format.
        ctx_len: of the run with a train_log.txt, which has miniepochs but no token counts.
    Raises:
        UserError: there is no such log, or it has no loss yet.
    """
    file = path
    if path.is_dir():
        file = path / STEP_LOG if (path / STEP_LOG).exists() else path / "train_log.txt"
    if file.is_char_device():  # refused: some never end
        raise UserError(f"{file}: is a device; give a run's folder or its log")
    if file.suffix == ".tsv":
        log = read_step_log(file)
        tokens, loss = log["Gtokens"] * 1e9, log["loss"]
    else:
        means = _read_train_log(file)  # each point is at the middle of its miniepoch
        tokens = (np.array(list(means), np.float64) + 0.5) * MINIEPOCH * ctx_len
        loss = np.array(list(means.values()), np.float64)
    finite = np.isfinite(loss)
    tokens, loss = tokens[finite], loss[finite]
    if not loss.size:
        raise UserError(f"{file}: has no loss yet")
    by_step = file.suffix == ".tsv"
    trend = _moving_average(loss) if by_step else loss
    return Curve(str(path), tokens, loss, trend, by_step)


def _read_train_log(file: Path) -> dict[int, float]:
    """The mean loss of each miniepoch, in order.

    The lines that the official trainer writes when it starts (NEW RUN, its options) are skipped,
    and so are lines that a crash truncated or damaged.
    """
    means, others = {}, []
    try:
        lines = file.read_bytes().decode("utf-8", "replace").split("\n")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a run's folder or its log") from None
    for line in filter(str.strip, lines):
        try:
            number, loss, _ = line.split(maxsplit=2)
            means[int(number)] = float(loss)  # a resumed run may write a miniepoch again
        except ValueError:
            others.append(line)
    if others and not means and not any(line.startswith(("NEW RUN", "{")) for line in others):
        raise UserError(
            f"{file}: is not a train_log.txt, whose lines begin with a miniepoch and its mean loss"
        )
    return dict(sorted(means.items()))


def reference() -> Curve:
    """The official curve on MiniPile."""
    loss = np.array(REFERENCE)
    tokens = (np.arange(loss.size) + 0.5) * MINIEPOCH * REFERENCE_CTX_LEN
    return Curve(REFERENCE_NAME, tokens, loss, loss, by_step=False, reference=True)


def deviations(path: Path) -> list[tuple[int, float, float]]:
    """(miniepoch, mean loss, official loss) for the miniepochs of a train_log.txt with a reference.

    Raises:
        UserError: the run has no train_log.txt, or none of these miniepochs.
    """
    file = path / "train_log.txt" if path.is_dir() else path
    if file.suffix != ".txt":
        file = file.with_name("train_log.txt")
    rows = [
        (number, loss, REFERENCE[number])
        for number, loss in _read_train_log(file).items()
        if 0 <= number < len(REFERENCE)
    ]
    if not rows:
        raise UserError(f"{file}: has none of the miniepochs 0 to {len(REFERENCE) - 1}")
    return rows


def verdict(path: Path) -> str:
    """A table of `deviations`, and whether the largest is within `REFERENCE_WITHIN`."""
    rows = deviations(path)
    lines = [f"{path} and the {REFERENCE_NAME}:", "miniepoch      loss  official    apart"]
    lines += [f"{n:9}  {loss:8.4f}  {known:8.4f}  {loss - known:+7.4f}" for n, loss, known in rows]
    apart = [abs(loss - known) for _, loss, known in rows]
    agrees = all(round(value, 6) <= REFERENCE_WITHIN for value in apart)  # false for NaN
    largest = max(apart) if all(map(math.isfinite, apart)) else math.nan
    return "\n".join(
        [
            *lines,
            f"largest difference {largest:.4f}: "
            + ("agrees with it" if agrees else "does not agree with it")
            + f" (a correct trainer stays within {REFERENCE_WITHIN} with the same model, data, "
            "ctx_len 512 and batch 16)",
        ]
    )


def _moving_average(values: np.ndarray) -> np.ndarray:
    """Moving average over 1/40 of all points on either side. [points] → same

    At the start, where the loss falls, over at most 1/5 of the points so far.
    """
    at = np.arange(values.size)
    width = np.minimum(values.size // 40, at // 5)
    first, last = at - width, np.minimum(at + width + 1, values.size)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[last] - total[first]) / (last - first)
