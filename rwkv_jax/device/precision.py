"""Which precision a run computes in, and how exact jax makes float32 products."""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_targets import current_compute_capability

PRECISIONS = {"bf16": jnp.bfloat16, "fp32": jnp.float32, "tf32": jnp.float32, "fp16": jnp.float16}


def default_precision(on_gpu: bool, capability: tuple[int, int] | None) -> str:
    """A name in `PRECISIONS`: fp32 on a CPU; bf16, or fp16 on GPUs that have no bf16 units.

    Args:
        capability: of an NVIDIA GPU; those from 8.0 on have bf16 units. None: of any other.
    """
    if not on_gpu:
        return "fp32"
    return "fp16" if capability and capability < (8, 0) else "bf16"


def device_precision() -> str:
    """`default_precision` of jax's default device, for a model that is used without training."""
    return default_precision(jax.default_backend() != "cpu", current_compute_capability())


def use_precision(name: str | None) -> None:
    """Tells jax how exact float32 products are to be, in what is traced from now on.

    Those of "fp32" are exact; left to itself, an NVIDIA GPU would round their operands to TF32.
    """
    matmul = {"fp32": "highest", "tf32": "tensorfloat32"}.get(name or "")
    jax.config.update("jax_default_matmul_precision", matmul)
