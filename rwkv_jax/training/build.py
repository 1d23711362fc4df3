"""Builds the train step from the options. `train` runs it, `plan` compiles it."""

import dataclasses
from collections.abc import Callable

import jax
import optax

from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.device.precision import PRECISIONS, default_precision, use_precision
from rwkv_jax.parallel import sharding
from rwkv_jax.training.optimizer import learning_rate, make_optimizer
from rwkv_jax.training.schedule import Schedule
from rwkv_jax.training.step import Metrics, TrainState, make_step

# What the backward pass recomputes, indexed by --grad_cp.
RECOMPUTED = (
    "no recomputation",
    "blocks recomputed in the backward pass",
    "blocks except their matrix products recomputed in the backward pass",
)


def default_batch(on_gpu: bool) -> int:
    """The default micro_bsz."""
    return 8 if on_gpu else 1


def resolve_config(
    config: TrainConfig, on_gpu: bool, capability: tuple[int, int] | None = None
) -> TrainConfig:
    """Resolves the defaults that depend on the machine, and sets jax's float32 matmul precision.

    Args:
        capability: as for `default_precision`.
    """
    precision = default_precision(on_gpu, capability)
    config = dataclasses.replace(
        config,
        micro_bsz=config.micro_bsz or default_batch(on_gpu),
        grad_cp=int(on_gpu) if config.grad_cp == -1 else config.grad_cp,
        strategy="deepspeed_stage_2" if config.strategy == "auto" else config.strategy,
        precision=precision if config.precision == "auto" else config.precision,
    )
    use_precision(config.precision)
    return config


def build_optimizer(
    config: TrainConfig, model: ModelConfig, schedule: Schedule
) -> tuple[optax.Schedule, optax.GradientTransformationExtraArgs]:
    """Returns the learning rate as a function of the number of updates, and the optimizer."""
    rate = learning_rate(config, model.n_embd, schedule.first_step, schedule.exit_step)
    return rate, make_optimizer(config, rate)


def build_step(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """Builds the train step from resolved options (see `step.make_step`)."""
    return make_step(
        model,
        optimizer,
        mesh,
        sharding.STRATEGIES[config.strategy],
        PRECISIONS[config.precision],
        remat=config.grad_cp,
        head_chunk=config.head_chunk,
    )
