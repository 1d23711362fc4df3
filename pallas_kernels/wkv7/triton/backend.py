"""All that comes from `jax.experimental.pallas.triton`, which a later jax may no longer have."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:  # deprecated since jax 0.11; its successor has no consumer GPUs yet
    pltriton = None  # type: ignore[assignment]

from pallas_kernels.wkv7.numerics import TileOps, operand_dtype

# jax warns where a kernel is lowered: in the user's jit.
warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)


def missing() -> str | None:
    """Why there is no Triton backend in this jax; None when there is one."""
    if pltriton is not None:
        return None
    return (
        f"needs jax.experimental.pallas.triton, which jax {jax.__version__} does not have; "
        "jax 0.12 has it"
    )


def compiler_params(warps: int, stages: int) -> Any:
    """Warps of a program and stages of its prefetching, for `pallas_call`."""
    return pltriton.CompilerParams(num_warps=warps, num_stages=stages)


def tile_ops(input_dtype: jnp.dtype, precision: Any, interpret: bool) -> TileOps:
    """The operations on tiles for inputs of this dtype; `precision` is that of float32 products."""
    dtype = operand_dtype(input_dtype)
    precision = precision if dtype == jnp.float32 else None

    def dot(x: jax.Array, y: jax.Array, contract: str = "xy") -> jax.Array:
        axes = ((0 if contract[0] == "X" else 1,), (1 if contract[1] == "Y" else 0,))
        return jax.lax.dot_general(
            x, y, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
        )

    if interpret:
        return TileOps(dtype, dot, jnp.exp2, jnp.reciprocal)
    exp2, reciprocal = (functools.partial(_instruction, name) for name in ("ex2", "rcp"))
    return TileOps(dtype, dot, exp2, reciprocal)


def _instruction(name: str, x: jax.Array) -> jax.Array:
    """One PTX instruction (relative error 2^-22); jnp.exp2 and a division take ten."""
    [result] = pltriton.elementwise_inline_asm(
        f"{name}.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result
