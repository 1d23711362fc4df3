"""The WKV-7 recurrence, one token at a time: the definition that all implementations agree with.

Readable rather than fast. It works in any floating dtype (float64 under `jax.enable_x64`); JAX
differentiates it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.wkv7.inputs import Inputs


def log_decay(w: jax.Array) -> jax.Array:
    """log decay = −exp(−softplus(−w) − 0.5) = −e^−0.5·sigmoid(w), for the raw decay logit w."""
    return -jnp.exp(-jax.nn.softplus(-w) - 0.5)


def wkv7_reference(
    inputs: Inputs, initial_state: jax.Array, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """y [B,T,H,N] in v's dtype and the final state [B,H,N,N] of the recurrence in `api.wkv7`."""
    dtype = initial_state.dtype
    keep = jnp.ones(inputs.w.shape[:2], dtype) if reset is None else (~reset).astype(dtype)

    def step(state: jax.Array, token: tuple[Inputs, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (r, decay, k, v, a, b), keep = token
        state = state * keep[:, None, None, None]
        removed = jnp.einsum("bhvk,bhk->bhv", state, a, precision="highest")
        state = (
            state * decay[:, :, None, :]
            + removed[:, :, :, None] * b[:, :, None, :]
            + v[:, :, :, None] * k[:, :, None, :]
        )
        return state, jnp.einsum("bhvk,bhk->bhv", state, r, precision="highest")

    tokens = inputs._replace(w=jnp.exp(log_decay(inputs.w.astype(dtype))))
    tokens, keep = jax.tree.map(lambda x: jnp.moveaxis(x.astype(dtype), 1, 0), (tokens, keep))
    final_state, y = jax.lax.scan(step, initial_state, (tokens, keep))
    return jnp.moveaxis(y, 0, 1).astype(inputs.v.dtype), final_state
