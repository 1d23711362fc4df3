"""The chunked form of WKV-7 in plain JAX, with its own backward pass: CPUs and older GPUs.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.wkv7.reference import DECAY_SCALE

CHUNK = 64  # longest chunk; a power of two


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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv7(precision, r, w, k, v, a, b, initial_state, reset):
    return _forward(precision, r, w, k, v, a, b, initial_state, reset)[0]


def _chunks(x, length):
    """[B,T,H,N] -> [C,B,H,L,N] for C chunks of L tokens, padded with zeros at the end."""
    batch, time, head, size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -time % length), (0, 0), (0, 0)))
    return x.reshape(batch, -1, length, head, size).transpose(1, 0, 3, 2, 4)


def _tokens(x, time):
    """[C,B,H,L,N] -> [B,T,H,N]: undoes `_chunks`."""
    chunk, batch, head, length, size = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, chunk * length, head, size)[:, :time]


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


def _local(precision, r, w, k, v, a, b, reset):
    """All of a chunk that needs no state."""
    time = r.shape[1]
    length = min(CHUNK, 1 << (time - 1).bit_length())
    dtype = v.dtype
    full = jnp.promote_types(jnp.float32, dtype)
    dot = partial(jnp.einsum, precision=precision, preferred_element_type=full)
    lower = jnp.tril(jnp.ones((length, length), full))

    r, w, k, v, a, b = (_chunks(x, length) for x in (r, w, k, v, a, b))
    valid = (jnp.arange(r.shape[0] * length) < time).reshape(-1, 1, 1, length, 1)
    gate = jax.nn.sigmoid(w.astype(full)) * valid
    log = -DECAY_SCALE * gate
    total = jnp.einsum("ti,...in->...tn", lower, log, precision="highest")
    end = total[..., -1:, :]
    middle = end / 2

    mask = jnp.concatenate([lower, jnp.tril(lower, -1)])
    mask = jnp.concatenate([mask, mask], 1)  # [2L, 2L]
    if reset is None:
        start = last = keep = 1.0
    else:
        reset = jnp.pad(reset, ((0, 0), (0, -time % length)))
        reset = reset.reshape(reset.shape[0], -1, length).swapaxes(0, 1)
        segment = jnp.cumsum(reset, -1)[:, :, None, :, None]  # [C,B,1,L,1]
        same = segment == segment.swapaxes(-1, -2)
        mask = mask * jnp.tile(same, (1, 1, 1, 2, 2))
        start, last = segment == 0, segment == segment[..., -1:, :]
        keep = start[..., -1:, :]
    up = jnp.exp(total - middle)
    up_before = jnp.exp(total - log - middle)
    down = jnp.exp(middle - total)
    half = jnp.exp(middle)
    return dict(locals())


def _forward(precision, r, w, k, v, a, b, initial_state, reset):
    z = _local(precision, r, w, k, v, a, b, reset)
    y, states, final = _fw(z, initial_state)
    return (_tokens(y, r.shape[1]).astype(v.dtype), final), (states, final)


def _solve(z):
    L, dtype, dot = z["length"], z["dtype"], z["dot"]
    cast = lambda x: x.astype(dtype)
    row = jnp.concatenate([z["r"] * z["up"], z["a"] * z["up_before"]], -2)
    col = jnp.concatenate([z["k"] * z["down"], z["b"] * z["down"]], -2)
    two = (lambda m: m if isinstance(m, float) else jnp.concatenate([m, m], -2))
    row_in = row * (z["half"] * two(z["start"]))
    col_out = col * (z["half"] * two(z["last"]))
    A = dot("...tn,...in->...ti", cast(row), cast(col)) * z["mask"]
    inv = cast(_unit_lower_inverse(A[..., L:, L:], z["dot"]))
    A = cast(A)
    Z = jnp.concatenate([dot("...ti,...iv->...tv", A[..., :L], z["v"]), row_in], -1)
    UX = dot("...ti,...iv->...tv", inv, cast(Z[..., L:, :]))
    return row, col, row_in, col_out, A, inv, Z, UX


def _fw(z, initial_state):
    L, dtype, dot, N = z["length"], z["dtype"], z["dot"], z["r"].shape[-1]
    cast = lambda x: x.astype(dtype)
    row, col, row_in, col_out, A, inv, Z, UX = _solve(z)
    YR = Z[..., :L, :] + dot("...ti,...iv->...tv", A[..., :L, L:], cast(UX))
    PM = dot("...tv,...tk->...vk", cast(UX), cast(col_out[..., L:, :]))
    P = PM[..., :N, :] + dot("...tv,...tk->...vk", z["v"], cast(col_out[..., :L, :]))
    M = cast(PM[..., N:, :])
    through = z["half"] * z["half"] * z["keep"]

    def step(S, x):
        through, M, P = x
        return S * through + dot("...vk,...kj->...vj", cast(S), M) + P, cast(S)

    final, states = jax.lax.scan(step, initial_state, (through, M, P))
    y = YR[..., :N] + dot("...tk,...vk->...tv", cast(YR[..., N:]), states)
    return y, states, final


def _vjp_forward(precision, r, w, k, v, a, b, initial_state, reset):
    out, saved = _forward(precision, r, w, k, v, a, b, initial_state, reset)
    return out, (r, w, k, v, a, b, reset, *saved)


def _vjp_backward(precision, saved, cotangents):
    r0, w0, k0, v0, a0, b0, reset, states, final = saved
    dy, dfinal = cotangents
    z = _local(precision, r0, w0, k0, v0, a0, b0, reset)
    L, dtype, dot, N = z["length"], z["dtype"], z["dot"], r0.shape[-1]
    cast = lambda x: x.astype(dtype)
    row, col, row_in, col_out, A, inv, Z, UX = _solve(z)
    UX = cast(UX)
    R = row_in[..., :L, :] + dot("...ti,...iv->...tv", A[..., :L, L:], UX[..., N:])
    M = dot("...tv,...tk->...vk", UX[..., N:], cast(col_out[..., L:, :]))
    through = z["half"] * z["half"] * z["keep"]
    dY = cast(_chunks(dy, L))
    Q = dot("...tv,...tk->...vk", dY, cast(R))

    def step(D, x):
        through, M, Q = x
        return D * through + dot("...vj,...kj->...vk", cast(D), M) + Q, D

    dinitial, D = jax.lax.scan(step, dfinal, (through, cast(M), Q), reverse=True)
    ends = jnp.concatenate([states[1:], cast(final)[None]])
    at_end = jnp.sum(ends * D, -2, keepdims=True)
    D = cast(D)
    U = UX[..., :N] + dot("...tk,...vk->...tv", UX[..., N:], states)
    dVU = dot("...ti,...tv->...iv", A[..., :L, :], dY) + dot(
        "...tk,...vk->...tv", cast(col_out), D
    )
    dX = dot("...ti,...tv->...iv", inv, cast(dVU[..., L:, :]))
    dv = dVU[..., :L, :] + dot("...ti,...tv->...iv", A[..., L:, :L], cast(dX))
    dout = jnp.concatenate([dY, cast(dX)], -2)
    VU = jnp.concatenate([z["v"], cast(U)], -2)
    dA = cast(dot("...tv,...iv->...ti", dout, VU) * z["mask"])
    two = (lambda m: m if isinstance(m, float) else jnp.concatenate([m, m], -2))
    drow = dot("...ti,...in->...tn", dA, cast(col)) + dot("...tv,...vk->...tk", dout, states) * (
        z["half"] * two(z["start"])
    )
    dcol = dot("...ti,...tn->...in", dA, cast(row)) + dot("...tv,...vk->...tk", VU, D) * (
        z["half"] * two(z["last"])
    )
    dr, da = drow[..., :L, :] * z["up"], drow[..., L:, :] * z["up_before"]
    dk, db = dcol[..., :L, :] * z["down"], dcol[..., L:, :] * z["down"]
    ada = z["a"] * da
    dc = z["r"] * dr - z["k"] * dk - z["b"] * db + ada
    dlog = jnp.einsum("ti,...tn->...in", z["lower"], dc, precision="highest") - ada + at_end
    dw = dlog * z["log"] * (1 - z["gate"])
    grads = (dr, dw, dk, dv, da, db)
    return (
        *(_tokens(g, r0.shape[1]).astype(x.dtype) for g, x in zip(grads, (r0, w0, k0, v0, a0, b0))),
        dinitial,
        None,
    )


_wkv7.defvjp(_vjp_forward, _vjp_backward)
