"""The initial value of every tensor, as the official trainer sets it.

Computed with NumPy on the host, one tensor at a time: the same numbers on every device, no
compilation, and only one large factorisation at a time. (Several QR factorisations in one XLA
program can also deadlock its CPU runtime on machines with few cores.)
"""

import math
import zlib

import jax
import numpy as np
import scipy.linalg  # its QR computes in float32; NumPy's in float64

from rwkv_jax.config import ModelConfig
from rwkv_jax.model.rwkv7 import Params, abstract_params


def init_params(config: ModelConfig, seed: int = 0) -> Params:
    """Fresh float32 parameters: the tree of `rwkv7.abstract_params` filled with NumPy arrays.

    A tensor depends on the seed, its own name and its shape, not on the other tensors.
    """
    vectors = _vectors(config)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = ".".join(entry.key for entry in path).removeprefix("blocks.")
        if name in vectors:
            return np.broadcast_to(vectors[name], leaf.shape).astype(np.float32)
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        if name == "emb.weight":
            return rng.uniform(-1e-4, 1e-4, leaf.shape).astype(np.float32)
        *stack, rows, cols = leaf.shape
        array = np.empty(leaf.shape, np.float32)
        for matrix in array.reshape(-1, rows, cols):
            matrix[...] = _orthogonal(rng, rows, cols, _gain(name, rows, cols))
        return array

    return jax.tree.map_with_path(value, abstract_params(config))


def is_of_seed(embedding: np.ndarray, seed: int) -> bool:
    """Whether `emb.weight` [V, C] is that of `init_params` with this seed, up to rounding."""
    rng = np.random.default_rng([seed, zlib.crc32(b"emb.weight")])
    row = rng.uniform(-1e-4, 1e-4, embedding.shape[1])  # the first row is drawn first
    return bool(np.allclose(np.float64(embedding[0]), row, rtol=0, atol=1e-6))


def _gain(name: str, rows: int, cols: int) -> float:
    match name:
        case "att.w2" | "att.a2" | "att.v2" | "att.g2":
            return 0.1 * max(1.0, math.sqrt(rows / cols))
        case "att.key.weight":
            return 0.1
        case "head.weight":
            return 0.5 * max(1.0, math.sqrt(rows / cols))
    return 1.0  # att.receptance, att.value, ffn.key


def _orthogonal(rng: np.random.Generator, rows: int, cols: int, gain: float) -> np.ndarray:
    """gain · an orthogonal [rows, cols] as in PyTorch: QR of a Gaussian, with R's signs in Q."""
    tall = rng.standard_normal((max(rows, cols), min(rows, cols)), np.float32)
    q, r = scipy.linalg.qr(tall, overwrite_a=True, mode="economic", check_finite=False)
    q *= gain * np.sign(np.diag(r))
    return q if rows >= cols else q.T


def _vectors(config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors that are not random, as functions of layer and channel.

    Name → float64, broadcast to the tensor's stacked shape by the caller.
    """
    L, C, N = config.n_layer, config.n_embd, config.head_size
    layer, channel = np.arange(L)[:, None], np.arange(C)[None, :]
    rising = layer / max(L - 1, 1)  # 0 in the first layer, 1 in the last
    falling = 1 - layer / L  # 1 in the first layer
    d = channel / C
    ramp = channel / (C - 1)
    linear = ramp - 0.5
    z = (channel % N - (N - 1) / 2) / ((N - 1) / 2)
    zigzag = z * np.abs(z)
    one, zero = np.ones(()), np.zeros(())
    return {
        **{f"{norm}.weight": one for norm in ("ln0", "ln1", "ln2", "ln_out")},
        **{f"{norm}.bias": zero for norm in ("ln0", "ln1", "ln2", "ln_out", "att.ln_x")},
        "att.ln_x.weight": ((1 + layer) / L) ** 0.7,
        "att.x_r": 1 - d ** (0.2 * falling),
        "att.x_w": 1 - d ** (0.9 * falling),
        "att.x_k": 1 - d ** (0.7 * falling),
        "att.x_v": 1 - d ** (0.7 * falling),
        "att.x_a": 1 - d ** (0.9 * falling),
        "att.x_g": 1 - d ** (0.2 * falling),
        "att.w0": -6 + 6 * ramp ** (1 + rising**0.3) + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
        "att.v0": 0.73 - 0.4 * linear,
        "att.k_k": 0.71 - 0.1 * linear,
        "att.k_a": np.full((), 1.02),
        "att.r_k": np.full((), -0.04),
        **{f"att.{name}1": zero for name in "wavg"},
        "att.output.weight": zero,
        "ffn.value.weight": zero,
        "ffn.x_k": 1 - d ** (falling**4),
    }
