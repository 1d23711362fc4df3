"""proto"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

DECAY_SCALE = 0.6065306597126334


class Cfg:
    M = 8
    G = 1
    cum = 'dot'
    L = 32
    fw = (4, 1)
    bs = (4, 1)
    bp = (4, 1)
    inv = jnp.bfloat16
    interpret = False


def _dot(x, y, tx=False, ty=False):
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((0 if tx else 1,), (1 if ty else 0,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )


def _iota(L):
    return (
        jax.lax.broadcasted_iota(jnp.int32, (L, L), 0),
        jax.lax.broadcasted_iota(jnp.int32, (L, L), 1),
    )


def _inverse(m, row, col, dtype):
    """(I - m)^-1 for strictly triangular m [L, L] by block doubling."""
    L = m.shape[0]
    diff = row ^ col  # the highest set bit tells the smallest block that holds both
    x = jnp.where(diff == 0, 1.0, jnp.where(diff == 1, m, 0.0))
    size = 2
    while size < L:
        off = jnp.where((diff >= size) & (diff < 2 * size), m, 0.0).astype(dtype)
        xd = x.astype(dtype)
        x = x + _dot(_dot(xd, off).astype(dtype), xd)
        size *= 2
    return x


LOG2E = 1.4426950408889634
MODE = "exp2"

def _asm(op, x):
    return plgpu.elementwise_inline_asm(f"{op} $0, $1;", args=[x], constraints="=f,f", pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)])[0]

def _inverses(ms, row, col, dtype):
    L = ms[0].shape[0]
    diff = row ^ col
    xs = [jnp.where(diff == 0, 1.0, jnp.where(diff == 1, m, 0.0)) for m in ms]
    size = 2
    while size < L:
        off = [jnp.where((diff >= size) & (diff < 2 * size), m, 0.0).astype(dtype) for m in ms]
        xd = [x.astype(dtype) for x in xs]
        p = [_dot(x, o).astype(dtype) for x, o in zip(xd, off)]
        xs = [x + _dot(q, d) for x, q, d in zip(xs, p, xd)]
        size *= 2
    return xs

def _exp2(x):
    return jnp.exp2(x) if MODE == "exp2" or Cfg.interpret else _asm("ex2.approx.ftz.f32", x)

def _rcp(x):
    return 1.0 / x if MODE == "exp2" or Cfg.interpret else _asm("rcp.approx.ftz.f32", x)

def _decay(w):
    """gate, log [L,N], cum [L,N], end [N]"""
    gate = _rcp(1.0 + _exp2(-LOG2E * w.astype(jnp.float32)))
    log = (-DECAY_SCALE * LOG2E) * gate  # base 2
    L = log.shape[0]
    row, col = _iota(L)
    tri = jnp.where(row <= col, 1.0, 0.0)
    if w.dtype == jnp.float32:
        cumT = _dot(log, tri, tx=True)
    else:
        hi = log.astype(jnp.bfloat16)
        lo = (log - hi.astype(jnp.float32)).astype(jnp.bfloat16)
        tri = tri.astype(jnp.bfloat16)
        cumT = _dot(hi, tri, tx=True) + _dot(lo, tri, tx=True)
    last = jax.lax.broadcasted_iota(jnp.int32, cumT.shape, 1) == L - 1
    end = _exp2(jnp.sum(jnp.where(last, cumT, 0.0), axis=1))
    return gate, log, cumT.T, end


def _fw_kernel(r_ref, w_ref, k_ref, v_ref, a_ref, b_ref, s0_ref, y_ref, st_ref, sT_ref, *, L, T, cfg):
    dt = r_ref.dtype
    row, col = _iota(L)

    G = cfg.G
    strict, lower = row < col, row <= col
    invdt = cfg.inv if dt != jnp.float32 else dt

    def body(c, S):
        idx = [pl.ds(c * (L * G) + g * L, L) for g in range(G)]
        dec = [_decay(w_ref[i, :]) for i in idx]
        rt = [(r_ref[i, :] * _exp2(d[2])).astype(dt) for i, d in zip(idx, dec)]
        at = [(a_ref[i, :] * _exp2(d[2] - d[1])).astype(dt) for i, d in zip(idx, dec)]
        down = [_exp2(-d[2]) for d in dec]
        kt = [(k_ref[i, :] * d).astype(dt) for i, d in zip(idx, down)]
        bt = [(b_ref[i, :] * d).astype(dt) for i, d in zip(idx, down)]
        v = [v_ref[i, :] for i in idx]
        ab = [jnp.where(strict, _dot(y, x, ty=True), 0.0) for x, y in zip(at, bt)]
        ak = [jnp.where(strict, _dot(y, x, ty=True), 0.0).astype(dt) for x, y in zip(at, kt)]
        rk = [jnp.where(lower, _dot(y, x, ty=True), 0.0).astype(dt) for x, y in zip(rt, kt)]
        rb = [jnp.where(lower, _dot(y, x, ty=True), 0.0).astype(dt) for x, y in zip(rt, bt)]
        inv = _inverses(ab, row, col, invdt)
        inv = [x.astype(dt) for x in inv]
        for g in range(G):
            Sb = S.astype(dt)
            if g == 0:
                st_ref[c] = Sb
            X = _dot(v[g], ak[g], tx=True) + _dot(Sb, at[g], ty=True)
            U = _dot(X.astype(dt), inv[g]).astype(dt)
            Y = _dot(v[g], rk[g], tx=True) + _dot(Sb, rt[g], ty=True) + _dot(U, rb[g])
            y_ref[idx[g], :] = Y.T.astype(dt)
            S = S + _dot(v[g], kt[g], tx=True) + _dot(U, bt[g])
            S = S * dec[g][3][None, :]
        return S

    S = jax.lax.fori_loop(0, T // (L * cfg.G), body, s0_ref[...])
    sT_ref[...] = S


def fw(r, w, k, v, a, b, s0, cfg):
    B, T, H, N = r.shape
    L = cfg.L
    tok = pl.BlockSpec((None, T, None, N), lambda h, b: (b, 0, h, 0))
    st = pl.BlockSpec((None, None, N, N), lambda h, b: (b, h, 0, 0))
    sts = pl.BlockSpec((None, None, T // (L * cfg.G), N, N), lambda h, b: (b, h, 0, 0, 0))
    return pl.pallas_call(
        partial(_fw_kernel, L=L, T=T, cfg=cfg),
        grid=(H, B), in_specs=[tok] * 6 + [st], out_specs=[tok, sts, st],
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype),
                   jax.ShapeDtypeStruct((B, H, T // (L * cfg.G), N, N), v.dtype),
                   jax.ShapeDtypeStruct((B, H, N, N), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=cfg.fw[0], num_stages=cfg.fw[1]),
        interpret=cfg.interpret,
    )(r, w, k, v, a, b, s0)


def _bs_kernel(r_ref, w_ref, a_ref, b_ref, dy_ref, dsT_ref, ds_ref, ds0_ref, *, L, T, cfg):
    dt = r_ref.dtype
    row, col = _iota(L)
    C = T // L

    def body(n, dS):
        c = C - 1 - n
        i = pl.ds(c * L, L)
        gate, log, cum, end = _decay(w_ref[i, :])
        up, upb, down = _exp2(cum), _exp2(cum - log), _exp2(-cum)
        rt = (r_ref[i, :] * up).astype(dt)
        at = (a_ref[i, :] * upb).astype(dt)
        bt = (b_ref[i, :] * down).astype(dt)
        dy = dy_ref[i, :]
        ab = jnp.where(row > col, _dot(at, bt, ty=True), 0.0)
        rb = jnp.where(row >= col, _dot(rt, bt, ty=True), 0.0).astype(dt)
        inv = _inverse(ab, row, col, cfg.inv if dt != jnp.float32 else dt).astype(dt)
        D = dS * end[None, :]
        Db = D.astype(dt)
        ds_ref[c] = Db
        dU = _dot(Db, bt, ty=True) + _dot(dy, rb, tx=True)
        dX = _dot(dU.astype(dt), inv).astype(dt)
        return D + _dot(dy, rt, tx=True) + _dot(dX, at)

    ds0_ref[...] = jax.lax.fori_loop(0, C, body, dsT_ref[...])


def bs(r, w, a, b, dy, dsT, cfg):
    B, T, H, N = r.shape
    L = cfg.L
    tok = pl.BlockSpec((None, T, None, N), lambda h, b: (b, 0, h, 0))
    st = pl.BlockSpec((None, None, N, N), lambda h, b: (b, h, 0, 0))
    sts = pl.BlockSpec((None, None, T // L, N, N), lambda h, b: (b, h, 0, 0, 0))
    return pl.pallas_call(
        partial(_bs_kernel, L=L, T=T, cfg=cfg),
        grid=(H, B), in_specs=[tok] * 5 + [st], out_specs=[sts, st],
        out_shape=[jax.ShapeDtypeStruct((B, H, T // L, N, N), r.dtype),
                   jax.ShapeDtypeStruct((B, H, N, N), jnp.float32)],
        compiler_params=plgpu.CompilerParams(num_warps=cfg.bs[0], num_stages=cfg.bs[1]),
        interpret=cfg.interpret,
    )(r, w, a, b, dy, dsT)


def _bp_kernel(r_ref, w_ref, k_ref, v_ref, a_ref, b_ref, dy_ref, S_ref, dS_ref,
               dr_ref, dw_ref, dk_ref, dv_ref, da_ref, db_ref, *, L, T, cfg):
    dt = r_ref.dtype
    f32 = jnp.float32
    row, col = _iota(L)

    def body(c, _):
        i = pl.ds(c * L, L)
        gate, log, cum, end = _decayT(w_ref[i, :].T)
        up, upb, down = _exp2(cum), _exp2(cum - log), _exp2(-cum)
        rt = (r_ref[i, :].T * up).astype(dt)
        at = (a_ref[i, :].T * upb).astype(dt)
        kt = (k_ref[i, :].T * down).astype(dt)
        bt = (b_ref[i, :].T * down).astype(dt)
        v, dy = v_ref[i, :], dy_ref[i, :]
        upper, supper = row <= col, row < col  # [s, t]
        ab = jnp.where(supper, _dot(bt, at, tx=True), 0.0)  # [s, t]
        inv = _inverse(ab, row, col, cfg.inv if dt != jnp.float32 else dt).astype(dt)  # T^T [s,t]
        ak = jnp.where(supper, _dot(kt, at, tx=True), 0.0).astype(dt)
        S = S_ref[c]
        X = _dot(S, at) + _dot(v, ak, tx=True)  # [V, t]
        U = _dot(X.astype(dt), inv).astype(dt)
        D = dS_ref[c]
        rb = jnp.where(upper, _dot(bt, rt, tx=True), 0.0).astype(dt)  # [s, t]
        dU = _dot(D, bt) + _dot(dy, rb, tx=True, ty=True)  # [V, s]
        dX = _dot(dU.astype(dt), inv, ty=True).astype(dt)  # dU^T T : [V,s] sum_t dU[v,t] T[t,s]
        rk = jnp.where(upper, _dot(kt, rt, tx=True), 0.0).astype(dt)
        dv = _dot(D, kt) + _dot(dy, rk, tx=True, ty=True) + _dot(dX, ak, ty=True)
        dv_ref[i, :] = dv.astype(dt).T
        drk = jnp.where(upper, _dot(v, dy, ty=True), 0.0).astype(dt)  # [s, t]
        drb = jnp.where(upper, _dot(U, dy, tx=True, ty=True), 0.0).astype(dt)
        dak = jnp.where(supper, _dot(v, dX), 0.0).astype(dt)
        dab = jnp.where(supper, _dot(U, dX, tx=True), 0.0).astype(dt)
        drt = _dot(S, dy, tx=True, ty=True) + _dot(kt, drk) + _dot(bt, drb)  # [K, t]
        dr_ref[i, :] = (drt * up).astype(dt).T
        dc = rt.astype(f32) * drt
        dat = _dot(S, dX, tx=True) + _dot(kt, dak) + _dot(bt, dab)
        da_ref[i, :] = (dat * upb).astype(dt).T
        dat = at.astype(f32) * dat
        dc = dc + dat
        vd = _dot(D, v, tx=True, ty=True)
        ktf = kt.astype(f32)
        state = ktf * vd
        dkt = vd + _dot(rt, drk, ty=True) + _dot(at, dak, ty=True)
        dk_ref[i, :] = (dkt * down).astype(dt).T
        dc = dc - ktf * dkt
        ud = _dot(D, U, tx=True)
        btf = bt.astype(f32)
        state = jnp.sum(state + btf * ud, axis=1) + jnp.sum(S.astype(f32) * D.astype(f32), axis=0)
        dbt = ud + _dot(rt, drb, ty=True) + _dot(at, dab, ty=True)
        db_ref[i, :] = (dbt * down).astype(dt).T
        dc = dc - btf * dbt
        dlog = _sum_dot(dc, jnp.where(row >= col, 1.0, 0.0), dt) - dat + state[:, None]
        dw_ref[i, :] = (dlog * (-DECAY_SCALE) * gate * (1.0 - gate)).astype(dt).T
        return _

    jax.lax.fori_loop(0, cfg.M, body, 0)


def _sum_dot(x, tri, dt):
    if dt == jnp.float32:
        return _dot(x, tri)
    hi = x.astype(jnp.bfloat16)
    lo = (x - hi.astype(jnp.float32)).astype(jnp.bfloat16)
    tri = tri.astype(jnp.bfloat16)
    return _dot(hi, tri) + _dot(lo, tri)


def _decayT(w):
    gate = _rcp(1.0 + _exp2(-LOG2E * w.astype(jnp.float32)))
    log = (-DECAY_SCALE * LOG2E) * gate
    row, col = _iota(log.shape[1])
    cum = _sum_dot(log, jnp.where(row <= col, 1.0, 0.0), w.dtype)
    last = jax.lax.broadcasted_iota(jnp.int32, cum.shape, 1) == log.shape[1] - 1
    return gate, log, cum, _exp2(jnp.sum(jnp.where(last, cum, 0.0), axis=1))


def bp(r, w, k, v, a, b, dy, S, dS, cfg):
    B, T, H, N = r.shape
    L = cfg.L
    M = cfg.M
    tok = pl.BlockSpec((None, M * L, None, N), lambda h, c, b: (b, c, h, 0))
    st = pl.BlockSpec((None, None, M, N, N), lambda h, c, b: (b, h, c, 0, 0))
    return pl.pallas_call(
        partial(_bp_kernel, L=L, T=T, cfg=cfg),
        grid=(H, T // (L * M), B), in_specs=[tok] * 7 + [st] * 2, out_specs=[tok] * 6,
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype)] * 6,
        compiler_params=plgpu.CompilerParams(num_warps=cfg.bp[0], num_stages=cfg.bp[1]),
        interpret=cfg.interpret,
    )(r, w, k, v, a, b, dy, S, dS)
