"""The WKV-7 operation: one signature, and the choice of an implementation."""

from collections.abc import Callable
from importlib import import_module

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_targets import current_compute_capability
from pallas_kernels.wkv7.inputs import Inputs

# name -> module and function(inputs, initial_state, reset). A module is imported on first use.
IMPLEMENTATIONS = {
    "reference": ("pallas_kernels.wkv7.reference", "wkv7_reference"),
    "xla": ("pallas_kernels.wkv7.chunked_xla", "wkv7_xla"),
    "pallas_triton": ("pallas_kernels.wkv7.triton", "wkv7_pallas_triton"),
}

HEAD_SIZES = (16, 32, 64, 128)


def wkv7(
    r: jax.Array,
    w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    reset: jax.Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The WKV-7 recurrence over T tokens, for each head of each sequence.

    With a state S of N value rows and N key columns::

        S_t = S_{t−1}·diag(decay_t) + (S_{t−1} a_t) b_tᵀ + v_t k_tᵀ        y_t = S_t r_t
        decay = exp(−exp(−softplus(−w) − 0.5)) = exp(−e^−0.5·sigmoid(w))  ∈ (0.5452…, 1)

    The map from w to the decay is part of the operation, because the lower bound of the decay
    keeps the chunked forms in range. RWKV-7 calls it with a = −kk and b = kk·(in-context learning
    rate); nothing here relies on that.

    Args:
      r, w, k, v, a, b: [B,T,H,N], N one of 16, 32, 64, 128, all of one floating dtype (w, the raw
        decay logit, may be float32 beside narrower others).
      initial_state: [B,H,N,N], value row and key column; zero when None.
      reset: [B,T] bool; where true, the state is set to zero before that token (the first token
        of a document in a packed sequence).
      return_state: also return the state after the last token.
      implementation: a name in `IMPLEMENTATIONS`; None picks by device: reference for a single
        token; pallas_triton for 16-bit inputs on one NVIDIA GPU of compute capability 8.0 or
        more, or inside `jax.shard_map` over several; else xla.

    Returns:
      y [B,T,H,N] in v's dtype, or (y, final state [B,H,N,N]) with `return_state`. States are
      float32 (float64 for float64 inputs). Differentiable in the seven float arrays.

    Raises:
      ValueError, TypeError: an argument of the wrong shape or dtype.
      NotImplementedError: the named implementation cannot serve this call, and why.
    """
    inputs = Inputs(r, w, k, v, a, b)
    _check_arguments(inputs, initial_state, reset)
    state_dtype = jnp.float64 if v.dtype == jnp.float64 else jnp.float32
    if initial_state is None:
        batch, _, head, size = v.shape
        initial_state = jnp.zeros((batch, head, size, size), state_dtype)
    run = _load(implementation or choose(v)[0])
    with jax.named_scope("wkv7"):
        y, final_state = run(inputs, initial_state.astype(state_dtype), reset)
    return (y, final_state) if return_state else y


def _check_arguments(
    inputs: Inputs, initial_state: jax.Array | None, reset: jax.Array | None
) -> None:
    v, w = inputs.v, inputs.w
    if v.ndim != 4 or v.shape[-1] not in HEAD_SIZES or 0 in v.shape:
        raise ValueError(f"v must be [B,T,H,N], none empty, N in {HEAD_SIZES}; got {v.shape}")
    batch, time, head, size = v.shape
    given = inputs._asdict()
    expected = {name: (v.shape, v.dtype) for name in given}
    if w.dtype == jnp.float32:
        expected["w"] = (v.shape, w.dtype)
    if initial_state is not None:
        given["initial_state"] = initial_state
        expected["initial_state"] = ((batch, head, size, size), initial_state.dtype)
    if reset is not None:
        given["reset"] = reset
        expected["reset"] = ((batch, time), jnp.dtype(bool))
    for name, array in given.items():
        shape, dtype = expected[name]
        if array.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} beside v {v.shape}; got {array.shape}"
            )
        if array.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype} beside v {v.dtype}; got {array.dtype}")
        if name != "reset" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating dtype; got {array.dtype}")


def choose(v: jax.Array | jax.ShapeDtypeStruct) -> tuple[str, str]:
    """The implementation that `wkv7` picks for v [B,T,H,N] on the current device, and why."""
    if v.shape[1] == 1:
        return "reference", "a single token leaves nothing to compute in parallel"
    if current_compute_capability() is None:
        return "xla", "the Pallas kernels need an NVIDIA GPU"
    if jnp.dtype(v.dtype).itemsize != 2:
        return "xla", f"a GPU core's registers do not hold the Pallas kernels' {v.dtype} operands"
    if _is_partitioned():
        return "xla", "XLA partitions this call over several devices; it cannot partition a kernel"
    refusal = import_module("pallas_kernels.wkv7.triton").refusal(v)
    if refusal:
        return "xla", f"pallas_triton {refusal}"
    return "pallas_triton", "kernels for tensor cores"


def _is_partitioned() -> bool:
    """Whether XLA may partition this call over devices.

    It cannot partition a kernel: it would gather the kernel's arguments. Inside `jax.shard_map`
    the call is partitioned already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.abstract_device is None else mesh.size
    return devices > 1 and not mesh.manual_axes


def _load(name: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    if name not in IMPLEMENTATIONS:
        raise NotImplementedError(
            f"implementation {name!r} is unknown; there are {', '.join(IMPLEMENTATIONS)}"
        )
    module, function = IMPLEMENTATIONS[name]
    return getattr(import_module(module), function)
