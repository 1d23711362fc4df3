"""The calls of the kernels: BlockSpecs, `pallas_call`, and the derivative rule."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gpu_targets import current_compute_capability
from pallas_kernels.wkv7.inputs import Inputs
from pallas_kernels.wkv7.numerics import PADDED_LOGIT, operand_dtype
from pallas_kernels.wkv7.triton import backend, kernels
from pallas_kernels.wkv7.triton.tuning import Tuning, tuning_for


@dataclasses.dataclass(frozen=True)
class _Options:
    """The static part of a call."""

    tuning: Tuning
    precision: Any  # of float32 products
    interpret: bool


def wkv7_pallas_triton(
    inputs: Inputs,
    initial_state: jax.Array,
    reset: jax.Array | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """y [B,T,H,N] in v's dtype and the final state [B,H,N,N], as `api.wkv7` defines them.

    `interpret` runs the kernels as plain JAX, on any device: for tests.

    Raises:
      NotImplementedError: `refusal` gives a reason.
    """
    reason = refusal(inputs.v, interpret)
    if reason is not None:
        raise NotImplementedError(f"pallas_triton {reason}")
    time, size = inputs.v.shape[1], inputs.v.shape[-1]
    tuning = tuning_for(current_compute_capability(), size, reset is not None, inputs.v.dtype)
    padding = ((0, 0), (0, -time % tuning.chunk_length), (0, 0), (0, 0))
    if time % tuning.chunk_length:
        values = Inputs(0, PADDED_LOGIT, 0, 0, 0, 0)
        inputs = jax.tree.map(
            lambda x, value: jnp.pad(x, padding, constant_values=value), inputs, values
        )
    documents = None
    if reset is not None:
        # [B,1+T]: documents before each token, after a zero for the initial state.
        documents = jnp.cumsum(reset.astype(jnp.int32), axis=1)
        documents = jnp.pad(documents, ((0, 0), (1, 0)))
        documents = jnp.pad(documents, padding[:2], mode="edge")
    chunks = math.gcd(tuning.chunks, inputs.v.shape[1] // tuning.chunk_length)
    options = _Options(dataclasses.replace(tuning, chunks=chunks), _precision(interpret), interpret)
    y, final_state = _wkv7(options, inputs, initial_state, documents)
    return y[:, :time], final_state


def refusal(v: jax.Array, interpret: bool = False) -> str | None:
    """Why this implementation cannot serve v [B,T,H,N] on the present device; None when it can."""
    if backend.missing():
        return backend.missing()
    if v.dtype == jnp.float64:
        return "has no float64: use implementation='xla'"
    if v.size * v.shape[-1] // Tuning.chunk_length >= 2**31:
        return (
            f"addresses its states with 32 bits: too many tokens and heads in {v.shape}; split them"
        )
    capability = current_compute_capability()
    if not interpret and (capability is None or capability < (8, 0)):
        found = "there is none" if capability is None else f"this one has {capability}"
        return f"needs an NVIDIA GPU of compute capability 8.0 or more; {found}"
    return None


def _precision(interpret: bool) -> Any:
    """Of float32 products: exact, unless `jax.default_matmul_precision` asks for less (TF32)."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if asked not in (None, "highest", "float32"):
        return jax.lax.Precision.DEFAULT
    return jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wkv7(options, inputs, initial_state, documents):
    y, final_state, _ = _forward(options, inputs, initial_state, documents, save=False)
    return y, final_state


def _wkv7_fwd(options, inputs, initial_state, documents):
    y, final_state, states = _forward(options, inputs, initial_state, documents, save=True)
    return (y, final_state), (inputs, documents, states)


def _wkv7_bwd(options, saved, cotangents):
    inputs, documents, states = saved
    dy, dfinal_state = cotangents
    ends, dinitial_state = _backward_ends(options, inputs, dy, dfinal_state, documents)
    gradients = _backward_chunks(options, inputs, dy, states, ends, documents)
    return gradients, dinitial_state, None


_wkv7.defvjp(_wkv7_fwd, _wkv7_bwd)


class _Layout(NamedTuple):
    """The programs of a kernel, and the block that one gets of each kind of array."""

    grid: tuple[int, ...]  # (…, B·H)
    stages: int  # of prefetching
    tokens: pl.BlockSpec  # of [B,T,H,N]
    state: pl.BlockSpec  # of [B,H,N,N]
    states: pl.BlockSpec  # of [B,H,C,N,N]
    documents: pl.BlockSpec  # of [B,1+T]


def _layout(options: _Options, v: jax.Array, sequential: bool) -> _Layout:
    """One program for each head of each sequence: for all of its chunks, or for `tuning.chunks`."""
    batch, time, head, size = v.shape
    tuning = options.tuning
    length = tuning.chunk_length
    chunks = time // length if sequential else tuning.chunks
    grid = (batch * head,) if sequential else (time // length // chunks, batch * head)

    def sequence(*program):
        return jax.lax.div(program[-1], jnp.int32(head))

    def sequence_and_head(*program):
        return sequence(*program), jax.lax.rem(program[-1], jnp.int32(head))

    def group(*program):
        return 0 if sequential else program[0]

    def tokens(*program):
        sequence, head = sequence_and_head(*program)
        return sequence, group(*program), head, 0

    return _Layout(
        grid,
        tuning.sequential_stages if sequential else tuning.stages,
        pl.BlockSpec((None, chunks * length, None, size), tokens),
        pl.BlockSpec((None, None, size, size), lambda *i: (*sequence_and_head(*i), 0, 0)),
        pl.BlockSpec(
            (None, None, chunks, size, size), lambda *i: (*sequence_and_head(*i), group(*i), 0, 0)
        ),
        pl.BlockSpec((None, 1 + time), lambda *i: (sequence(*i), 0)),
    )


def _like(x: jax.Array, shape: tuple[int, ...] | None = None, dtype=None) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes x varies over (inside `jax.shard_map`)."""
    axes = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape or x.shape, dtype or x.dtype, manual_axis_type=axes)


def _like_states(options: _Options, v: jax.Array) -> jax.ShapeDtypeStruct:
    """A state a chunk, [B,H,C,N,N], in the dtype of operands."""
    batch, time, head, size = v.shape
    shape = (batch, head, time // options.tuning.chunk_length, size, size)
    return _like(v, shape, operand_dtype(v.dtype))


def _call(
    kernel: Callable,
    options: _Options,
    layout: _Layout,
    reads: list[tuple[Any, pl.BlockSpec]],
    writes: list[tuple[Any, pl.BlockSpec]],
) -> Any:
    """Runs a kernel. It reads and writes pytrees, each with the BlockSpec of its leaves."""
    arrays, in_specs = zip(*reads, strict=True)
    shapes, out_specs = zip(*writes, strict=True)
    dtype = jax.tree.leaves(arrays)[0].dtype
    return pl.pallas_call(
        functools.partial(
            kernel,
            tuning=options.tuning,
            ops=backend.tile_ops(dtype, options.precision, options.interpret),
        ),
        grid=layout.grid,
        in_specs=jax.tree.broadcast(in_specs, arrays),
        out_specs=jax.tree.broadcast(out_specs, shapes),
        out_shape=shapes,
        compiler_params=backend.compiler_params(options.tuning.warps, layout.stages),
        interpret=options.interpret,
        name=f"wkv7_{kernel.__name__}",
    )(*arrays)


def _forward(options, inputs, initial_state, documents, save):
    """y, the final state, and with `save` S [B,H,C,N,N] of every chunk."""
    layout = _layout(options, inputs.v, sequential=True)
    states = _like_states(options, inputs.v) if save else None
    return _call(
        kernels.forward,
        options,
        layout,
        reads=[
            (inputs, layout.tokens),
            (initial_state, layout.state),
            (documents, layout.documents),
        ],
        writes=[
            (_like(inputs.v), layout.tokens),
            (_like(initial_state), layout.state),
            (states, layout.states),
        ],
    )


def _backward_ends(options, inputs, dy, dfinal_state, documents):
    """D [B,H,C,N,N] of every chunk, and the initial state's cotangent [B,H,N,N]."""
    layout = _layout(options, inputs.r, sequential=True)
    return _call(
        kernels.backward_ends,
        options,
        layout,
        reads=[
            (inputs._replace(k=None, v=None), layout.tokens),
            (dy, layout.tokens),
            (dfinal_state, layout.state),
            (documents, layout.documents),
        ],
        writes=[
            (_like_states(options, inputs.r), layout.states),
            (_like(dfinal_state), layout.state),
        ],
    )


def _backward_chunks(options, inputs, dy, states, ends, documents):
    """The gradients of the six inputs, each in its array's dtype."""
    layout = _layout(options, inputs.r, sequential=False)
    [gradients] = _call(
        kernels.backward_chunks,
        options,
        layout,
        reads=[
            (inputs, layout.tokens),
            (dy, layout.tokens),
            (states, layout.states),
            (ends, layout.states),
            (documents, layout.documents),
        ],
        writes=[(jax.tree.map(_like, inputs), layout.tokens)],
    )
    return gradients
