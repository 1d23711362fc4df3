"""The chunked form of WKV-7 in plain JAX, with its own backward pass: CPUs and older GPUs.

Within a chunk of L tokens let g_t be the sum of the log decays up to token t, and
m = g_L/2. Everything is expressed at the decay half way through the chunk::

    r̂ = r·exp(g_t − m)   â = a·exp(g_{t−1} − m)   k̂ = k·exp(m − g_t)   b̂ = b·exp(m − g_t)
    Ŝ = S·diag(exp(m))

so that no factor exceeds exp(L·e^−0.5/2) (1.6e4 at L = 32, 2.7e8 at 64). With the lower
triangular matrices rk = tril(r̂ k̂ᵀ), rb = tril(r̂ b̂ᵀ), and the strictly lower ak and ab, one
triangular inverse eliminates the states inside of the chunk, and a chunk is an affine map::

    T = (I − ab)⁻¹     u = T (ak v)     x = T â     q = r̂ + rb x
    y = q Ŝᵀ + rk v + rb u              Ŝ' = Ŝ + Ŝ xᵀ b̂ + vᵀ k̂ + uᵀ b̂

Everything but the two products with Ŝ is computed for all chunks at once. A `lax.scan` applies
Ŝ (xᵀ b̂), one [N,N] product a chunk. Then y is computed for all chunks at once. The backward pass
has the same three stages; its scan carries the state's cotangent through (xᵀ b̂)ᵀ.

The choices were measured (B1 T512 H12 N64, float32, forward + backward, two x86 cores). Chunks of
16 take about 1.5 times as long as chunks of 64, whose products XLA's CPU backend runs at full
speed; 32 takes the same time as 64 and stores twice the states. One stacked [r̂; â][k̂; b̂]ᵀ in
place of four products takes 1.6 times as long, because of its concatenations. LAPACK's triangular
solve takes longer than all the rest. Operands are float32 for every input dtype narrower than
float64: with bfloat16 operands, aligned keys give errors of 2e-2 in da and db (L = 64; 1e-2 at
16), with float32 ones 2e-3, which is the rounding of the result. On CPUs and on GPUs before Ampere
bfloat16 products are no faster.

`reset` divides a chunk into documents: the triangular matrices keep pairs of the same document,
only the first document sees the state before the chunk, and only the last reaches the state after.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.wkv7.inputs import Inputs
from pallas_kernels.wkv7.numerics import DECAY_SCALE, document_masks, unit_lower_inverse

CHUNK = 64  # tokens; a power of two


def wkv7_xla(
    inputs: Inputs, initial_state: jax.Array, reset: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """y [B,T,H,N] in v's dtype and the final state [B,H,N,N], as `api.wkv7` defines them.

    Matrix operands are float32. GPUs may round them to TF32 for narrower inputs, and for float32
    inputs where `jax.default_matmul_precision` allows it.
    """
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    exact = inputs.v.dtype.itemsize >= 4 and asked is None
    precision = jax.lax.Precision.HIGHEST if exact else None
    return _wkv7(precision, inputs, initial_state, reset)


class _Chunks(NamedTuple):
    """What both passes need of the chunks and depends on no state, in the module's letters."""

    gate: jax.Array  # sigmoid(w)                          [C,B,H,L,N]
    up: jax.Array  # exp(g_t − m)
    up_before: jax.Array  # exp(g_{t−1} − m)
    down: jax.Array  # exp(m − g_t)
    half: jax.Array  # exp(m)                              [C,B,H,1,N]
    r: jax.Array  # r̂                                      [C,B,H,L,N]
    k: jax.Array
    v: jax.Array
    a: jax.Array
    b: jax.Array
    u: jax.Array
    x: jax.Array
    q: jax.Array
    rk: jax.Array  # [C,B,H,L,L]
    rb: jax.Array
    ak: jax.Array
    inverse: jax.Array  # T
    transition: jax.Array  # xᵀ b̂                          [C,B,H,N,N]
    causal: jax.Array  # 1 where token t may see token i   [1 or C,1 or B,1,L,L]
    strict: jax.Array  # the same for i < t
    first: jax.Array | float  # 1 where the state before the chunk reaches the token  [C,B,1,L,1]
    last: jax.Array | float  # 1 where the token reaches the state after the chunk
    keep: jax.Array  # 1 where the state passes through the chunk  [C,B,1,1,1]


# The einsums of the chunk's matrices: t and i are tokens, v value rows, k key columns.
_ROWS = "...tn,...in->...ti"
_APPLY = "...ti,...in->...tn"
_APPLY_T = "...ti,...tn->...in"
_OUTER = "...tv,...tk->...vk"
_READ = "...tk,...vk->...tv"
_READ_T = "...tv,...vk->...tk"


def _chunk_length(time: int) -> int:
    return min(CHUNK, 1 << (time - 1).bit_length())


def _split(x: jax.Array, length: int) -> jax.Array:
    """[B,T,H,N] -> [C,B,H,L,N]: C chunks of L tokens, zeros after the last token."""
    batch, time, head, size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -time % length), (0, 0), (0, 0)))
    return x.reshape(batch, -1, length, head, size).transpose(1, 0, 3, 2, 4)


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
    """[C,B,H,L,N] -> [B,T,H,N], T and the dtype those of `like`."""
    chunk, batch, head, length, size = x.shape
    x = x.transpose(1, 0, 3, 2, 4).reshape(batch, chunk * length, head, size)
    return x[:, : like.shape[1]].astype(like.dtype)


def _sum_over_tokens(x: jax.Array, offset: int) -> jax.Array:
    """Σ_{i ≤ t + offset} x_i over the tokens of each chunk [..., L, N]."""
    lower = jnp.tril(jnp.ones((x.shape[-2],) * 2, x.dtype), offset)
    lower = jnp.broadcast_to(lower, (*x.shape[:-2], *lower.shape))
    return jnp.einsum(_APPLY, lower, x, precision="highest")


def _prepare(dot, inputs: Inputs, reset: jax.Array | None) -> _Chunks:
    r, w, k, v, a, b = inputs
    length = _chunk_length(v.shape[1])
    dtype = jnp.float64 if v.dtype == jnp.float64 else jnp.float32
    # Padding does nothing: no decay (the gate is zero), nothing is read, removed or written.
    gate = _split(jax.nn.sigmoid(w.astype(dtype)), length)
    r, k, v, a, b = (_split(x, length).astype(dtype) for x in (r, k, v, a, b))

    log_decay = -DECAY_SCALE * gate
    g = _sum_over_tokens(log_decay, 0)
    m = g[..., -1:, :] / 2
    up, up_before, down = jnp.exp(g - m), jnp.exp(g - log_decay - m), jnp.exp(m - g)
    r, a, k, b = r * up, a * up_before, k * down, b * down

    causal = jnp.tril(jnp.ones((1, 1, 1, length, length), dtype))
    strict = jnp.tril(causal, -1)
    first: jax.Array | float = 1.0
    last: jax.Array | float = 1.0
    keep = jnp.ones((*v.shape[:2], 1, 1, 1), dtype)
    if reset is not None:
        own = jnp.cumsum(_split(reset[:, :, None, None], length)[..., 0], -1)  # [C,B,1,L]
        masks = document_masks(0, own, own[..., -1:, None])
        same = masks.tokens.astype(dtype)
        causal, strict = causal * same, strict * same
        first, last = (x.swapaxes(-1, -2).astype(dtype) for x in (masks.start, masks.end))
        keep = masks.through.astype(dtype)

    rk, rb = dot(_ROWS, r, k) * causal, dot(_ROWS, r, b) * causal
    ak, ab = dot(_ROWS, a, k) * strict, dot(_ROWS, a, b) * strict
    inverse = unit_lower_inverse(ab)
    u = dot(_APPLY, inverse, dot(_APPLY, ak, v))
    x = dot(_APPLY, inverse, first * a)
    q = first * r + dot(_APPLY, rb, x)
    transition = dot(_OUTER, x, last * b)
    half = jnp.exp(m)
    return _Chunks(
        gate=gate, up=up, up_before=up_before, down=down, half=half, r=r, k=k, v=v, a=a, b=b,
        u=u, x=x, q=q, rk=rk, rb=rb, ak=ak, inverse=inverse, transition=transition,
        causal=causal, strict=strict, first=first, last=last, keep=keep,
    )  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv7(precision, inputs, initial_state, reset):
    return _forward(precision, inputs, initial_state, reset)[0]


def _forward(precision, inputs, initial_state, reset):
    """The outputs, and what the backward pass keeps: the inputs and each chunk's first state."""
    dot = partial(jnp.einsum, precision=precision)
    c = _prepare(dot, inputs, reset)
    written = dot(_OUTER, c.v, c.last * c.k) + dot(_OUTER, c.u, c.last * c.b)

    def step(state, chunk):
        half, keep, transition, written = chunk
        middle = state * half
        return half * (keep * middle + dot("bhvj,bhjk->bhvk", middle, transition) + written), state

    final_state, states = jax.lax.scan(step, initial_state, (c.half, c.keep, c.transition, written))
    y = dot(_READ, c.q, states * c.half) + dot(_APPLY, c.rk, c.v) + dot(_APPLY, c.rb, c.u)
    saved = inputs, reset, states.astype(inputs.v.dtype)
    return (_join(y, inputs.v), final_state), saved


def _backward(precision, saved, cotangents):
    """The backward equations; d followed by a name is the cotangent of what has that name."""
    inputs, reset, states = saved
    dy, dfinal_state = cotangents
    dot, dtype = partial(jnp.einsum, precision=precision), dfinal_state.dtype
    c = _prepare(dot, inputs, reset)
    states = states.astype(dtype)
    dy = _split(dy, c.v.shape[-2]).astype(dtype)
    read = dot(_OUTER, dy, c.q)

    def step(dstate, chunk):
        half, keep, transition, read = chunk
        dmiddle = dstate * half
        dstate = half * (keep * dmiddle + dot("bhvk,bhjk->bhvj", dmiddle, transition) + read)
        return dstate, (dstate, dmiddle)

    dinitial_state, (dstates, dmiddle) = jax.lax.scan(
        step, dfinal_state, (c.half, c.keep, c.transition, read), reverse=True
    )
    middle = states * c.half
    u = c.u + dot(_READ, c.x, middle)
    du = dot(_APPLY_T, c.rb, dy) + c.last * dot(_READ, c.b, dmiddle)
    dx = dot(_APPLY_T, c.inverse, du)
    dv = dot(_APPLY_T, c.rk, dy) + dot(_APPLY_T, c.ak, dx) + c.last * dot(_READ, c.k, dmiddle)
    drk, drb = dot(_ROWS, dy, c.v) * c.causal, dot(_ROWS, dy, u) * c.causal
    dak, dab = dot(_ROWS, dx, c.v) * c.strict, dot(_ROWS, dx, u) * c.strict
    dr = dot(_APPLY, drk, c.k) + dot(_APPLY, drb, c.b) + c.first * dot(_READ_T, dy, middle)
    da = dot(_APPLY, dak, c.k) + dot(_APPLY, dab, c.b) + c.first * dot(_READ_T, dx, middle)
    dk = dot(_APPLY_T, drk, c.r) + dot(_APPLY_T, dak, c.a) + c.last * dot(_READ_T, c.v, dmiddle)
    db = dot(_APPLY_T, drb, c.r) + dot(_APPLY_T, dab, c.a) + c.last * dot(_READ_T, u, dmiddle)

    # g_t scales r_t up, k_t and b_t down, and (as g_{t−1}) a_t up. All g of a chunk together scale
    # the state before it. So the sum over the tokens from t on is the sum at the chunk's start
    # minus the sum over the tokens before t.
    before_own_decay = da * c.a
    dg = dr * c.r - dk * c.k - db * c.b + before_own_decay
    # As exact as the sums it is subtracted from: most of it cancels.
    at_start = jnp.einsum("...vk,...vk->...k", states, dstates, precision="highest")[..., None, :]
    dlog_decay = at_start - _sum_over_tokens(dg, -1) - before_own_decay
    closed = _split(jax.nn.sigmoid(-inputs.w.astype(dtype)), dy.shape[-2])  # 1 − gate, exactly
    dw = -DECAY_SCALE * dlog_decay * c.gate * closed
    gradients = Inputs(dr * c.up, dw, dk * c.down, dv, da * c.up_before, db * c.down)
    return jax.tree.map(_join, gradients, inputs), dinitial_state, None


_wkv7.defvjp(_forward, _backward)
