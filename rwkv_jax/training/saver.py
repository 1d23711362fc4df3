"""When a run saves a checkpoint, and what happens when it cannot."""

import time
from collections.abc import Callable

from rwkv_jax.checkpoints.store import Checkpoints, Metadata
from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.training.step import TrainState

RETRY_SECONDS = 60.0  # after a checkpoint that could not be written


class Saver:
    """Writes checkpoints when it is time to. What goes wrong is reported and retried, not raised.

    Args:
        say: takes a line for the person who watches.
    """

    def __init__(self, checkpoints: Checkpoints, config: TrainConfig, say: Callable[[str], None]):
        self._checkpoints, self._say = checkpoints, say
        self._every_steps = config.save_every_steps
        self._seconds = 60.0 * config.save_every_minutes or float("inf")
        self._due_at = time.monotonic() + self._seconds
        self._begun = True

    def due(self, done: int) -> bool:
        """Whether a checkpoint should be written now that so many steps are done."""
        return bool(self._every_steps) and done % self._every_steps == 0

    def overdue(self) -> bool:
        """Whether one should be written for the time that has passed, as this process sees it."""
        self._telling(self._checkpoints.check)
        return time.monotonic() >= self._due_at

    def save(self, step: int, state: TrainState, about: Metadata) -> None:
        """Starts a checkpoint; the arrays may be overwritten when this returns."""
        self._due_at = time.monotonic() + self._seconds
        self._telling(
            self._checkpoints.close
        )  # if that of before failed, this is tried all the same
        self._begun = self._telling(lambda: self._checkpoints.save(step, state, about))

    def finish(self) -> bool:
        """Waits for the last checkpoint; whether it is on disk."""
        return self._telling(self._checkpoints.close) and self._begun

    def _telling(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except UserError as error:
            self._say(f"warning: {error}; the earlier checkpoints are as they were")
            self._due_at = time.monotonic() + RETRY_SECONDS
            return False
        return True
