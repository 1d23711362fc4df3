"""Seeded inputs of the GPU benchmarks, made with NumPy: the same bits for every framework."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from pallas_kernels.wkv7.api import HEAD_SIZES
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec
from rwkv_jax.errors import UserError


def shape(text: str) -> tuple[str, ArgSpec]:
    """A name in `ARG_SPECS`, or B,T,H,N: what a command is given, and the shape.

    Raises:
        UserError: it is neither.
    """
    if text in ARG_SPECS:
        return text, ARG_SPECS[text]
    words = text.split(",")
    if len(words) != 4 or not all(word.isdecimal() and int(word) for word in words):
        known = ", ".join(ARG_SPECS)
        raise UserError(f"--shapes {text}: is neither B,T,H,N nor one of {known}")
    spec = ArgSpec(*map(int, words))
    if spec.size not in HEAD_SIZES:
        raise UserError(f"--shapes {text}: heads are of {', '.join(map(str, HEAD_SIZES))}")
    return text, spec


def tokens(batch: int, ctx_len: int, vocab: int) -> np.ndarray:
    """The batch of training steps: int32 [batch, ctx_len + 1], uniform over the vocabulary."""
    return np.random.default_rng(0).integers(0, vocab, (batch, ctx_len + 1), np.int32)


def wkv7_inputs(spec: ArgSpec, seed: int) -> dict[str, np.ndarray]:
    """r, w, k, v, a, b and the gradient dy of the output, bfloat16 [B,T,H,N] each.

    As RWKV-7 has them: w is the raw logit of a slow decay, −a a unit vector, b a part of it.
    """

    def normal(stream: int) -> np.ndarray:
        return np.random.default_rng((seed, stream)).standard_normal(tuple(spec), np.float32)

    with ThreadPoolExecutor() as pool:  # a stream of its own for each array: numpy lets others run
        r, k, v, dy, w, kk, rate = pool.map(normal, range(7))
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    b = kk / (1 + np.exp(-rate))
    arrays = {"r": r, "w": w - 4, "k": k, "v": v, "a": -kk, "b": b, "dy": dy}
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}


def sha256(arrays: Iterable[np.ndarray]) -> str:
    """Of the arrays' dtypes, shapes and values, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.name} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
