"""The model's FLOPs a token and the device's peak: what MFU is made of."""

import math

from pallas_kernels.gpu_targets import GPU_TARGETS
from rwkv_jax.checkpoints.weights import official_shapes
from rwkv_jax.config import ModelConfig


def model_flops(model: ModelConfig) -> int:
    """Floating-point operations a token of forward and backward pass, as MFU counts them.

        6·(entries of all matrices but the embedding) + 24·L·C·N

    The second term is the recurrence's: a head's S a, (S a) bᵀ, v kᵀ and S r take 2·N² each, and
    the backward pass twice that. Recomputation and the chunked form's own arithmetic do not count.
    (Chowdhery et al., PaLM, appendix B.)
    """
    matrices = sum(
        math.prod(shape)
        for name, shape in official_shapes(model).items()
        if sum(size > 1 for size in shape) > 1 and name != "emb.weight" and "r_k" not in name
    )
    return 6 * matrices + 24 * model.n_layer * model.n_embd * model.head_size


def peak_flops(device_kind: str, precision: str) -> float:
    """What a device could do a second, by its data sheet; 0 if it is not one that we know."""
    for target in GPU_TARGETS.values():
        if target.device_kind == device_kind:
            in_16_bits = precision in ("bf16", "fp16")
            return 1e12 * (target.tensor_tflops if in_16_bits else target.fp32_tflops)
    return 0.0
