"""The WKV-7 recurrence, one token at a time: the definition that every implementation is held to.

Readable rather than fast. Works in any floating dtype (float64 under `jax.enable_x64`), and its
gradients are JAX's own.
"""

import jax
import jax.numpy as jnp


def log_decay(w: jax.Array) -> jax.Array:
    """log decay = −exp(−softplus(−w) − 0.5) = −e^−0.5·sigmoid(w), for the raw decay logit w."""
    return -jnp.exp(-jax.nn.softplus(-w) - 0.5)


def wkv7_reference(
    r: jax.Array,
    w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """y [B,T,H,N] in v's dtype and the final state [B,H,N,N] of the recurrence in `api.wkv7`."""
    dtype = initial_state.dtype
    keep = jnp.ones(w.shape[:2], dtype) if reset is None else (~reset).astype(dtype)

    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        r, decay, k, v, a, b, keep = token
        state = state * keep[:, None, None, None]
        removed = jnp.einsum("bhvk,bhk->bhv", state, a, precision="highest")
        state = (
            state * decay[:, :, None, :]
            + removed[:, :, :, None] * b[:, :, None, :]
            + v[:, :, :, None] * k[:, :, None, :]
        )
        return state, jnp.einsum("bhvk,bhk->bhv", state, r, precision="highest")

    decay = jnp.exp(log_decay(w.astype(dtype)))
    tokens = (r, decay, k, v, a, b, keep)
    final_state, y = jax.lax.scan(
        step, initial_state, tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in tokens)
    )
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), final_state
