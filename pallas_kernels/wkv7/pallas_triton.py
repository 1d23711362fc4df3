"""WKV-7 in chunks of 16 tokens on the tensor cores: NVIDIA GPUs of compute capability 8.0 and up.

Three kernels, through the Triton route of Pallas (the equations are those of `chunked_xla`):

    forward    one program a head of a sequence; walks over the chunks with the state in registers
               and leaves, for the backward pass, the state at the start of every chunk
    backward   1. `D`: one program a head of a sequence; walks backwards with the state's cotangent
                  in registers and leaves D, the cotangent at every chunk's end times its decay
               2. gradients: programs over all chunks in parallel; given a chunk's state and D,
                  everything else is local to the chunk

Only D → dU → dX → D is sequential in a backward pass; what is cut out of that loop is three
quarters of the work, and there are up to T/16 times more programs for it.

Cost. A token of one head, N = 64, 16-bit operands (an [N] vector is 128 bytes), nothing padded:

                  bytes read                          written                   matrix FLOPs
    forward       r w k v a b             768         y 128 + states 512        56 k      1408 B
    backward 1    r w a b dy              640         D 512                     40 k      1152 B
    backward 2    r w k v a b dy S D     1920         six gradients 768        146 k      2688 B

Critical path. Of a forward chunk, two dependent products lie between the state before it and the
operands that update it (S ãᵀ, the solve), a third is the update; of D's chunk as well (D b̃ᵀ, the
solve, the update). But a Triton program has one instruction stream: what needs no state is in it
as well, ten dependent products a chunk (the sums of decays, b̃ᵀã, six of the inverse, the solve,
the update). In the second backward kernel it is twelve, and chunks do not wait for each other.

Occupancy. Forward and `D` have B·H programs: 96 at 0.1b's micro_bsz 8, 192 at 16, for an H100's
132 cores. So at 96 a program has a core to itself, at 192 60 cores hold two, and up to three fit.
Value rows could be cut over more programs, but all that is local to a chunk would be done again in
each, and that is most of the stream. The second backward kernel has B·H·T/128 programs (3072 at
96), two on a core. docs/wkv7-kernel.md has the streams' lengths and the designs weighed.

Layout. Arrays stay [B,T,H,N] in memory. In registers every tile is transposed, channels by tokens
[N, L]: N/16 warps then own 16 rows each, the state's rows (values) never leave their warp, and an
accumulator is at once the left operand of the next product, without a trip through shared memory.

Numbers. Operands are the inputs' dtype for float32 and bfloat16, and bfloat16 for float16 (in
which the gradients of a mean over a batch underflow); accumulators, decays and the carried state
are float32. W, the product of decays, is counted from the middle of a chunk: 1/128 < W < 128.
(I − A)⁻¹ comes from block doubling, which stays accurate when all keys align. Sums over tokens of
log decays and of their gradients are products with a triangle of ones, of both halves of a
bfloat16 pair (15 bits).
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.gpu_targets import current_compute_capability

# jax says so to whoever lowers a kernel, the user's jit; its successor has no consumer GPUs yet.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)

DECAY_SCALE = math.exp(-0.5)  # log decay = −DECAY_SCALE·sigmoid(w)
LOG2_E = math.log2(math.e)
PADDED_LOGIT = -3e4  # its decay is exactly 1, in float16 too


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernels are launched on a card.

    Attributes:
      warps: of a program; one has 16 rows of the state, the tile of an `mma`.
      chunk_length: tokens of a chunk. 16 is the smallest side of a tensor-core product.
      chunks: that a program of the gradients' kernel goes through. Several hide the latency of
        loads, and cost registers and shared memory.
      stages: of that kernel's prefetching (1: none).
      sequential_stages: of forward's and `D`'s.
      reload_sequential: whether forward loads k and b again (`D`: r and a) for the update of the
        state, instead of holding their tiles in registers since the products between tokens.
      reload_gradients: whether the gradients' kernel loads S, D, r, w, a, k and b again for their
        second use, and sums Σ S·D elementwise in slices.

    Either reload is for where those registers would spill. A store lies in between, so that the
    compiler does not merge the loads; what they read is in the caches.
    """

    warps: int
    chunk_length: int = 16
    chunks: int = 1
    stages: int = 1
    sequential_stages: int = 2
    reload_sequential: bool = False
    reload_gradients: bool = False


# By compute capability's major, head size, and whether states are reset; chosen so that nothing
# spills more than 32 bytes a thread with jax 0.10, and 52 with 0.12. Hopper's wgmma reads its right
# operands from shared memory, so there fewer of them are in registers.
TUNING = {
    (major, size, reset): tuning
    for majors, size, resets, tuning in (
        ((8, 9), 16, (False,), Tuning(warps=1, chunk_length=16, chunks=8, stages=2)),
        ((8, 9), 16, (True,), Tuning(warps=1, chunk_length=16)),
        ((10, 11, 12), 16, (False, True), Tuning(warps=1, chunk_length=16)),
        ((8, 9), 32, (False,), Tuning(warps=2, chunk_length=16, chunks=8, stages=2)),
        ((8, 9), 32, (True,), Tuning(warps=2, chunk_length=16)),
        ((10, 11, 12), 32, (False, True), Tuning(warps=2, chunk_length=16)),
        ((8, 9), 64, (False,), Tuning(warps=4, chunk_length=16, chunks=8, stages=2)),
        ((8, 9), 64, (True,), Tuning(warps=4, chunk_length=16)),
        ((10, 11, 12), 64, (False, True), Tuning(warps=4, chunk_length=16)),
        ((9,), 128, (False,), Tuning(warps=8, chunk_length=16)),
        ((9,), 128, (True,), Tuning(warps=8, chunk_length=16, reload_gradients=True)),
        (
            (8, 10, 11, 12),
            128,
            (False, True),
            Tuning(warps=8, chunk_length=16, reload_sequential=True, reload_gradients=True),
        ),
    )
    for major in majors
    for reset in resets
}


def tuning_for(
    capability: tuple[int, int] | None, size: int, reset: bool, dtype: jnp.dtype
) -> Tuning:
    """The row of `TUNING`; a card newer than all in it takes the newest's, no GPU Hopper's."""
    major = 9 if capability is None else min(capability[0], 12)
    tuning = TUNING[major, size, reset]
    if dtype == jnp.float32:
        # Tiles twice as large: held or prefetched, those of N = 128 exceed a consumer card's shared
        # memory.
        return dataclasses.replace(
            tuning,
            chunks=1,
            stages=1,
            sequential_stages=1,
            reload_sequential=True,
            reload_gradients=True,
        )
    return tuning


@dataclasses.dataclass(frozen=True)
class _Options:
    """What is static in a call."""

    tuning: Tuning
    precision: Any  # of float32 products
    interpret: bool


def wkv7_pallas_triton(
    r: jax.Array,
    w: jax.Array,
    k: jax.Array,
    v: jax.Array,
    a: jax.Array,
    b: jax.Array,
    initial_state: jax.Array,
    reset: jax.Array | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y [B,T,H,N] in v's dtype and the final state [B,H,N,N], as `api.wkv7` defines them.

    `interpret` runs the kernels as plain JAX, on any device: for tests.
    """
    reason = refusal(v, interpret)
    if reason is not None:
        raise NotImplementedError(f"pallas_triton {reason}")
    time, size = v.shape[1], v.shape[-1]
    tuning = tuning_for(current_compute_capability(), size, reset is not None, v.dtype)
    padding = ((0, 0), (0, -time % tuning.chunk_length), (0, 0), (0, 0))
    if time % tuning.chunk_length:
        r, k, v, a, b = (jnp.pad(x, padding) for x in (r, k, v, a, b))
        w = jnp.pad(w, padding, constant_values=PADDED_LOGIT)
    segment = None
    if reset is not None:
        # [B,1+T]: documents before each token, after a zero for the initial state.
        documents = jnp.cumsum(reset.astype(jnp.int32), axis=1)
        segment = jnp.pad(documents, ((0, 0), (1, 0)))
        segment = jnp.pad(segment, padding[:2], mode="edge")
    chunks = math.gcd(tuning.chunks, r.shape[1] // tuning.chunk_length)
    options = _Options(dataclasses.replace(tuning, chunks=chunks), _precision(interpret), interpret)
    y, final_state = _wkv7(options, r, w, k, v, a, b, initial_state, segment)
    return y[:, :time], final_state


def refusal(v: jax.Array, interpret: bool = False) -> str | None:
    """Why this implementation cannot serve v [B,T,H,N] on the present device; None when it can."""
    if v.dtype == jnp.float64:
        return "has no float64: use implementation='xla'"
    if v.size * v.shape[-1] // Tuning.chunk_length >= 2**31:
        return (
            f"addresses its states with 32 bits: too many tokens and heads in {v.shape}; cut them"
        )
    capability = current_compute_capability()
    if not interpret and (capability is None or capability < (8, 0)):
        found = "there is none" if capability is None else f"this one has {capability}"
        return f"needs an NVIDIA GPU of compute capability 8.0 or more; {found}"
    return None


def _precision(interpret: bool):
    """Of float32 products: exact, unless `jax.default_matmul_precision` asks for less (TF32)."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if asked not in (None, "highest", "float32"):
        return jax.lax.Precision.DEFAULT
    return jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv7(options, r, w, k, v, a, b, initial_state, segment):
    y, final_state = _forward(options, False, r, w, k, v, a, b, initial_state, segment)
    return y, final_state


def _wkv7_fwd(options, r, w, k, v, a, b, initial_state, segment):
    y, final_state, states = _forward(options, True, r, w, k, v, a, b, initial_state, segment)
    return (y, final_state), (r, w, k, v, a, b, segment, states)


def _wkv7_bwd(options, saved, cotangents):
    r, w, k, v, a, b, segment, states = saved
    dy, dfinal_state = cotangents
    dinitial_state, ends = _backward_ends(options, r, w, a, b, dy, dfinal_state, segment)
    gradients = _backward_chunks(options, r, w, k, v, a, b, dy, states, ends, segment)
    return *gradients, dinitial_state, None


_wkv7.defvjp(_wkv7_fwd, _wkv7_bwd)


# The kernels. Tiles are [N, L], channels by tokens; matrices between tokens are [from, to].


def _tools(options: _Options, dtype) -> tuple[Callable, Callable, Callable]:
    """(dot, exp2, reciprocal) for operands of this dtype."""
    precision = options.precision if dtype == jnp.float32 else None

    def dot(x, y, contract: str = "xy"):
        """x·y; in `contract`, X or Y stands for the transposed matrix."""
        axes = ((0 if contract[0] == "X" else 1,), (1 if contract[1] == "Y" else 0,))
        return jax.lax.dot_general(
            x, y, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    if options.interpret:
        return dot, jnp.exp2, jnp.reciprocal

    def instruction(name: str, x: jax.Array) -> jax.Array:
        # One instruction each (relative error 2^-22); jnp.exp and a division are ten.
        [result] = plgpu.elementwise_inline_asm(
            f"{name}.approx.ftz.f32 $0, $1;",
            args=[x],
            constraints="=f,f",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        )
        return result

    return dot, functools.partial(instruction, "ex2"), functools.partial(instruction, "rcp")


def _operand_dtype(dtype):
    return jnp.float32 if dtype == jnp.float32 else jnp.bfloat16


def _positions(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    shape = (rows, columns)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, column


def _only(mask, x: jax.Array) -> jax.Array:
    """x where the mask holds, else 0; a mask of None holds everywhere."""
    return x if mask is None else jnp.where(mask, x, 0.0)


def _sum_tokens(x: jax.Array, which: jax.Array, dtype, dot) -> jax.Array:
    """x [N, L] times a 0/1 matrix [L, L]: sums over some tokens, for each token."""
    if dtype == jnp.float32:
        return dot(x, jnp.where(which, 1.0, 0.0))
    ones = jnp.where(which, 1.0, 0.0).astype(dtype)
    # Cut off, not rounded: the conversion that rounds a single value is slow.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return dot(high.astype(dtype), ones) + dot((x - high).astype(dtype), ones)


def _odds(w: jax.Array, exp2) -> jax.Array:
    """exp(−w), bounded."""
    return exp2(jnp.minimum(-LOG2_E * w.astype(jnp.float32), 100.0))


def _decays(w: jax.Array, dtype, dot, exp2, reciprocal) -> tuple[jax.Array, ...]:
    """(exp(−w), log2 decay, its sum up to and with each token, half its sum over the chunk [N]).

    The third is counted from the middle of the chunk, the fourth, where W = 1.
    """
    odds = _odds(w, exp2)
    log = -DECAY_SCALE * LOG2_E * reciprocal(1.0 + odds)
    length = w.shape[1]
    source, token = _positions(length, length)
    total = _sum_tokens(log, source <= token, dtype, dot)
    last = _positions(*total.shape)[1] == length - 1
    half = 0.5 * jnp.sum(jnp.where(last, total, 0.0), axis=1)
    return odds, log, total - half[:, None], half


def _scaled(x: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """A tile [L, N] as it lies in memory, transposed to [N, L] and scaled: an operand."""
    return (x.T.astype(jnp.float32) * scale).astype(dtype)


def _scaled_once(x: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """`_scaled`, for a tile that is used both ways round: it would be made twice, for each.

    XLA moves transposes through arithmetic up to where a tile was loaded, but not into a loop; this
    loop of one pass the compiler removes afterwards.
    """
    nothing = jnp.zeros(scale.shape, dtype)
    return jax.lax.fori_loop(0, 1, lambda _, __: _scaled(x, scale, dtype), nothing)


def _inverse(m: jax.Array, dtype, dot) -> jax.Array:
    """(I − M)⁻¹ for M [L, L] strictly on one side of the diagonal, by block doubling.

    The highest set bit of i xor j is half the size of the smallest aligned block that holds both.
    """
    row, column = _positions(*m.shape)
    apart = row ^ column
    inverse = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, m, 0.0))
    size = 2
    while size < m.shape[0]:
        between = jnp.where((apart >= size) & (apart < 2 * size), m, 0.0).astype(dtype)
        blocks = inverse.astype(dtype)
        inverse = inverse + dot(dot(blocks, between).astype(dtype), blocks)
        size *= 2
    return inverse.astype(dtype)


# Σ_v S·D per key channel, two ways. On tensor cores it is the shorter, but takes registers that the
# masks of `reset` need; elementwise over whole tiles it would spill in either case.


def _diagonal(x: jax.Array) -> jax.Array:
    row, column = _positions(*x.shape)
    return jnp.sum(jnp.where(row == column, x, 0.0), axis=1)


def _sum_by_slices(x_ref, y_ref, chunk) -> jax.Array:
    size, rows = x_ref.shape[-1], 16
    total = jnp.zeros((rows, size), jnp.float32)
    for first in range(0, size, rows):
        here = (chunk, pl.ds(first, rows))
        total = total + x_ref[here].astype(jnp.float32) * y_ref[here].astype(jnp.float32)
    return jnp.sum(total, axis=0)


def _documents(segment_ref, first, length: int) -> tuple[Any, Any, Any, Any]:
    """What may reach what when states are reset, in the chunk from token `first`; else all None.

    (token and token [L, L], the state before and token [1, L], token and the state after [1, L],
    the state before and the state after []).
    """
    if segment_ref is None:
        return None, None, None, None
    before = segment_ref[first]
    own = segment_ref[pl.ds(first + 1, length)]
    after = segment_ref[first + length]
    return (
        own[:, None] == own[None, :],
        own[None, :] == before,
        own[None, :] == after,
        before == after,
    )


def _between(dot, x, y, same, strictly: bool = False, to_first: bool = False) -> jax.Array:
    """xᵀ y, [from, to] of a chunk's tokens, where one reaches the other; elsewhere 0.

    `to_first`: x is of the tokens that are reached, and the matrix [to, from].
    """
    source, token = _positions(x.shape[1], y.shape[1])[:: -1 if to_first else 1]
    reaches = source < token if strictly else source <= token
    return _only(reaches if same is None else reaches & same, dot(x, y, "Xy"))


def _split(rest: tuple, documents: bool) -> tuple[Any, tuple]:
    """The references after the fixed inputs: (segment or None, outputs)."""
    return (rest[0], rest[1:]) if documents else (None, rest)


def _forward_kernel(
    r_ref, w_ref, k_ref, v_ref, a_ref, b_ref, initial_ref, *rest, options, documents
):
    segment_ref, (y_ref, final_ref, *states_ref) = _split(rest, documents)
    dtype = _operand_dtype(r_ref.dtype)
    dot, exp2, reciprocal = _tools(options, dtype)
    length = options.tuning.chunk_length

    def body(chunk, state):
        tokens = pl.ds(chunk * length, length)
        same, before, after, through = _documents(segment_ref, chunk * length, length)
        _, log, total, half = _decays(w_ref[tokens, :].T, dtype, dot, exp2, reciprocal)
        r = _scaled(r_ref[tokens, :], exp2(total), dtype)
        a = _scaled(a_ref[tokens, :], exp2(total - log), dtype)
        k = _scaled(k_ref[tokens, :], exp2(-total), dtype)
        b = _scaled(b_ref[tokens, :], exp2(-total), dtype)
        v = v_ref[tokens, :].astype(dtype).T
        ba = _between(dot, b, a, same, strictly=True)
        ka = _between(dot, k, a, same, strictly=True).astype(dtype)
        kr = _between(dot, k, r, same).astype(dtype)
        br = _between(dot, b, r, same).astype(dtype)
        solve = _inverse(ba, dtype, dot)
        state = state * exp2(half)[None, :]
        s = state.astype(dtype)
        for ref in states_ref:
            ref[chunk] = s
        # What a reset cuts off is cut from the operands: fewer values than the products.
        a, r = _only(before, a), _only(before, r)
        x = dot(v, ka) + dot(s, a)
        u = dot(x.astype(dtype), solve).astype(dtype)
        y = dot(v, kr) + dot(s, r) + dot(u, br)
        y_ref[tokens, :] = y.astype(y_ref.dtype).T
        if options.tuning.reload_sequential:
            k = _scaled(k_ref[tokens, :], exp2(-total), dtype)
            b = _scaled(b_ref[tokens, :], exp2(-total), dtype)
        state = (
            _only(through, state) + dot(_only(after, v), k, "xY") + dot(_only(after, u), b, "xY")
        )
        return state * exp2(half)[None, :]

    final_ref[...] = jax.lax.fori_loop(0, r_ref.shape[0] // length, body, initial_ref[...])


def _backward_ends_kernel(
    r_ref, w_ref, a_ref, b_ref, dy_ref, dfinal_ref, *rest, options, documents
):
    segment_ref, (ends_ref, dinitial_ref) = _split(rest, documents)
    dtype = _operand_dtype(r_ref.dtype)
    dot, exp2, reciprocal = _tools(options, dtype)
    length = options.tuning.chunk_length
    chunks = r_ref.shape[0] // length

    def body(step, dstate):
        chunk = chunks - 1 - step
        tokens = pl.ds(chunk * length, length)
        same, before, after, through = _documents(segment_ref, chunk * length, length)
        _, log, total, half = _decays(w_ref[tokens, :].T, dtype, dot, exp2, reciprocal)
        r = _scaled(r_ref[tokens, :], exp2(total), dtype)
        a = _scaled(a_ref[tokens, :], exp2(total - log), dtype)
        b = _scaled(b_ref[tokens, :], exp2(-total), dtype)
        dy = dy_ref[tokens, :].astype(dtype).T
        # [to, from] here: only their transposes are needed, which cost a trip to shared memory.
        rb = _between(dot, r, b, same, to_first=True).astype(dtype)
        solve = _inverse(_between(dot, a, b, same, strictly=True, to_first=True), dtype, dot)
        end = dstate * exp2(half)[None, :]
        d = end.astype(dtype)
        ends_ref[chunk] = d
        du = dot(dy, rb) + _only(after, dot(d, b))
        dx = dot(du.astype(dtype), solve).astype(dtype)
        if options.tuning.reload_sequential:
            r = _scaled(r_ref[tokens, :], exp2(total), dtype)
            a = _scaled(a_ref[tokens, :], exp2(total - log), dtype)
        dy, dx = _only(before, dy), _only(before, dx)
        dstate = _only(through, end) + dot(dy, r, "xY") + dot(dx, a, "xY")
        return dstate * exp2(half)[None, :]

    dinitial_ref[...] = jax.lax.fori_loop(0, chunks, body, dfinal_ref[...])


def _backward_chunks_kernel(
    r_ref,
    w_ref,
    k_ref,
    v_ref,
    a_ref,
    b_ref,
    dy_ref,
    states_ref,
    ends_ref,
    *rest,
    options,
    documents,
):
    segment_ref, (dr_ref, dw_ref, dk_ref, dv_ref, da_ref, db_ref) = _split(rest, documents)
    dtype = _operand_dtype(r_ref.dtype)
    dot, exp2, reciprocal = _tools(options, dtype)
    length = options.tuning.chunk_length
    first = pl.program_id(0) * options.tuning.chunks

    def body(chunk, carry):
        tokens = pl.ds(chunk * length, length)
        same, before, after, through = _documents(segment_ref, (first + chunk) * length, length)
        odds, log, total, _ = _decays(w_ref[tokens, :].T, dtype, dot, exp2, reciprocal)
        up = exp2(total)
        a = _scaled_once(a_ref[tokens, :], exp2(total - log), dtype)
        b = _scaled_once(b_ref[tokens, :], exp2(-total), dtype)
        k = _scaled_once(k_ref[tokens, :], exp2(-total), dtype)
        r = _scaled_once(r_ref[tokens, :], up, dtype)
        v, dy = v_ref[tokens, :].astype(dtype).T, dy_ref[tokens, :].astype(dtype).T
        solve = _inverse(_between(dot, b, a, same, strictly=True), dtype, dot)
        ka = _between(dot, k, a, same, strictly=True).astype(dtype)
        br = _between(dot, b, r, same).astype(dtype)
        kr = _between(dot, k, r, same).astype(dtype)
        s, d = states_ref[chunk], ends_ref[chunk]
        x = _only(before, dot(s, a)) + dot(v, ka)
        u = dot(x.astype(dtype), solve).astype(dtype)
        if documents or options.tuning.reload_gradients:
            passing = _sum_by_slices(states_ref, ends_ref, chunk)
        else:
            passing = _diagonal(dot(s, d, "Xy"))
        du = _only(after, dot(d, b)) + dot(dy, br, "xY")
        dv = _only(after, dot(d, k)) + dot(dy, kr, "xY")
        dx = dot(du.astype(dtype), solve, "xY").astype(dtype)
        dv = dv + dot(dx, ka, "xY")
        dv_ref[tokens, :] = dv.astype(dv_ref.dtype).T
        if options.tuning.reload_gradients:
            s, odds = states_ref[chunk], _odds(w_ref[tokens, :].T, exp2)
        dkr = _between(dot, v, dy, same).astype(dtype)
        dbr = _between(dot, u, dy, same).astype(dtype)
        dka = _between(dot, v, dx, same, strictly=True).astype(dtype)
        dba = _between(dot, u, dx, same, strictly=True).astype(dtype)
        dr = dot(s, _only(before, dy), "Xy")
        da = dot(s, _only(before, dx), "Xy")
        dr = dr + dot(k, dkr) + dot(b, dbr)
        da = da + dot(k, dka) + dot(b, dba)
        dr_ref[tokens, :] = (dr * up).astype(dr_ref.dtype).T
        # Scales are computed anew from `up` and `odds` rather than kept: registers are short here.
        gate = reciprocal(1.0 + odds)
        a_scale = up * exp2(DECAY_SCALE * LOG2_E * gate)
        da_ref[tokens, :] = (da * a_scale).astype(da_ref.dtype).T
        if options.tuning.reload_gradients:
            d, down = ends_ref[chunk], reciprocal(up)
            r, a = _scaled(r_ref[tokens, :], up, dtype), _scaled(a_ref[tokens, :], a_scale, dtype)
            k, b = _scaled(k_ref[tokens, :], down, dtype), _scaled(b_ref[tokens, :], down, dtype)
        # d log decay: the products with the rounded operands, so that what must cancel does.
        dlog = r.astype(jnp.float32) * dr
        da = a.astype(jnp.float32) * da
        dlog = dlog + da
        kd, bd = dot(d, _only(after, v), "Xy"), dot(d, _only(after, u), "Xy")
        kf, bf = k.astype(jnp.float32), b.astype(jnp.float32)
        passing = _only(through, passing) + jnp.sum(kf * kd + bf * bd, axis=1)
        dk = kd + dot(r, dkr, "xY") + dot(a, dka, "xY")
        dk_ref[tokens, :] = (dk * reciprocal(up)).astype(dk_ref.dtype).T
        dlog = dlog - kf * dk
        db = bd + dot(r, dbr, "xY") + dot(a, dba, "xY")
        db_ref[tokens, :] = (db * reciprocal(up)).astype(db_ref.dtype).T
        dlog = dlog - bf * db
        source, token = _positions(length, length)
        dlog = _sum_tokens(dlog, source >= token, dtype, dot) - da + passing[:, None]
        dw = dlog * (-DECAY_SCALE * odds * gate * gate)
        dw_ref[tokens, :] = dw.astype(dw_ref.dtype).T
        return carry

    jax.lax.fori_loop(0, options.tuning.chunks, body, 0)


# The calls. A program of the first two has a head of a sequence; of the third, some chunks of it.


def _like(x: jax.Array, shape: tuple[int, ...] | None = None, dtype=None) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes x varies over (inside `jax.shard_map`)."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, manual_axis_type=axes)


def _call(kernel, options, grid, stages, inputs, specs, segment, out_specs, out_shape, name):
    head = inputs[0].shape[2]
    if segment is not None:
        inputs = [*inputs, segment]
        specs = [
            *specs,
            pl.BlockSpec((None, segment.shape[1]), lambda *i: (_divide(i[-1], head), 0)),
        ]
    return pl.pallas_call(
        functools.partial(kernel, options=options, documents=segment is not None),
        grid=grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=options.tuning.warps, num_stages=stages),
        interpret=options.interpret,
        name=name,
    )(*inputs)


def _divide(program, head: int):
    return jax.lax.div(program, jnp.int32(head))


def _remainder(program, head: int):
    return jax.lax.rem(program, jnp.int32(head))


def _head_specs(
    time: int, head: int, size: int, length: int
) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """(tokens [T,N], a state [N,N], states [C,N,N]) of program b·H + h."""

    def index(program):
        return _divide(program, head), _remainder(program, head)

    def tokens(program):
        batch, head = index(program)
        return batch, 0, head, 0

    return (
        pl.BlockSpec((None, time, None, size), tokens),
        pl.BlockSpec((None, None, size, size), lambda i: (*index(i), 0, 0)),
        pl.BlockSpec((None, None, time // length, size, size), lambda i: (*index(i), 0, 0, 0)),
    )


def _forward(options, save, r, w, k, v, a, b, initial_state, segment):
    batch, time, head, size = v.shape
    length = options.tuning.chunk_length
    tokens, state, states = _head_specs(time, head, size, length)
    out_specs, out_shape = [tokens, state], [_like(v), _like(initial_state)]
    if save:
        shape = (batch, head, time // length, size, size)
        out_specs.append(states)
        out_shape.append(_like(v, shape, _operand_dtype(v.dtype)))
    return _call(
        _forward_kernel,
        options,
        (batch * head,),
        options.tuning.sequential_stages,
        [r, w, k, v, a, b, initial_state],
        [tokens] * 6 + [state],
        segment,
        out_specs,
        out_shape,
        "wkv7_forward",
    )


def _backward_ends(options, r, w, a, b, dy, dfinal_state, segment):
    """D [B,H,C,N,N] of every chunk, and the initial state's cotangent [B,H,N,N]."""
    batch, time, head, size = r.shape
    length = options.tuning.chunk_length
    tokens, state, states = _head_specs(time, head, size, length)
    shape = (batch, head, time // length, size, size)
    ends, dinitial_state = _call(
        _backward_ends_kernel,
        options,
        (batch * head,),
        options.tuning.sequential_stages,
        [r, w, a, b, dy, dfinal_state],
        [tokens] * 5 + [state],
        segment,
        [states, state],
        [_like(r, shape, _operand_dtype(r.dtype)), _like(dfinal_state)],
        "wkv7_backward_ends",
    )
    return dinitial_state, ends


def _backward_chunks(options, r, w, k, v, a, b, dy, states, ends, segment):
    """The gradients of r, w, k, v, a, b, each in its array's dtype."""
    batch, time, head, size = r.shape
    chunks, length = options.tuning.chunks, options.tuning.chunk_length
    tokens = pl.BlockSpec(
        (None, chunks * length, None, size),
        lambda c, i: (_divide(i, head), c, _remainder(i, head), 0),
    )
    state = pl.BlockSpec(
        (None, None, chunks, size, size),
        lambda c, i: (_divide(i, head), _remainder(i, head), c, 0, 0),
    )
    return _call(
        _backward_chunks_kernel,
        options,
        (time // length // chunks, batch * head),
        options.tuning.stages,
        [r, w, k, v, a, b, dy, states, ends],
        [tokens] * 7 + [state] * 2,
        segment,
        [tokens] * 6,
        [_like(x) for x in (r, w, k, v, a, b)],
        "wkv7_backward_chunks",
    )
