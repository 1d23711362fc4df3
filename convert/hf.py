"""The Hugging Face layout of RWKV-7: that of flash-linear-attention's `RWKV7ForCausalLM`.

A folder with `config.json` and `model.safetensors`, and the World tokenizer where it is the
model's. Tensors are renamed; the low-rank matrices are transposed, since there they are linear
layers, and vectors are flat except attn.x_*. That model has no v0, v1, v2 in layer 0, which nothing
reads; where a .pth has them, `unused.safetensors` beside keeps them, so that the way back gives the
same bytes.
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

from convert.hf_tokenizer import write_tokenizer
from rwkv_jax import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors
from rwkv_jax.tokenizer import VOCAB_SIZE

HEAD_SIZE = 64  # flash-linear-attention's group norm has eps N·1e-5: right for this N alone

_TOP = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
_PARTS = {"att": "attn", "ffn": "ffn", "ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
_ATT = {
    "receptance": "r_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "ln_x": "g_norm",
}
_LOW_RANK = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
_UNUSED = tuple(f"blocks.0.att.v{n}" for n in "012")
_DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


def hf_name(name: str) -> str:
    """`blocks.3.att.w1` as `model.layers.3.attn.w_lora.lora.0.weight`."""
    if name in _TOP:
        return _TOP[name]
    _, layer, part, *rest = name.split(".")
    if part == "att":
        if re.fullmatch("[wavg][012]", rest[0]):
            rest = [f"{rest[0][0]}_lora", "lora", _LOW_RANK[rest[0][1]]]
        else:
            rest[0] = _ATT.get(rest[0], rest[0])
    return ".".join(["model.layers", layer, _PARTS[part], *rest])


def _is_transposed(name: str) -> bool:
    return re.fullmatch(r"blocks\.\d+\.att\.[wavg][12]", name) is not None


class _Turned:
    """A tensor in the shape of the other layout; its values are turned when they are used."""

    def __init__(self, name: str, tensor: pth.Array, shape: tuple[int, ...]):
        self.shape, self.dtype = shape, tensor.dtype
        self._tensor, self._transposed = tensor, _is_transposed(name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.asarray(self._tensor)
        return np.ascontiguousarray(array.T if self._transposed else array).reshape(self.shape)


def _hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if _is_transposed(name):
        return shape[::-1]
    return shape[2:] if len(shape) == 3 and ".att.x_" not in name else shape


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """What `RWKV7Config` needs to build the model; everything else has its default there."""
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "hidden_size": config.n_embd,
        "hidden_ratio": config.dim_ffn / config.n_embd,
        "intermediate_size": config.dim_ffn,
        "num_hidden_layers": config.n_layer,
        "head_dim": config.head_size,
        "num_heads": config.n_head,
        "value_dim": [config.n_embd] * config.n_layer,
        "decay_low_rank_dim": config.dim_w,
        "a_low_rank_dim": config.dim_a,
        "v_low_rank_dim": config.dim_v,
        "gate_low_rank_dim": config.dim_g,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "vocab_size": config.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }


def write_hf(folder: Path, tensors: Mapping[str, pth.Array]) -> None:
    """Writes official tensors as such a folder, one tensor in memory at a time.

    Args:
        folder: must not exist; appears when it is complete.

    Raises:
        UserError: no RWKV-7 model, one that this layout cannot hold, or not writable.
    """
    tensors = weights.without_prefix(tensors)
    config = weights.infer_config(tensors)
    if config.head_size != HEAD_SIZE:
        raise UserError(
            f"heads are {config.head_size} wide: flash-linear-attention computes another group "
            f"norm than the official model unless they are {HEAD_SIZE}"
        )
    shapes = weights.official_shapes(config)
    named: dict[str, pth.Array] = {}
    unused: dict[str, pth.Array] = {}
    for name, shape in shapes.items():
        if name in tensors:
            place = unused if name in _UNUSED else named
            place[hf_name(name)] = _Turned(name, tensors[name], _hf_shape(name, shape))
    dtype = np.dtype(tensors["emb.weight"].dtype).name
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with reporting_os_errors(folder, "write"):
        if folder.exists():
            raise UserError(f"{folder}: exists already; give a new folder")
        temporary.mkdir(parents=True)
        try:
            text = json.dumps(config_json(config, dtype), indent=2)
            (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
            if config.vocab_size == VOCAB_SIZE:
                write_tokenizer(temporary)
            _write_safetensors(temporary / "model.safetensors", named)
            if unused:
                _write_safetensors(temporary / "unused.safetensors", unused)
            temporary.rename(folder)
        finally:
            if temporary.exists():
                for path in temporary.iterdir():
                    path.unlink()
                temporary.rmdir()


def _write_safetensors(path: Path, tensors: Mapping[str, pth.Array]) -> None:
    """The file format: an uint64 length, a JSON header padded to 8 bytes, the tensors end to end.

    The safetensors package writes it, too, but from memory that holds all tensors at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        dtype = np.dtype(tensor.dtype)
        if dtype not in _CODES:
            raise UserError(f"{name} is {dtype}: only float32, bfloat16 and float16 are converted")
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(np.asarray(tensor).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


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
        return self._file.get_tensor(self._name)


def read_hf(folder: Path) -> dict[str, pth.Array]:
    """Official tensors, in the official order, of such a folder (sharded ones too), read lazily.

    Raises:
        UserError: a file is missing or damaged, or it is not this model.
    """
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "rwkv7":
        raise UserError(f"{folder}: its config.json says model_type {kind!r}, not 'rwkv7'")
    shards = {"model.safetensors"}
    if not (folder / "model.safetensors").exists():
        index = _read_json(folder / "model.safetensors.index.json")
        shards = {Path(str(name)).name for name in dict(index.get("weight_map") or {}).values()}
    if (folder / "unused.safetensors").exists():
        shards.add("unused.safetensors")
    found: dict[str, _Lazy] = {}
    for shard in sorted(shards):
        found |= _open_safetensors(folder / shard)

    layers = (re.match(r"model\.layers\.(\d{1,4})\.", name) for name in found)
    n_layer = 1 + max((int(match[1]) for match in layers if match), default=-1)
    names = {hf_name(name): name for name in weights.official_dims(n_layer)}
    extra = [ascii(name) for name in found if name not in names]
    if extra:
        raise UserError(f"{folder}: has {extra[0]}, which an RWKV-7 model does not")
    tensors: dict[str, pth.Array] = {
        names[name]: _Turned(names[name], lazy, _hf_shape(names[name], lazy.shape))
        for name, lazy in found.items()
    }
    try:
        config = weights.infer_config(tensors)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    dtype = tensors["emb.weight"].dtype
    return {
        name: _Turned(name, found[hf_name(name)], shape)
        if name in tensors
        else np.zeros(shape, dtype)  # of `_UNUSED`; nothing reads them
        for name, shape in weights.official_shapes(config).items()
    }


def _read_json(path: Path) -> dict[str, Any]:
    with reporting_os_errors(path, "read"):
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is no JSON object")
    return value


def _open_safetensors(path: Path) -> dict[str, _Lazy]:
    with reporting_os_errors(path, "read"):
        try:
            file = safetensors.safe_open(path, framework="np")
            return {name: _Lazy(file, name) for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: is damaged or no safetensors file: {error}") from None
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
