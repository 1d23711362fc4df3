"""FLOPs per token and the device's peak, for the model FLOPs utilization (MFU)."""

import math

from pallas_kernels.gpu_targets import GPU_TARGETS
from rwkv_jax.checkpoints.weights import official_shapes
from rwkv_jax.config import ModelConfig


def model_flops(model: ModelConfig) -> int:
    """Returns the FLOPs per token of the forward and backward pass, as MFU counts them.

        6·(entries of all matrices except the embedding) + 24·L·C·N

    The second term is for the recurrence: S a, (S a) bᵀ, v kᵀ and S r take 2·N² FLOPs each per
    head, and the backward pass takes twice as many. Recomputation and the extra arithmetic of the
    chunked form do not count.
    (Chowdhery et al., PaLM, appendix B.)
    """
    matrices = sum(
        math.prod(shape)
        for name, shape in official_shapes(model).items()
        if sum(size > 1 for size in shape) > 1 and name != "emb.weight" and "r_k" not in name
    )
    return 6 * matrices + 24 * model.n_layer * model.n_embd * model.head_size


def peak_flops(device_kind: str, precision: str) -> float:
    """Returns the peak FLOP/s of a device by its data sheet; 0 if the device is unknown."""
    for target in GPU_TARGETS.values():
        if target.device_kind == device_kind:
            in_16_bits = precision in ("bf16", "fp16")
            return 1e12 * (target.tensor_tflops if in_16_bits else target.fp32_tflops)
    return 0.0
