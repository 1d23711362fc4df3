"""Adam as the official trainer runs it, as an optax chain with groups by parameter path."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rwkv_jax.config import TrainConfig
from rwkv_jax.model.rwkv7 import Params


def is_decayed(path: tuple[str, ...], ndim: int) -> bool:
    """Whether weight decay applies: the matrices named `weight` (embedding, head, projections).

    `ndim` counts the stacked layer axis: in a block, the norms' weights (vectors) are [L, C].
    """
    return path[-1] == "weight" and ndim - (path[0] == "blocks") >= 2


def has_double_rate(path: tuple[str, ...]) -> bool:
    """Whether the learning rate is doubled: the decay bias w0 alone."""
    return path == ("blocks", "att", "w0")


def learning_rate(config: TrainConfig, n_embd: int, first_step: int, exit_step: float):
    """The schedule as a function of the steps that this optimizer has seen, its updates.

    With s = first_step + updates, w = warmup_steps, and the rates of `TrainConfig.learning_rates`:

        progress = clip((s − w)/(exit_step − w), 0, 1)
        lr = lr_init·((½ + f/2) + (½ − f/2)·cos(π·progress)),  f = lr_final/lr_init
        and in the first w updates  lr ·= 0.01 + 0.99·updates/w

    Args:
        n_embd: the model's width C.
        first_step: the step at which the run began (`--epoch_begin`).
        exit_step: my_exit_tokens in steps, not rounded.
    """
    init, final = config.learning_rates(n_embd)
    warmup = config.warmup_steps

    def schedule(updates: jax.Array) -> jax.Array:
        done = jnp.asarray(updates, jnp.float32)
        span = max(exit_step - warmup, 1.0)
        progress = jnp.clip((first_step + done - warmup) / span, 0.0, 1.0)
        rate = (init + final) / 2 + (init - final) / 2 * jnp.cos(jnp.pi * progress)
        return jnp.where(done < warmup, rate * (0.01 + 0.99 * done / max(warmup, 1)), rate)

    return schedule


def make_optimizer(
    config: TrainConfig, schedule: optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, Adam, decoupled weight decay and the rate, over float32 gradients.

    `update` takes two keywords. `norm` is the global norm of the whole gradient, less any loss
    scale; all else is element by element, so that a part of the tree can be updated without the
    others. `skip` is a bool scalar: where it is true the moments stay as they are, and the updates
    are not to be applied. The learning rate and the loss scale continue, as they belong to the
    step, done or skipped.
    """

    def decayed(params: Params) -> Params:
        return jax.tree.map_with_path(lambda path, p: is_decayed(_names(path), p.ndim), params)

    def doubled(params: Params) -> Params:
        return jax.tree.map_with_path(lambda path, p: has_double_rate(_names(path)), params)

    return optax.chain(
        unscale() if config.precision == "fp16" else optax.identity(),
        clip(config.grad_clip) if config.grad_clip else optax.identity(),
        adam(config.beta1, config.beta2, config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.masked(optax.scale(2.0), doubled),
        optax.scale_by_learning_rate(schedule),
    )


def clip(limit: float) -> optax.GradientTransformationExtraArgs:
    """Gradients times limit/max(norm, limit), with the norm over all of them.

    One factor, so that it costs no pass of its own: `optax.clip_by_global_norm` chooses between
    two trees, and XLA's CPU writes the clipped one to memory.
    """

    def update(gradients: Params, state: optax.EmptyState, params=None, *, norm: jax.Array, **_):
        factor = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * factor, gradients), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` that leaves its state alone where `skip` is true.

        m = b1 m + (1 − b1) g,  v = b2 v + (1 − b2) g²,  (m/(1 − b1ⁿ)) / (√(v/(1 − b2ⁿ)) + eps)

    Choosing here, ahead of what reads the moments, keeps their update in place. Chosen around the
    whole optimizer, both the old and the new ones are wanted, and XLA copies all of them.
    """

    def update(
        gradients: Params,
        state: optax.ScaleByAdamState,
        params: Params | None = None,
        *,
        skip: jax.Array,
        **_: Any,
    ):
        def unless_skipped(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda new, old: jnp.where(skip, old, new), new, old)

        mu = unless_skipped(optax.tree.update_moment(gradients, state.mu, b1, 1), state.mu)
        nu = unless_skipped(optax.tree.update_moment(gradients, state.nu, b2, 2), state.nu)
        count = unless_skipped(state.count + 1, state.count)
        corrected = (
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), *corrected)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


class LossScale(NamedTuple):
    """What the loss, and so every gradient, is multiplied by."""

    scale: jax.Array  # float32, a power of two: multiplying by it rounds nothing
    steps: jax.Array  # int32, since it changed


def unscale(start: float = 2.0**8, patience: int = 2000) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the loss scale of its state, and moves it, for float16.

    float16 has nothing above 65504 and little below 6e-5, where gradients lie; scaled, they are in
    between. A step whose scaled gradients overflow is one to skip, and halves the scale; so many
    steps without double it, as far as it goes. (Micikevicius et al., Mixed Precision Training.)
    The first scale is one at which a fresh model overflows nothing: at 2¹⁵ its first six steps,
    of which the learning rate takes notice, would be skipped.
    """

    def init(params: Params) -> LossScale:
        return LossScale(jnp.float32(start), jnp.int32(0))

    def update(gradients: Params, state: LossScale, params=None, *, norm: jax.Array, **_):
        finite = jnp.isfinite(norm)
        grows = state.steps + 1 >= patience
        grown = jnp.where(grows, jnp.minimum(2 * state.scale, 2.0**24), state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale / 2, 1.0))
        steps = jnp.where(finite & ~grows, state.steps + 1, 0)
        unscaled = jax.tree.map(lambda g: g / state.scale, gradients)
        return unscaled, LossScale(scale, steps)

    return optax.GradientTransformationExtraArgs(init, update)


def loss_scale(opt_state: optax.OptState) -> jax.Array:
    """The scale for the next step; 1 without `unscale`."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LossScale))
    scales = [node.scale for node in nodes if isinstance(node, LossScale)]
    return scales[0] if scales else jnp.float32(1)


def with_updates(opt_state: optax.OptState, steps: int) -> optax.OptState:
    """The same moments, with the learning rate of a run that has seen so many steps."""

    def moved(node: Any) -> Any:
        if not _is_schedule(node):
            return node
        return node._replace(count=jax.device_put(np.int32(steps), node.count.sharding))

    return jax.tree.map(moved, opt_state, is_leaf=_is_schedule)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)
