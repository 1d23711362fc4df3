"""How the kernels are launched: by architecture, head size, dtype, and whether states are reset."""

import dataclasses
from typing import Any

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the kernels are launched on a GPU.

    Attributes:
      warps: of a program. One warp has 16 rows of the state, the tile of an `mma`.
      chunk_length: tokens of a chunk. 16 is the smallest side of a tensor-core product.
      chunks: that a program of the gradients' kernel works through. Several hide the latency of
        loads, and cost registers and shared memory.
      stages: of that kernel's prefetching (1: none).
      sequential_stages: of the prefetching in the two sequential kernels.
      reload_sequential: whether the forward kernel loads k and b again (`D`: r and a) for the
        update of the state, instead of holding their tiles in registers since the products between
        tokens.
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


# What differs from a plain launch.
PLAIN: dict[str, Any] = {}
PREFETCH: dict[str, Any] = {"chunks": 8, "stages": 2}
RELOAD: dict[str, Any] = {"reload_sequential": True, "reload_gradients": True}
RELOAD_GRADIENTS: dict[str, Any] = {"reload_gradients": True}

# Chosen so that nothing spills more than 32 bytes a thread with jax 0.10, and 52 with 0.12:
# - prefetching needs registers, of which `reset` (its masks), N = 128 and Blackwell have none left;
# - at N = 128, the tiles that are used early and late do not fit in the registers;
# - Hopper's wgmma reads its right operands from shared memory, so fewer of them are in registers.
CHANGES = {
    # architecture: N ≤ 64, N ≤ 64 with reset, N = 128, N = 128 with reset
    "Ampere, Ada": (PREFETCH, PLAIN, RELOAD, RELOAD),
    "Hopper": (PREFETCH, PLAIN, PLAIN, RELOAD_GRADIENTS),
    "Blackwell": (PLAIN, PLAIN, RELOAD, RELOAD),
}
# float32 tiles are twice as large: held or prefetched, those of N = 128 exceed a consumer card's
# shared memory.
FLOAT32: dict[str, Any] = {"sequential_stages": 1, **RELOAD}


def tuning_for(
    capability: tuple[int, int] | None, size: int, reset: bool, dtype: jnp.dtype
) -> Tuning:
    """The launch for heads of this size on a GPU of this compute capability.

    A GPU newer than all in the table is launched like the newest; no GPU (None) like Hopper.
    """
    major = 9 if capability is None else capability[0]
    architecture = "Ampere, Ada" if major < 9 else "Hopper" if major == 9 else "Blackwell"
    changes = CHANGES[architecture][2 * (size == 128) + reset]
    return Tuning(warps=size // 16, **(FLOAT32 if dtype == jnp.float32 else changes))
