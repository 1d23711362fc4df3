"""The bodies of the three kernels.

Arguments are references to blocks: of one head of one sequence, all of it or some chunks. Arrays
that depend on tokens are `Inputs` of [tokens, N]; a state is [N, N], states of chunks [C, N, N].
`documents_ref` [1 + T] holds the document number of each token, after a zero for the initial
state; it is None where nothing is reset. In registers tiles are [N, L], channels by tokens.

Letters are those of `chunked_xla`: S is a chunk's state in the middle of its decay, D the cotangent
at its end, times half its decay; r, k, a, b are scaled by the decays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.wkv7.inputs import Inputs
from pallas_kernels.wkv7.numerics import (
    DECAY_SCALE,
    LOG2_E,
    DocumentMasks,
    TileOps,
    causal_product,
    chunk_decays,
    diagonal,
    document_masks,
    exp_minus,
    masked,
    positions,
    sum_over_tokens,
    unit_triangular_inverse,
)
from pallas_kernels.wkv7.triton.tuning import Tuning


def forward(
    inputs: Inputs,
    initial_ref: Any,
    documents_ref: Any,
    y_ref: Any,
    final_ref: Any,
    states_ref: Any,
    *,
    tuning: Tuning,
    ops: TileOps,
) -> None:
    """y, the final state, and S of every chunk where `states_ref` is given."""
    dtype, dot, exp2, _ = ops
    length = tuning.chunk_length
    r_ref, w_ref, k_ref, v_ref, a_ref, b_ref = inputs

    def body(chunk, state):
        tokens = pl.ds(chunk * length, length)
        same, start, end, through = _masks(documents_ref, chunk * length, length)
        _, log, total, half = chunk_decays(w_ref[tokens, :].T, ops)
        r = _scaled(r_ref[tokens, :], exp2(total), dtype)
        a = _scaled(a_ref[tokens, :], exp2(total - log), dtype)
        k = _scaled(k_ref[tokens, :], exp2(-total), dtype)
        b = _scaled(b_ref[tokens, :], exp2(-total), dtype)
        v = v_ref[tokens, :].astype(dtype).T
        ba = causal_product(b, a, same, ops, strict=True)
        ka = causal_product(k, a, same, ops, strict=True).astype(dtype)
        kr = causal_product(k, r, same, ops).astype(dtype)
        br = causal_product(b, r, same, ops).astype(dtype)
        inverse = unit_triangular_inverse(ba, ops)
        state = state * exp2(half)[None, :]
        s = state.astype(dtype)
        if states_ref is not None:
            states_ref[chunk] = s
        # A reset is applied to the operands: they are fewer values than the products.
        a, r = masked(a, start), masked(r, start)
        x = dot(v, ka) + dot(s, a)
        u = dot(x.astype(dtype), inverse).astype(dtype)
        y = dot(v, kr) + dot(s, r) + dot(u, br)
        y_ref[tokens, :] = y.astype(y_ref.dtype).T
        if tuning.reload_sequential:
            k = _scaled(k_ref[tokens, :], exp2(-total), dtype)
            b = _scaled(b_ref[tokens, :], exp2(-total), dtype)
        state = masked(state, through) + dot(masked(v, end), k, "xY") + dot(masked(u, end), b, "xY")
        return state * exp2(half)[None, :]

    final_ref[...] = jax.lax.fori_loop(0, r_ref.shape[0] // length, body, initial_ref[...])


def backward_ends(
    inputs: Inputs,
    dy_ref: Any,
    dfinal_ref: Any,
    documents_ref: Any,
    ends_ref: Any,
    dinitial_ref: Any,
    *,
    tuning: Tuning,
    ops: TileOps,
) -> None:
    """D of every chunk, and the cotangent of the initial state. k and v are None."""
    dtype, dot, exp2, _ = ops
    length = tuning.chunk_length
    r_ref, w_ref, _, _, a_ref, b_ref = inputs
    chunks = r_ref.shape[0] // length

    def body(step, dstate):
        chunk = chunks - 1 - step
        tokens = pl.ds(chunk * length, length)
        same, start, end, through = _masks(documents_ref, chunk * length, length)
        _, log, total, half = chunk_decays(w_ref[tokens, :].T, ops)
        r = _scaled(r_ref[tokens, :], exp2(total), dtype)
        a = _scaled(a_ref[tokens, :], exp2(total - log), dtype)
        b = _scaled(b_ref[tokens, :], exp2(-total), dtype)
        dy = dy_ref[tokens, :].astype(dtype).T
        # [to, from] here: only the transposes are used, which would pass through shared memory.
        rb = causal_product(r, b, same, ops, to_first=True).astype(dtype)
        ab = causal_product(a, b, same, ops, strict=True, to_first=True)
        inverse = unit_triangular_inverse(ab, ops)
        dend = dstate * exp2(half)[None, :]
        d = dend.astype(dtype)
        ends_ref[chunk] = d
        du = dot(dy, rb) + masked(dot(d, b), end)
        dx = dot(du.astype(dtype), inverse).astype(dtype)
        if tuning.reload_sequential:
            r = _scaled(r_ref[tokens, :], exp2(total), dtype)
            a = _scaled(a_ref[tokens, :], exp2(total - log), dtype)
        dy, dx = masked(dy, start), masked(dx, start)
        dstate = masked(dend, through) + dot(dy, r, "xY") + dot(dx, a, "xY")
        return dstate * exp2(half)[None, :]

    dinitial_ref[...] = jax.lax.fori_loop(0, chunks, body, dfinal_ref[...])


def backward_chunks(
    inputs: Inputs,
    dy_ref: Any,
    states_ref: Any,
    ends_ref: Any,
    documents_ref: Any,
    gradients: Inputs,
    *,
    tuning: Tuning,
    ops: TileOps,
) -> None:
    """The gradients of the six inputs, from S and D of each chunk."""
    dtype, dot, exp2, reciprocal = ops
    length = tuning.chunk_length
    first = pl.program_id(0) * tuning.chunks
    r_ref, w_ref, k_ref, v_ref, a_ref, b_ref = inputs
    dr_ref, dw_ref, dk_ref, dv_ref, da_ref, db_ref = gradients

    def body(chunk, carry):
        tokens = pl.ds(chunk * length, length)
        same, start, end, through = _masks(documents_ref, (first + chunk) * length, length)
        exp_minus_w, log, total, _ = chunk_decays(w_ref[tokens, :].T, ops)
        up = exp2(total)
        a = _scaled_once(a_ref[tokens, :], exp2(total - log), dtype)
        b = _scaled_once(b_ref[tokens, :], exp2(-total), dtype)
        k = _scaled_once(k_ref[tokens, :], exp2(-total), dtype)
        r = _scaled_once(r_ref[tokens, :], up, dtype)
        v, dy = v_ref[tokens, :].astype(dtype).T, dy_ref[tokens, :].astype(dtype).T
        inverse = unit_triangular_inverse(causal_product(b, a, same, ops, strict=True), ops)
        ka = causal_product(k, a, same, ops, strict=True).astype(dtype)
        br = causal_product(b, r, same, ops).astype(dtype)
        kr = causal_product(k, r, same, ops).astype(dtype)
        s, d = states_ref[chunk], ends_ref[chunk]
        x = masked(dot(s, a), start) + dot(v, ka)
        u = dot(x.astype(dtype), inverse).astype(dtype)
        # Σ_v S·D of each key channel. On tensor cores it is shorter, but takes registers that the
        # masks of `reset` need; elementwise over whole tiles it would spill in either case.
        if documents_ref is not None or tuning.reload_gradients:
            passing = _sum_by_slices(states_ref, ends_ref, chunk)
        else:
            passing = diagonal(dot(s, d, "Xy"))
        du = masked(dot(d, b), end) + dot(dy, br, "xY")
        dv = masked(dot(d, k), end) + dot(dy, kr, "xY")
        dx = dot(du.astype(dtype), inverse, "xY").astype(dtype)
        dv = dv + dot(dx, ka, "xY")
        dv_ref[tokens, :] = dv.astype(dv_ref.dtype).T
        if tuning.reload_gradients:
            s, exp_minus_w = states_ref[chunk], exp_minus(w_ref[tokens, :].T, ops)
        dkr = causal_product(v, dy, same, ops).astype(dtype)
        dbr = causal_product(u, dy, same, ops).astype(dtype)
        dka = causal_product(v, dx, same, ops, strict=True).astype(dtype)
        dba = causal_product(u, dx, same, ops, strict=True).astype(dtype)
        dr = dot(s, masked(dy, start), "Xy")
        da = dot(s, masked(dx, start), "Xy")
        dr = dr + dot(k, dkr) + dot(b, dbr)
        da = da + dot(k, dka) + dot(b, dba)
        dr_ref[tokens, :] = (dr * up).astype(dr_ref.dtype).T
        # Scales are computed again from `up` and `exp_minus_w`: registers are short here.
        gate = reciprocal(1.0 + exp_minus_w)
        a_scale = up * exp2(DECAY_SCALE * LOG2_E * gate)
        da_ref[tokens, :] = (da * a_scale).astype(da_ref.dtype).T
        if tuning.reload_gradients:
            d, down = ends_ref[chunk], reciprocal(up)
            r, a = _scaled(r_ref[tokens, :], up, dtype), _scaled(a_ref[tokens, :], a_scale, dtype)
            k, b = _scaled(k_ref[tokens, :], down, dtype), _scaled(b_ref[tokens, :], down, dtype)
        # The gradient of the log decay is a sum of terms that cancel. They are products with the
        # rounded operands, so that they do.
        dlog = r.astype(jnp.float32) * dr
        da = a.astype(jnp.float32) * da
        dlog = dlog + da
        kd, bd = dot(d, masked(v, end), "Xy"), dot(d, masked(u, end), "Xy")
        kf, bf = k.astype(jnp.float32), b.astype(jnp.float32)
        passing = masked(passing, through) + jnp.sum(kf * kd + bf * bd, axis=1)
        dk = kd + dot(r, dkr, "xY") + dot(a, dka, "xY")
        dk_ref[tokens, :] = (dk * reciprocal(up)).astype(dk_ref.dtype).T
        dlog = dlog - kf * dk
        db = bd + dot(r, dbr, "xY") + dot(a, dba, "xY")
        db_ref[tokens, :] = (db * reciprocal(up)).astype(db_ref.dtype).T
        dlog = dlog - bf * db
        source, token = positions(length, length)
        dlog = sum_over_tokens(dlog, source >= token, ops) - da + passing[:, None]
        dw = dlog * (-DECAY_SCALE * exp_minus_w * gate * gate)
        dw_ref[tokens, :] = dw.astype(dw_ref.dtype).T
        return carry

    jax.lax.fori_loop(0, tuning.chunks, body, 0)


def _masks(documents_ref: Any, first: Any, length: int) -> DocumentMasks:
    """The masks of the chunk whose first token is `first`."""
    if documents_ref is None:
        return DocumentMasks()
    before = documents_ref[first]
    own = documents_ref[pl.ds(first + 1, length)]
    after = documents_ref[first + length]
    return document_masks(before, own, after)


def _scaled(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The operand [N, L] of a tile x [L, N] as it is in memory: transposed, times scale [N, L]."""
    return (x.T.astype(jnp.float32) * scale).astype(dtype)


def _scaled_once(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """`_scaled`, for a tile that is used both as it is and transposed.

    XLA moves transposes through arithmetic up to the load of a tile, and would compute the scaled
    tile twice. It does not move them into a loop; the compiler removes this loop of one pass later.
    """
    nothing = jnp.zeros(scale.shape, dtype)
    return jax.lax.fori_loop(0, 1, lambda _, __: _scaled(x, scale, dtype), nothing)


def _sum_by_slices(x_ref: Any, y_ref: Any, chunk: Any) -> jax.Array:
    """Σ_v x·y [N] of a chunk's two states, 16 rows at a time."""
    size, rows = x_ref.shape[-1], 16
    total = jnp.zeros((rows, size), jnp.float32)
    for first in range(0, size, rows):
        here = (chunk, pl.ds(first, rows))
        total = total + x_ref[here].astype(jnp.float32) * y_ref[here].astype(jnp.float32)
    return jnp.sum(total, axis=0)
