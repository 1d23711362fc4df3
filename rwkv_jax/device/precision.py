"""The precision of a run, and jax's precision of float32 matrix products."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_targets import current_compute_capability

PRECISIONS = {"bf16": jnp.bfloat16, "fp32": jnp.float32, "tf32": jnp.float32, "fp16": jnp.float16}


def default_precision(on_gpu: bool, capability: tuple[int, int] | None) -> str:
    """A name in `PRECISIONS`: fp32 on a CPU; bf16 on a GPU, or fp16 if it has no bf16 units.

    Args:
        capability: compute capability of an NVIDIA GPU; bf16 units exist from 8.0 on. None: other
            GPUs.
    """
    if not on_gpu:
        return "fp32"
    return "fp16" if capability and capability < (8, 0) else "bf16"


def device_precision() -> str:
    """`default_precision` of jax's default device, for a model that is used without training."""
    return default_precision(jax.default_backend() != "cpu", current_compute_capability())


def use_precision(name: str | None) -> None:
    """Sets jax's matmul precision for everything traced from now on.

    The products of "fp32" are exact; by default an NVIDIA GPU rounds the operands to TF32.
    """
    matmul = {"fp32": "highest", "tf32": "tensorfloat32"}.get(name or "")
    jax.config.update("jax_default_matmul_precision", matmul)
