"""Steps, miniepochs and tokens of a run."""

import dataclasses
import math

from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.text.sampler import MINIEPOCH


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The size of a step, and the first and last step of a run.

    A step uses `batch` = devices · micro_bsz · accumulate_grad_batches samples of ctx_len tokens.
    """

    batch: int
    ctx_len: int
    first_step: int  # first step of a run without a checkpoint (--epoch_begin)
    exit_step: float  # my_exit_tokens in steps, not rounded: the end of the learning rate's decay
    last_step: int  # the run ends after this many steps

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.ctx_len

    def miniepoch(self, step: int) -> int:
        """Returns the miniepoch of the first sample of a step."""
        return step * self.batch // MINIEPOCH

    @property
    def ends_a_miniepoch(self) -> bool:
        """Whether any step of the run ends a miniepoch."""
        return self.miniepoch(self.last_step) > self.miniepoch(self.first_step)

    def ends_miniepoch(self, step: int) -> bool:
        """Whether the next step is in a later miniepoch."""
        return self.miniepoch(step + 1) > self.miniepoch(step)


def make_schedule(config: TrainConfig, batch: int, data_tokens: int) -> Schedule:
    """Returns the schedule for these options and steps of `batch` samples.

    Raises:
        UserError: the schedule has no steps.
    """
    exit_step = (config.my_exit_tokens or data_tokens) / (batch * config.ctx_len)
    first, last = config.epoch_begin * MINIEPOCH // batch, math.ceil(exit_step)
    if config.epoch_count:
        last = min(last, (config.epoch_begin + config.epoch_count) * MINIEPOCH // batch)
    if first >= last:
        raise UserError(
            f"miniepoch {config.epoch_begin} begins at step {first}, but the run ends at step "
            f"{last}: give a smaller --epoch_begin, or a larger --my_exit_tokens"
        )
    return Schedule(batch, config.ctx_len, first, exit_step, last)
