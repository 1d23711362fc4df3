"""One optimizer step: gradients of the working copy, Adam on the float32 masters."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rwkv_jax import sharding
from rwkv_jax.config import ModelConfig
from rwkv_jax.loss import head_loss
from rwkv_jax.model import Params, abstract_params, bind
from rwkv_jax.optimizer import keep_if

Array = jax.Array


class TrainState(NamedTuple):
    """All that a step reads and writes; with the step number, all that a run is."""

    params: Params  # float32 masters
    opt_state: optax.OptState  # float32 moments


class Metrics(NamedTuple):
    loss: Array  # float32, mean over the batch's tokens, without L2Wrap
    grad_norm: Array  # float32, before clipping
    skipped: Array  # bool: loss or gradient were not finite, so nothing was updated


def loss_fn(
    config: ModelConfig, remat: bool, head_chunk: int, params: Params, tokens: Array
) -> Array:
    """Mean loss of predicting tokens[:, 1:] from tokens[:, :-1]; tokens [B, T + 1]."""
    model = bind(config, params)
    hidden, _ = model.hidden(tokens[:, :-1], remat=remat)
    return head_loss(hidden, model.head.weight[...], tokens[:, 1:], head_chunk)


def abstract_state(
    mesh: jax.sharding.Mesh, config: ModelConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    """Shapes, dtypes and shardings of the state: masters and moments are cut over the devices."""
    params = abstract_params(config)
    state = TrainState(params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state,
        sharding.cut(mesh, state),
    )


def make_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    strategy: sharding.Strategy,
    dtype: jnp.dtype,
    remat: bool,
    head_chunk: int = 0,
) -> Callable[[TrainState, Array], tuple[TrainState, Metrics]]:
    """The compiled step: (state, batch [A, B, T + 1]) → (state, metrics).

    The state that is passed in is consumed. A micro batches of B samples are run one after the
    other and their gradients averaged (in float32 when A > 1). When the loss or the gradient is not
    finite, the masters and the moments stay as they are, to the bit.

    Args:
        dtype: of the working copy of the parameters, the activations and the gradients.
        remat: recompute each block in the backward pass.
        head_chunk: as in `loss.head_loss`.
    """
    shapes = abstract_params(config)
    cut, whole = sharding.cut(mesh, shapes), sharding.replicated(mesh, shapes)
    grad_fn = jax.value_and_grad(functools.partial(loss_fn, config, remat, head_chunk))
    constrain = jax.lax.with_sharding_constraint

    def gradients(params: Params, tokens: Array) -> tuple[Array, Params]:
        loss, grads = grad_fn(params, tokens)
        return loss, constrain(grads, cut if strategy.gradients else whole)

    def accumulated(params: Params, batch: Array) -> tuple[Array, Params]:
        def add(total: tuple[Array, Params], tokens: Array):
            return jax.tree.map(
                lambda t, g: t + g.astype(t.dtype), total, gradients(params, tokens)
            ), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        total, _ = jax.lax.scan(add, (jnp.zeros(()), zeros), batch)
        return jax.tree.map(lambda t: t / batch.shape[0], total)

    def step(state: TrainState, batch: Array) -> tuple[TrainState, Metrics]:
        working = jax.tree.map(lambda p: p.astype(dtype), state.params)
        working = constrain(working, cut if strategy.parameters else whole)
        if batch.shape[0] == 1:
            loss, grads = gradients(working, batch[0])
        else:
            loss, grads = accumulated(working, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        norm = optax.tree.norm(grads)
        skipped = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updated = TrainState(optax.apply_updates(state.params, updates), opt_state)
        return keep_if(skipped, state, updated), Metrics(loss, norm, skipped)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, config, optimizer))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, None),
    )
