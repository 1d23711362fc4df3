"""The official trainer's Adam, as an optax chain with parameter groups by path."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rwkv_jax.config import TrainConfig
from rwkv_jax.model.rwkv7 import Params


def is_decayed(path: tuple[str, ...], ndim: int) -> bool:
    """Whether weight decay applies: only to matrices named `weight` (embedding, head, projections).

    `ndim` counts the stacked layer axis: in a block, the norms' weights (vectors) are [L, C].
    """
    return path[-1] == "weight" and ndim - (path[0] == "blocks") >= 2


def has_double_rate(path: tuple[str, ...]) -> bool:
    """Whether the learning rate is doubled: only for the decay bias w0."""
    return path == ("blocks", "att", "w0")


def learning_rate(config: TrainConfig, n_embd: int, first_step: int, exit_step: float):
    """Returns the learning rate as a function of the number of updates.

    With s = first_step + updates, w = warmup_steps, and the rates of `TrainConfig.learning_rates`:

        progress = clip((s − w)/(exit_step − w), 0, 1)
        lr = lr_init·((½ + f/2) + (½ − f/2)·cos(π·progress)),  f = lr_final/lr_init
        and in the first w updates  lr ·= 0.01 + 0.99·updates/w

    Args:
        n_embd: the model's width C.
        first_step: the step at which the run started (`--epoch_begin`).
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
    """Builds the optimizer for float32 gradients.

    It clips by the global norm, then applies Adam, decoupled weight decay and the learning rate.
    `update` has two keyword arguments. `norm` is the global norm of the whole gradient, without
    the loss scale; everything else is elementwise, so a part of the tree can be updated on its
    own. `skip` is a bool scalar: if it is true, the moments are unchanged, and the updates must not
    be applied. The learning rate and the loss scale advance in any case, because they depend on
    the step number.
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
    """Multiplies gradients by limit/max(norm, limit), where `norm` is the global norm.

    A single factor costs no extra pass over the gradients. `optax.clip_by_global_norm` selects
    between two trees, and XLA writes the clipped one to memory on the CPU.
    """

    def update(gradients: Params, state: optax.EmptyState, params=None, *, norm: jax.Array, **_):
        factor = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * factor, gradients), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.scale_by_adam` with a `skip` argument that keeps its state unchanged.

        m = b1 m + (1 − b1) g,  v = b2 v + (1 − b2) g²,  (m/(1 − b1ⁿ)) / (√(v/(1 − b2ⁿ)) + eps)

    Selecting here, before the moments are read, lets XLA update them in place. Selecting around
    the whole optimizer keeps the old and new moments alive, and XLA copies all of them.
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
    """The factor of the loss, and therefore of every gradient."""

    scale: jax.Array  # float32, a power of two, so multiplication by it is exact
    steps: jax.Array  # int32, the number of steps since the last change


def unscale(start: float = 2.0**8, patience: int = 2000) -> optax.GradientTransformationExtraArgs:
    """Divides gradients by the loss scale in its state, and adjusts the scale, for float16.

    float16 has no values above 65504 and few below 6e-5, where many gradients are. Scaled
    gradients are in between. A step whose scaled gradients overflow is skipped and halves the
    scale, down to 1. After `patience` steps without overflow the scale doubles, up to 2²⁴.
    (Micikevicius et al., Mixed Precision Training.)

    A fresh model does not overflow at the initial scale `start`. At 2¹⁵ its first six steps would
    be skipped, while the warm-up advances.
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
    """Returns the loss scale for the next step; 1 without `unscale`."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, LossScale))
    scales = [node.scale for node in nodes if isinstance(node, LossScale)]
    return scales[0] if scales else jnp.float32(1)


def with_updates(opt_state: optax.OptState, steps: int) -> optax.OptState:
    """Sets the learning rate's update count to `steps`; the moments are unchanged."""

    def with_count(node: Any) -> Any:
        if not _is_schedule(node):
            return node
        return node._replace(count=jax.device_put(np.int32(steps), node.count.sharding))

    return jax.tree.map(with_count, opt_state, is_leaf=_is_schedule)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(entry.key for entry in path)
