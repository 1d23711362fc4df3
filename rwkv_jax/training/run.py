"""A run: resolved options, devices, data, schedule, checkpoints, and its start."""

import dataclasses
import functools
from collections.abc import Callable, Generator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rwkv_jax.checkpoints.store import Checkpoints
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.parallel import distributed
from rwkv_jax.text.dataset import Dataset
from rwkv_jax.text.loader import prefetch
from rwkv_jax.training.build import build_optimizer, build_step
from rwkv_jax.training.resume import Start
from rwkv_jax.training.schedule import Schedule
from rwkv_jax.training.step import Metrics, TrainState
from rwkv_jax.training.utilization import model_flops, peak_flops


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """The objects of a run that the training loop uses.

    Attributes:
        config: the options, with every default resolved.
        mesh: the devices.
        data: the token file and its order of samples.
        schedule: steps, miniepochs and tokens.
        checkpoints: those in the output folder.
        start: the next step, the state before it, and their origin.
    """

    config: TrainConfig
    mesh: jax.sharding.Mesh
    data: Dataset
    schedule: Schedule
    checkpoints: Checkpoints
    start: Start

    @property
    def model(self) -> ModelConfig:
        return self.start.metadata.model

    @property
    def folder(self) -> Path:
        return Path(self.config.proj_dir)

    @property
    def steps(self) -> range:
        """The remaining steps."""
        return range(self.start.step, self.schedule.last_step)

    @functools.cached_property
    def rates(self) -> np.ndarray:
        """The learning rate of each step from the schedule's first step on."""
        steps = jnp.arange(self.schedule.last_step - self.schedule.first_step)
        return np.asarray(self._optimizer[0](steps))

    @property
    def peak_tokens_per_second(self) -> float:
        """Tokens per second at an MFU of 1; 0 if the device's peak is unknown."""
        kind = self.mesh.devices.flat[0].device_kind
        peak = self.mesh.size * peak_flops(kind, self.config.precision)
        return peak / model_flops(self.model)

    def build_step(self) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
        return build_step(self.config, self.model, self.mesh, self._optimizer[1])

    def batches(self, stalled: Callable[[float], None]) -> Generator[jax.Array, None, None]:
        """Yields the batches of the remaining steps, prepared ahead.

        Args:
            stalled: called with the seconds waited when a batch is late.
        """
        return prefetch(self._make_batch, self.start.step, stalled=stalled)

    def _make_batch(self, step: int) -> jax.Array:
        """Returns [A, W·B, T + 1] int32: A micro batches, B samples on each of W devices."""
        A, W, B = self.config.accumulate_grad_batches, self.mesh.size, self.config.micro_bsz
        return distributed.make_batch(
            self.mesh,
            (A, W * B, self.config.ctx_len + 1),
            lambda number, rows: self.data.batch(step * A + number, W, B, rows),
        )

    @functools.cached_property
    def _optimizer(self) -> tuple[optax.Schedule, optax.GradientTransformationExtraArgs]:
        return build_optimizer(self.config, self.model, self.schedule)
