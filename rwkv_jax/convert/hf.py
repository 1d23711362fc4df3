"""The Hugging Face layout of RWKV-7: that of flash-linear-attention's `RWKV7ForCausalLM`.

A folder with `config.json` and `model.safetensors`, and the World tokenizer if the model uses it.
Tensors are renamed; the low-rank matrices are transposed, because they are linear layers there, and
vectors are flat except attn.x_*. That model has no v0, v1, v2 in layer 0, because nothing reads
them. If a .pth has them, they are kept in `unused.safetensors`, so that converting back gives the
same bytes.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.convert.hf_tokenizer import write_tokenizer
from rwkv_jax.convert.st import Turned, is_turned, open_safetensors, write_safetensors
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors
from rwkv_jax.text.tokenizer import VOCAB_SIZE

HEAD_SIZE = 64  # flash-linear-attention's group norm has eps N·1e-5, which is right only for this N

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


def _hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if is_turned(name):
        return shape[::-1]
    return shape[2:] if len(shape) == 3 and ".att.x_" not in name else shape


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The settings that `RWKV7Config` needs to build the model; the others keep their defaults."""
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


def write_hf(folder: Path, tensors: Mapping[str, pth.Array], source: str) -> None:
    """Writes official tensors as such a folder, one tensor in memory at a time.

    Args:
        folder: must not exist; it appears when it is complete.
        source: the file with the tensors, for error messages.

    Raises:
        UserError: not an RWKV-7 model, one that this layout cannot hold, or not writable.
    """
    there = weights.without_prefix(tensors)
    config, tensors = weights.validate_model(there, source=source)
    if config.head_size != HEAD_SIZE:
        raise UserError(
            f"{source}: heads are {config.head_size} wide: flash-linear-attention's group norm "
            f"equals the official one only for {HEAD_SIZE}"
        )
    named: dict[str, pth.Array] = {}
    unused: dict[str, pth.Array] = {}
    for name, tensor in tensors.items():
        if name in there:
            place = unused if name in _UNUSED else named
            place[hf_name(name)] = Turned(name, tensor, _hf_shape(name, tensor.shape))
    dtype = np.dtype(tensors["emb.weight"].dtype).name
    with reporting_os_errors(folder, "write"):
        if folder.exists():
            raise UserError(f"{folder}: exists already; give a new folder")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            text = json.dumps(config_json(config, dtype), indent=2)
            (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
            if config.vocab_size == VOCAB_SIZE:
                write_tokenizer(temporary)
            write_safetensors(temporary / "model.safetensors", named)
            if unused:
                write_safetensors(temporary / "unused.safetensors", unused)
            temporary.rename(folder)
        finally:
            if temporary.exists():
                for path in temporary.iterdir():
                    path.unlink()
                temporary.rmdir()


def read_hf(folder: Path) -> dict[str, pth.Array]:
    """Reads such a folder, also a sharded one, lazily: official tensors in the official order.

    Also reads `pytorch_model.bin`, and the six `attn.x_*` in one `attn.x_x`, as in folders of that
    library's first version.

    Raises:
        UserError: a file is missing or damaged, or the folder holds another model.
    """
    kind = _read_json(folder / "config.json").get("model_type")
    if kind != "rwkv7":
        raise UserError(f"{folder}: its config.json says model_type {kind!r}, not 'rwkv7'")
    shards = {"model.safetensors"}
    if not (folder / "model.safetensors").exists():
        shards = _shards(folder)
    if (folder / "unused.safetensors").exists():
        shards.add("unused.safetensors")
    found: dict[str, pth.Array] = {}
    for shard in sorted(shards):
        is_pth = shard.endswith(".bin")
        found |= pth.read(folder / shard) if is_pth else open_safetensors(folder / shard)
    for name in [name for name in found if name.endswith(".attn.x_x")]:
        packed = found.pop(name)
        found |= {f"{name[:-1]}{mix}": _Mix(packed, row) for row, mix in enumerate("rwkvag")}

    layers = (re.match(r"model\.layers\.(\d{1,4})\.", name) for name in found)
    n_layer = 1 + max((int(match[1]) for match in layers if match), default=-1)
    names = {hf_name(name): name for name in weights.official_dims(n_layer)}
    extra = [ascii(name) for name in found if name not in names]
    if extra:
        raise UserError(f"{folder}: has {extra[0]}, which an RWKV-7 model does not have")
    tensors: dict[str, pth.Array] = {
        names[name]: Turned(names[name], lazy, _hf_shape(names[name], lazy.shape))
        for name, lazy in found.items()
    }
    _, model = weights.validate_model(tensors, source=str(folder))
    unused = {  # nothing reads them
        name: np.zeros(model[name].shape, model["emb.weight"].dtype)
        for name in _UNUSED
        if name not in tensors
    }
    return model | unused


def _shards(folder: Path) -> set[str]:
    """The files with the weights, if there is no model.safetensors."""
    if (folder / "pytorch_model.bin").exists():
        return {"pytorch_model.bin"}
    index = folder / "pytorch_model.bin.index.json"
    if not index.exists():
        index = folder / "model.safetensors.index.json"
    names = dict(_read_json(index).get("weight_map") or {}).values()
    return {Path(str(name)).name for name in names}


class _Mix:
    """One of the six rows of a packed attn.x_x, as a tensor of its own."""

    def __init__(self, packed: pth.Array, row: int):
        self.shape, self.dtype = (1, 1, math.prod(packed.shape) // 6), packed.dtype
        self._packed, self._row = packed, row

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._packed, dtype).reshape(6, *self.shape)[self._row]


def _read_json(path: Path) -> dict[str, Any]:
    with reporting_os_errors(path, "read"):
        try:
            value = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a JSON object")
    return value
