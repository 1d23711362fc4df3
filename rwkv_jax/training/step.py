"""One optimizer step: gradients of the working copy, Adam on the float32 master weights."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rwkv_jax.config import ModelConfig
from rwkv_jax.model.loss import head_loss
from rwkv_jax.model.rwkv7 import Params, abstract_params, bind
from rwkv_jax.parallel import offload, sharding
from rwkv_jax.parallel.layout import Layout, ReadLayer
from rwkv_jax.parallel.offload import OffloadedStep, Program
from rwkv_jax.training.optimizer import loss_scale

Array = jax.Array


class TrainState(NamedTuple):
    """The training state. Together with the step number it is the whole state of a run."""

    params: Params  # float32 master weights
    opt_state: optax.OptState  # float32 moments


class Metrics(NamedTuple):
    """The metrics of a step, each a scalar."""

    loss: Array  # float32, mean over the batch's tokens, without L2Wrap
    grad_norm: Array  # float32, before clipping
    skipped: Array  # bool: the loss or the gradient was not finite, so nothing was updated


def abstract_state(
    mesh: jax.sharding.Mesh,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    offloaded: bool = False,
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state.

    Master weights and moments are sharded over the devices.
    """
    params = abstract_params(config)
    state = TrainState(params, jax.eval_shape(optimizer.init, params))
    return sharding.with_shardings(state, sharding.shardings(mesh, state, offloaded))


def make_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh,
    strategy: sharding.Strategy,
    dtype: jnp.dtype,
    remat: int,
    head_chunk: int = 0,
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """Returns the jitted step: (state, batch [A, B, T + 1]) → (state, metrics).

    The input state is donated. The gradients of A micro batches of B samples are averaged. If the
    loss or the gradient is not finite, the master weights and the moments are bitwise unchanged.

    Args:
        dtype: of the forward and backward pass: the working copy of the parameters, activations
            and gradients. float16 requires an optimizer that starts with `optimizer.unscale`.
        remat: what the backward pass recomputes, as in `RWKV7.hidden`.
        head_chunk: as in `loss.head_loss`.
    """
    layout = Layout(mesh, strategy, abstract_params(config), dtype)

    def loss_fn(params: Params, read_layer: ReadLayer, tokens: Array, scale: Array) -> Array:
        """Mean loss of predicting tokens[:, 1:] from tokens[:, :-1]; tokens [B, T + 1]."""
        model = bind(config, params)
        hidden, _ = model.hidden(tokens[:, :-1], remat=remat, read=read_layer)
        return head_loss(hidden, model.head.weight[...], tokens[:, 1:], head_chunk, scale=scale)

    loss_and_gradients = layout.value_and_grad(loss_fn)

    def differentiate(weights: Params, batch: Array, scale: Array) -> tuple[Params, Metrics]:
        loss, gradients = loss_and_gradients(weights, batch, scale)
        norm = optax.tree.norm(_float32(gradients)) / scale
        return gradients, Metrics(loss, norm, ~(jnp.isfinite(loss) & jnp.isfinite(norm)))

    def update(state: TrainState, gradients: Params, metrics: Metrics) -> TrainState:
        """Applies clipping, Adam and weight decay elementwise, so also to a part of the state."""
        norm, skip = metrics.grad_norm, metrics.skipped
        with jax.named_scope("optimizer"):
            gradients = _float32(gradients)
            updates, opt_state = optimizer.update(
                gradients, state.opt_state, state.params, norm=norm, skip=skip
            )
            params = jax.tree.map(lambda p, u: jnp.where(skip, p, p + u), state.params, updates)
        return TrainState(params, opt_state)

    if strategy.offload:
        return OffloadedStep(layout, differentiate, update, loss_scale)

    def step(state: TrainState, batch: Array) -> tuple[TrainState, Metrics]:
        weights = layout.weights(state.params)
        gradients, metrics = differentiate(weights, batch, loss_scale(state.opt_state))
        return update(state, gradients, metrics), metrics

    kept = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, config, optimizer))
    inputs = kept, sharding.batch_sharding(mesh)
    return jax.jit(step, donate_argnums=0, in_shardings=inputs, out_shardings=(kept, None))


def programs(step: Any, state: TrainState, batch: Any) -> list[Program]:
    """Returns the programs that a step of `make_step` runs, in order, for abstract arguments."""
    if isinstance(step, OffloadedStep):
        return step.programs(state, batch)
    return [Program(step, (state, batch))]


def fresh_moments(optimizer: optax.GradientTransformation, abstract: TrainState) -> optax.OptState:
    """Returns the initial optimizer state, with the shardings of `abstract`.

    The state is created one part at a time, to limit memory use.
    """

    def init_part(part: TrainState) -> optax.OptState:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), part.params)
        return optimizer.init(zeros)

    parts = []
    for group in offload.group_parameters(abstract.params):
        part = offload.select(abstract, group)
        targets = jax.tree.map(lambda leaf: leaf.sharding, part.opt_state)
        on_device = sharding.shardings(jax.tree.leaves(targets)[0].mesh, part.opt_state)
        zeros = jax.jit(functools.partial(init_part, part), out_shardings=on_device)()
        parts.append(jax.block_until_ready(jax.device_put(zeros, targets)))
    return offload.merge(parts)


def _float32(tree: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
