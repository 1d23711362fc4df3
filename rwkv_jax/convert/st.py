"""safetensors files, read and written one tensor at a time, and the .st of web-rwkv and Ai00.

A .st has the official names and shapes, except that the low-rank matrices are transposed, as in
linear layers. All tensors are float16. Source: web-rwkv, assets/scripts/convert_safetensors.py and
src/runtime/loader.rs.
"""

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from rwkv_jax.checkpoints import pth
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors

_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


def is_turned(name: str) -> bool:
    """Whether an official tensor is one of the low-rank matrices, which linear layers transpose."""
    return re.fullmatch(r"blocks\.\d+\.att\.[wavg][12]", name) is not None


class Turned:
    """A tensor in the shape of the other layout; its values are transposed when they are used."""

    def __init__(self, name: str, tensor: pth.Array, shape: tuple[int, ...]):
        self.shape, self.dtype = shape, tensor.dtype
        self._tensor, self._turned = tensor, is_turned(name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self._tensor, dtype)
        return np.ascontiguousarray(array.T if self._turned else array).reshape(self.shape)


def to_st(tensors: Mapping[str, pth.Array]) -> dict[str, pth.Array]:
    """Official tensors in the layout of a .st. The function is its own inverse."""
    return {
        name: Turned(name, tensor, _shape(name, tuple(tensor.shape)))
        for name, tensor in tensors.items()
    }


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if is_turned(name) else shape


def is_safetensors(path: Path) -> bool:
    """Whether a file has this format; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return pth.is_safetensors(file.read(64))
    except OSError:
        return False


def read_st(path: Path) -> dict[str, pth.Array]:
    """Official tensors of a .st. Values are read when they are used.

    Raises:
        UserError: the file is missing or damaged, or a tensor is not floating point.
    """
    return to_st(open_safetensors(path))


def open_safetensors(path: Path) -> dict[str, pth.Array]:
    """Name → tensor of a safetensors file. Values are read when they are used.

    Raises:
        UserError: the file is missing or damaged, or a tensor is not floating point.
    """
    with reporting_os_errors(path, "read"):
        try:
            file = safetensors.safe_open(path, framework="np")
            return {name: _Lazy(file, name) for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: is damaged or not a safetensors file: {error}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


class _Lazy:
    """A tensor of an open .safetensors file, read when its values are used."""

    def __init__(self, file: Any, name: str):
        part = file.get_slice(name)
        if part.get_dtype() not in _DTYPES:
            raise UserError(f"{name} is {part.get_dtype()}, not floating point: is it quantised?")
        self.shape: tuple[int, ...] = tuple(part.get_shape())
        self.dtype = np.dtype(_DTYPES[part.get_dtype()])
        self._file, self._name = file, name

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._file.get_tensor(self._name), dtype)


def write_safetensors(path: Path, tensors: Mapping[str, pth.Array], dtype: Any = None) -> None:
    """Writes a safetensors file, one tensor in memory at a time.

    The format is an uint64 length, a JSON header padded to 8 bytes, and the tensors end to end. The
    safetensors package can write it too, but needs all tensors in memory at once.

    Args:
        dtype: to convert to, rounding to nearest even; None keeps the dtype of each tensor.

    Raises:
        UserError: a dtype is not one of the three above.
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    dtypes = {name: np.dtype(dtype or tensor.dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if dtypes[name] not in _CODES:
            raise UserError(
                f"{name} is {dtypes[name]}: only float32, bfloat16 and float16 are converted"
            )
        begin, end = end, end + math.prod(tensor.shape) * dtypes[name].itemsize
        header[name] = {
            "dtype": _CODES[dtypes[name]],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            file.write(np.asarray(tensor, dtypes[name]).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
