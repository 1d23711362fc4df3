"""The chunked form of WKV-7 in plain JAX, with its own backward pass: CPUs and older GPUs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAY_SCALE = 0.6065306597126334  # e^−0.5
CHUNK = 64


def wkv7_xla(
    r: jax.Array,
    w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """y [B,T,H,N] in v's dtype and the final state [B,H,N,N], as `api.wkv7` defines them."""
    precision = None if jax.config.jax_default_matmul_precision else jax.lax.Precision.HIGHEST
    return _wkv7(precision, r, w, k, v, a, b, initial_state, reset)


class _Chunks(NamedTuple):
    """What the two passes need of every chunk and can have without a state."""

    gate: jax.Array  # sigmoid(w), zero at padding               [B,C,L,H,N]
    r: jax.Array  # r·exp(g_t − m)                            [C,B,H,L,N], as are those below
    a: jax.Array  # a·exp(g_{t−1} − m)
    k: jax.Array  # k·exp(m − g_t)
    b: jax.Array  # b·exp(m − g_t)
    v: jax.Array
    u: jax.Array
    x: jax.Array
    rx: jax.Array
    rk: jax.Array  # [C,B,H,L,L], as are those below
    rb: jax.Array
    ak: jax.Array
    inverse: jax.Array
    transition: jax.Array  # [C,B,H,N,N]
    half: jax.Array  # exp(m)                                  [C,B,H,1,N]
    causal: jax.Array
    strict: jax.Array
    start: jax.Array | float
    last: jax.Array | float
    keep: jax.Array | float


def _length(time):
    return min(CHUNK, 1 << (time - 1).bit_length())


def _split(x, length):
    """[B,T,…] -> [B,C,L,…]: C chunks of L tokens, zeros after the last token."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % length)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, length, *x.shape[2:])


def _swap(x):
    """[B,C,L,H,N] -> [C,B,H,L,N]"""
    return x.transpose(1, 0, 3, 2, 4)


def _unswap(x):
    """[C,B,H,L,N] -> [B,C,L,H,N]"""
    return x.transpose(1, 0, 3, 2, 4)


def _merge(x, time):
    """[B,C,L,H,N] -> [B,T,H,N]"""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :time]


def _unit_lower_inverse(m, dot):
    """(I − M)⁻¹ for strictly lower triangular M [..., L, L], by block doubling."""
    length = m.shape[-1]
    inverse = jnp.ones((*m.shape[:-2], length, 1, 1), m.dtype)  # one block a row
    size = 1
    while size < length:
        pairs = length // (2 * size)
        blocks = m.reshape(*m.shape[:-2], pairs, 2 * size, pairs, 2 * size)
        below = jnp.stack([blocks[..., p, size:, p, :size] for p in range(pairs)], -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = dot("...ij,...jk->...ik", dot("...ij,...jk->...ik", second, below), first)
        inverse = jnp.concatenate(
            [
                jnp.concatenate([first, jnp.zeros_like(first)], -1),
                jnp.concatenate([corner, second], -1),
            ],
            -2,
        )
        size *= 2
    return inverse[..., 0, :, :]


def _prepare(dot, r, w, k, v, a, b, reset):
    time, dtype = r.shape[1], v.dtype
    length = _length(time)
    full = jnp.float64 if dtype == jnp.float64 else jnp.float32
    lower = jnp.tril(jnp.ones((length, length), full))

    gate = jax.nn.sigmoid(w.astype(full))
    gate = _split(gate, length)
    log = -DECAY_SCALE * gate
    total = jnp.einsum("ti,bcihn->bcthn", lower, log, precision="highest")
    middle = total[:, :, -1:] / 2

    def scaled(x, exponent):
        return _swap(_split(x, length).astype(full) * jnp.exp(exponent)).astype(dtype)

    r, a = scaled(r, total - middle), scaled(a, total - log - middle)
    k, b = scaled(k, middle - total), scaled(b, middle - total)
    v = _swap(_split(v, length))
    half = _swap(jnp.exp(middle))

    causal, strict = (jnp.tril(lower, d)[None, None, None] for d in (0, -1))
    if reset is None:
        start = last = keep = 1.0
    else:
        segment = jnp.cumsum(_split(reset, length), -1).swapaxes(0, 1)[:, :, None, :, None]
        same = (segment == segment.swapaxes(-1, -2)).astype(full)  # [C,B,1,L,L]
        causal, strict = causal * same, strict * same
        start, last = segment == 0, segment == segment[..., -1:, :]
        start, last = start.astype(dtype), last.astype(dtype)
        keep = start[..., -1:, :].astype(full)

    rk = (dot("...tn,...in->...ti", r, k) * causal).astype(dtype)
    rb = (dot("...tn,...in->...ti", r, b) * causal).astype(dtype)
    ak = (dot("...tn,...in->...ti", a, k) * strict).astype(dtype)
    ab = dot("...tn,...in->...ti", a, b) * strict
    inverse = _unit_lower_inverse(ab, dot).astype(dtype)
    akv = dot("...ti,...iv->...tv", ak, v).astype(dtype)
    u = dot("...ti,...iv->...tv", inverse, akv).astype(dtype)
    x = dot("...ti,...in->...tn", inverse, start * a).astype(dtype)
    rx = ((start * r).astype(full) + dot("...ti,...in->...tn", rb, x)).astype(dtype)
    transition = dot("...tn,...tk->...nk", x, last * b).astype(dtype)
    return _Chunks(
        gate,
        r,
        a,
        k,
        b,
        v,
        u,
        x,
        rx,
        rk,
        rb,
        ak,
        inverse,
        transition,
        half,
        causal,
        strict,
        start,
        last,
        keep,
    )


def _forward(precision, r, w, k, v, a, b, initial_state, reset):
    full = initial_state.dtype
    dtype = v.dtype
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=full)
    z = _prepare(dot, r, w, k, v, a, b, reset)
    added = dot("...tv,...tk->...vk", z.v, z.last * z.k) + dot(
        "...tv,...tk->...vk", z.u, z.last * z.b
    )
    keep = jnp.broadcast_to(jnp.asarray(z.keep, full), (*z.half.shape[:2], 1, 1, 1))

    def step(S, x):
        half, keep, M, P = x
        mid = S * half
        return half * (keep * mid + dot("...vk,...kj->...vj", mid.astype(dtype), M) + P), S.astype(
            dtype
        )

    final, states = jax.lax.scan(step, initial_state, (z.half, keep, z.transition, added))
    mid = (states.astype(full) * z.half).astype(dtype)
    y = (
        dot("...tk,...vk->...tv", z.rx, mid)
        + dot("...ti,...iv->...tv", z.rk, z.v)
        + dot("...ti,...iv->...tv", z.rb, z.u)
    )
    return (_merge(_unswap(y), r.shape[1]).astype(v.dtype), final), states


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv7(precision, r, w, k, v, a, b, initial_state, reset):
    return _forward(precision, r, w, k, v, a, b, initial_state, reset)[0]


def _vjp_forward(precision, r, w, k, v, a, b, initial_state, reset):
    out, states = _forward(precision, r, w, k, v, a, b, initial_state, reset)
    return out, (r, w, k, v, a, b, reset, states)


def _vjp_backward(precision, saved, cotangents):
    r0, w0, k0, v0, a0, b0, reset, states = saved
    dy, dfinal = cotangents
    time, dtype, full = r0.shape[1], v0.dtype, dfinal.dtype
    L = _length(time)
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=full)
    z = _prepare(dot, r0, w0, k0, v0, a0, b0, reset)
    r, a, k, b, v = z.r, z.a, z.k, z.b, z.v
    dy = _swap(_split(dy, L))
    added = dot("...tv,...tk->...vk", dy, z.rx)
    keep = jnp.broadcast_to(jnp.asarray(z.keep, full), (*z.half.shape[:2], 1, 1, 1))

    def step(dS, x):
        half, keep, M, Q, S = x
        D = dS * half
        dS = half * (keep * D + dot("...vj,...kj->...vk", D.astype(dtype), M) + Q)
        return dS, (D.astype(dtype), jnp.sum(S.astype(full) * dS, -2, keepdims=True))

    dinitial, (D, at_start) = jax.lax.scan(
        step, dfinal, (z.half, keep, z.transition, added, states), reverse=True
    )
    S = (states.astype(full) * z.half).astype(dtype)
    u = (z.u.astype(full) + dot("...tk,...vk->...tv", z.x, S)).astype(dtype)
    du = dot("...ti,...tv->...iv", z.rb, dy) + dot("...ik,...vk->...iv", z.last * b, D)
    dx = dot("...ti,...tv->...iv", z.inverse, du.astype(dtype)).astype(dtype)
    dv = (
        dot("...ti,...tv->...iv", z.rk, dy)
        + dot("...ti,...tv->...iv", z.ak, dx)
        + dot("...ik,...vk->...iv", z.last * k, D)
    )
    drk = (dot("...tv,...iv->...ti", dy, v) * z.causal).astype(dtype)
    drb = (dot("...tv,...iv->...ti", dy, u) * z.causal).astype(dtype)
    dak = (dot("...tv,...iv->...ti", dx, v) * z.strict).astype(dtype)
    dab = (dot("...tv,...iv->...ti", dx, u) * z.strict).astype(dtype)
    start, last = (m if isinstance(m, float) else m.astype(full) for m in (z.start, z.last))
    row, col = partial(dot, "...ti,...in->...tn"), partial(dot, "...ti,...tn->...in")
    dr = row(drk, k) + row(drb, b) + start * dot("...tv,...vk->...tk", dy, S)
    da = row(dak, k) + row(dab, b) + start * dot("...tv,...vk->...tk", dx, S)
    dk = col(drk, r) + col(dak, a) + last * dot("...tv,...vk->...tk", v, D)
    db = col(drb, r) + col(dab, a) + last * dot("...tv,...vk->...tk", u, D)

    log = -DECAY_SCALE * z.gate
    lower = jnp.tril(jnp.ones((L, L), full))
    total = jnp.einsum("ti,bcihn->bcthn", lower, log, precision="highest")
    middle = total[:, :, -1:] / 2
    r, a, k, b = (x.astype(full) for x in (r, a, k, b))
    ada = _unswap(a * da)
    dc = _unswap(r * dr - k * dk - b * db) + ada
    dlog = (
        _unswap(at_start)
        - jnp.einsum("ti,bcihn->bcthn", jnp.tril(lower, -1), dc, precision="highest")
        - ada
    )
    grads = (
        _unswap(dr) * jnp.exp(total - middle),
        dlog * log * _split(jax.nn.sigmoid(-w0.astype(full)), L),
        _unswap(dk) * jnp.exp(middle - total),
        _unswap(dv),
        _unswap(da) * jnp.exp(total - log - middle),
        _unswap(db) * jnp.exp(middle - total),
    )
    primals = (r0, w0, k0, v0, a0, b0)
    return (
        *(_merge(g, time).astype(x.dtype) for g, x in zip(grads, primals, strict=True)),
        dinitial,
        None,
    )


_wkv7.defvjp(_vjp_forward, _vjp_backward)
