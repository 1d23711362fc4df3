"""Official tensor names ↔ our parameter tree: `load_pth`, `save_pth` and their parts.

A tree is a nested dict whose paths are the official names. The `[out, in]` orientation is kept, the
blocks' tensors are stacked on a leading layer axis, and vectors are flat: `blocks.3.att.x_r` of
shape [1, 1, C] is row 3 of `tree["blocks"]["att"]["x_r"]` of shape [L, C]. Conversion is therefore
renaming and stacking, and exact. `blocks.0.ln0`, which only the first block has, is `tree["ln0"]`.

Importing is liberal about form (a `_forward_module.` prefix, flat vectors, any key order) and
strict about content: a file with a tensor that RWKV-7 does not have, or with a non-finite value, is
refused. Exporting writes exactly what the official trainer would.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from rwkv_jax.checkpoints import pth
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError

Params = dict[str, Any]  # nested; leaves are arrays

# Name → dimensions, in the order in which the official modules register them; readers depend on
# it (rwkv.cpp reads att.x_* in file order). w, a, v, g are the low-rank widths, F the inner width.
_BEFORE = {"emb.weight": "VC"}
_BLOCK = {
    "ln1.weight": "C",
    "ln1.bias": "C",
    "ln2.weight": "C",
    "ln2.bias": "C",
    "ln0.weight": "C",  # in block 0 only
    "ln0.bias": "C",
    "att.x_r": "11C",
    "att.x_w": "11C",
    "att.x_k": "11C",
    "att.x_v": "11C",
    "att.x_a": "11C",
    "att.x_g": "11C",
    "att.w1": "Cw",
    "att.w2": "wC",
    "att.w0": "11C",
    "att.a1": "Ca",
    "att.a2": "aC",
    "att.a0": "11C",
    "att.v1": "Cv",
    "att.v2": "vC",
    "att.v0": "11C",
    "att.g1": "Cg",
    "att.g2": "gC",
    "att.k_k": "11C",
    "att.k_a": "11C",
    "att.r_k": "HN",
    "att.receptance.weight": "CC",
    "att.key.weight": "CC",
    "att.value.weight": "CC",
    "att.output.weight": "CC",
    "att.ln_x.weight": "C",
    "att.ln_x.bias": "C",
    "ffn.x_k": "11C",
    "ffn.key.weight": "FC",
    "ffn.value.weight": "CF",
}
_AFTER = {"ln_out.weight": "C", "ln_out.bias": "C", "head.weight": "VC"}

# Unused in the first block, whose value is v_first itself; many files omit them.
_OPTIONAL = frozenset(f"blocks.0.att.{name}" for name in ("v0", "v1", "v2"))
_PREFIX = "_forward_module."  # DeepSpeed's wrapper
_LISTED = 6  # names in one message
_PIECE = 1 << 16  # values checked at a time; fits the CPU cache


def load_pth(
    path: str | os.PathLike[str], expect: ModelConfig | None = None, dtype: Any = np.float32
) -> tuple[ModelConfig, Params]:
    """Loads the model in an official `.pth`: its configuration, inferred from the shapes, and tree.

    Args:
      path: as for `pth.read`.
      expect: refuse a model with any other configuration, and list the differences.
      dtype: of the returned arrays.

    Returns:
      The configuration and the tree of NumPy arrays (see `from_official`).

    Raises:
      UserError: the file cannot be used (see `pth.read`) or is not such a model.
    """
    return from_official(pth.read(path), expect, dtype, str(path))


def open_pth(path: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, pth.Array]]:
    """Opens the model in an official `.pth` as `validate_model` returns it, as views of the file.

    Raises:
      UserError: as `load_pth`.
    """
    return validate_model(pth.read(path), source=str(path))


def load_tuned_pth(
    path: str | os.PathLike[str], dtype: Any = np.float32
) -> tuple[ModelConfig, Params, np.ndarray | None]:
    """As `load_pth`, and also loads a tuned initial state if the file has one.

    Raises:
      UserError: as `load_pth` and `tuned_state`.
    """
    tensors = pth.read(path)
    model = without_state(tensors)
    config, params = from_official(model, None, dtype, str(path))
    if len(model) == len(tensors):
        return config, params, None
    return config, params, tuned_state(tensors, config, str(path))


def without_state(tensors: Mapping[str, pth.Array]) -> dict[str, pth.Array]:
    """The tensors without those of a tuned initial state (see `tuned_state`)."""
    return {name: tensor for name, tensor in tensors.items() if not _STATE.search(name)}


def tuned_state(tensors: Mapping[str, pth.Array], config: ModelConfig, source: str) -> np.ndarray:
    """The tuned initial state: `att.time_state` of each layer.

    Returns:
      [L, H, N, N] float32, value row and key column as in `model.rwkv7.State.wkv`. RWKV-7 tuners
      store this layout (RWKV-PEFT transposes it for fla's kernel; RWKV Runner passes it unchanged
      to the rwkv package). RWKV-5 and 6 tuners store the transpose.

    Args:
      source: prefix of error messages.

    Raises:
      UserError: a layer has no state, or the state is not of this model, or not finite.
    """
    found = {name: t for name, t in without_prefix(tensors).items() if _STATE.search(name)}
    shape = (config.n_head, config.head_size, config.head_size)
    expected = {f"blocks.{layer}.att.time_state": shape for layer in range(config.n_layer)}
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:
        example = "".join(f", {name} {list(t.shape)}" for name, t in [*found.items()][:1])
        raise UserError(
            f"{source}: is not a tuned state of this model, which has blocks.N.att.time_state "
            f"{list(shape)} for each of {config.n_layer} layers: there are {len(found)}{example}"
        )
    tensors = with_finite_check(found, source)
    return np.stack([np.asarray(tensors[name], np.float32) for name in expected])


def save_pth(path: str | os.PathLike[str], params: Params, dtype: Any = ml_dtypes.bfloat16) -> None:
    """Writes the tree as an official `.pth` (bf16 by default), atomically, one tensor at a time.

    fp32 is rounded to nearest even. The same tree gives the same bytes.

    Raises:
      UserError: the file cannot be written.
    """
    pth.write(path, to_official(params), dtype)


def official_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of an official file, in the official order."""
    sizes = {
        "1": 1,
        "C": config.n_embd,
        "V": config.vocab_size,
        "H": config.n_head,
        "N": config.head_size,
        "F": config.dim_ffn,
        "w": config.dim_w,
        "a": config.dim_a,
        "v": config.dim_v,
        "g": config.dim_g,
    }
    return {
        name: tuple(sizes[letter] for letter in dims)
        for name, dims in official_dims(config.n_layer).items()
    }


def official_dims(n_layer: int) -> dict[str, str]:
    """Name → dimensions, one letter each (see `official_shapes`), in the official order."""
    blocks = {
        f"blocks.{layer}.{name}": dims
        for layer in range(n_layer)
        for name, dims in _BLOCK.items()
        if layer == 0 or not name.startswith("ln0.")
    }
    return {**_BEFORE, **blocks, **_AFTER}


def infer_config(tensors: Mapping[str, pth.Array]) -> ModelConfig:
    """Infers the configuration of a model from its official names and shapes.

    Layers are counted; width and vocabulary come from `emb.weight`, head size from `att.r_k`
    [H, N], and the low-rank widths and the channel mix's width from the first tensor with them.

    Raises:
      UserError: not an RWKV-7 model (the message names the kind of model it looks like), or tensors
        are missing or have the wrong shape.
    """
    tensors = without_prefix(tensors)
    n_layer = _count_layers(tensors)
    sizes = _sizes(tensors, n_layer)
    V, C, H, N = (sizes.get(letter, 0) for letter in "VCHN")
    if min(V, C, H, N) < 1 or C != H * N:
        raise UserError(
            f"is not an RWKV-7 model: emb.weight [V, C] and att.r_k [H, N] give {V=}, {C=}, "
            f"{H=}, {N=}; they have to be 1 or more, with C = H·N"
        )
    config = ModelConfig(
        n_layer=n_layer,
        n_embd=C,
        vocab_size=V,
        head_size=N,
        dim_ffn=sizes.get("F", 0),
        dim_w=sizes.get("w", 0),
        dim_a=sizes.get("a", 0),
        dim_v=sizes.get("v", 0),
        dim_g=sizes.get("g", 0),
    )
    differences = _differences(tensors, config)
    if differences:
        raise UserError(f"is not an RWKV-7 model of {_brief(config)}: {differences}")
    return config


def infer_partial(
    tensors: Mapping[str, pth.Array], otherwise: ModelConfig, n_layer: int = 0
) -> ModelConfig:
    """Infers the configuration from a subset of a model's tensors.

    Args:
      otherwise: the sizes that no tensor shows.
      n_layer: number of layers; 0: inferred from the tensors.

    Raises:
      UserError: the tensors are not those of an RWKV-7 model.
    """
    count = _count_layers(tensors)
    sizes = _sizes(tensors, count)
    fields = {"C": "n_embd", "V": "vocab_size", "N": "head_size", "F": "dim_ffn"}
    fields |= {letter: f"dim_{letter}" for letter in "wavg"}
    known = {field: sizes[letter] for letter, field in fields.items() if letter in sizes}
    if sizes.get("C", otherwise.n_embd) != otherwise.n_embd:  # the defaults of another width
        otherwise = ModelConfig(count, sizes["C"], head_size=sizes.get("N", otherwise.head_size))
    return dataclasses.replace(otherwise, n_layer=n_layer or count, **known)


def _count_layers(tensors: Mapping[str, pth.Array]) -> int:
    _check_architecture(tensors)
    layers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    n_layer = max(layers) + 1
    if len(layers) != n_layer:
        raise UserError(f"has blocks up to {n_layer - 1}, but only {len(layers)} of them")
    known = official_dims(n_layer)
    if extra := [name for name in tensors if name not in known]:
        raise UserError(
            f"has tensors that RWKV-7 does not have: {_list(extra)}; it is another model"
        )
    return n_layer


def _sizes(tensors: Mapping[str, pth.Array], n_layer: int) -> dict[str, int]:
    """Letter → size, from the first tensor with that dimension."""
    sizes: dict[str, int] = {}
    for name, dims in official_dims(n_layer).items():
        shape = tensors[name].shape if name in tensors else ()
        if len(shape) == len(dims):
            for letter, size in zip(dims, shape, strict=True):
                sizes.setdefault(letter, size)
    return sizes


def from_official(
    tensors: Mapping[str, pth.Array],
    expect: ModelConfig | None = None,
    dtype: Any = np.float32,
    source: str = "",
) -> tuple[ModelConfig, Params]:
    """Converts official tensors to the configuration and the tree (see `validate_model`).

    Each leaf is allocated once and filled, so peak memory is that of the tree.

    Args:
      tensors: by official name; values are read when they are used.
      expect: refuse any other configuration, and list the differences.
      dtype: of the tree.
      source: prefix of error messages.

    Raises:
      UserError: as `validate_model`; or a value is not finite, or beyond the range of float16.
    """
    config, tensors = validate_model(tensors, expect, source)
    params: Params = {}
    targets: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        (*parents, last), layer = parameter_path(name)
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        shape = tree_shape(tensor.shape)
        if last not in node:
            node[last] = np.empty(shape if layer is None else (config.n_layer, *shape), dtype)
        targets[name] = node[last][... if layer is None else layer]

    def fill(name: str) -> None:
        target = targets[name]
        with _in_range(_with_source(source, name), target.dtype):
            target[...] = np.asarray(tensors[name]).reshape(target.shape)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # overlaps reading and converting
        for _ in pool.map(fill, targets):
            pass
    return config, params


def validate_model(
    tensors: Mapping[str, pth.Array], expect: ModelConfig | None = None, source: str = ""
) -> tuple[ModelConfig, dict[str, pth.Array]]:
    """Validates a model: returns its configuration and all its tensors, in the official order.

    `v0`, `v1`, `v2` of block 0 become zeros if they are absent. Nothing reads them there, no
    gradient reaches them and no decay applies, so they stay zero, and an export (for which the
    official trainer requires them) is the same each time, in every dtype.

    Args:
      tensors: by official name; flat vectors and a `_forward_module.` prefix are accepted, too.
      expect: refuse any other configuration, and list the differences.
      source: the file of the tensors, a prefix of error messages.

    Raises:
      UserError: see `infer_config`; or a tensor is not floating point. When a tensor is used: its
        values are not all finite.
    """
    try:
        tensors = without_prefix(tensors)
        if expect is not None:
            _check_architecture(tensors)
            differences = _differences(tensors, expect)
            if differences:
                raise UserError(
                    f"does not match the requested model, {_brief(expect)}: {differences}"
                )
        config = infer_config(tensors)
        shapes = official_shapes(config)
        for name in shapes:
            if name in tensors and tensors[name].dtype not in _FLOATS:
                raise UserError(
                    f"{name} is {tensors[name].dtype}, not floating point: is it quantised?"
                )
    except UserError as error:
        raise UserError(_with_source(source, str(error))) from None
    found = {
        name: tensors[name] if name in tensors else np.zeros(shape, np.float32)
        for name, shape in shapes.items()
    }
    return config, with_finite_check(found, source, shapes)


def with_finite_check(
    tensors: Mapping[str, pth.Array],
    source: str = "",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, pth.Array]:
    """The same tensors, which raise a `UserError` when non-finite values are read.

    Args:
      source: the file of the tensors, a prefix of error messages.
      shapes: new shapes by name; None: the tensors' own.
    """
    return {
        name: _Checked(
            tensor, shapes[name] if shapes else tuple(tensor.shape), _with_source(source, name)
        )
        for name, tensor in tensors.items()
    }


@dataclasses.dataclass(frozen=True, slots=True)
class _Checked:
    tensor: pth.Array
    shape: tuple[int, ...]
    name: str

    @property
    def dtype(self) -> Any:
        return self.tensor.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with _in_range(self.name, dtype):
            values = np.asarray(self.tensor, dtype)
        if count := count_not_finite(values):
            raise UserError(
                f"{self.name}: {count:,} of {values.size:,} values are not finite (NaN or "
                "infinity), so the model cannot be used: use an earlier file, or download it "
                "again"
            )
        return values.reshape(self.shape)


@contextlib.contextmanager
def _in_range(name: str, dtype: Any) -> Iterator[None]:
    try:
        with np.errstate(over="raise"):
            yield
    except FloatingPointError:
        raise UserError(
            f"{name}: has values beyond the range of {np.dtype(dtype)}; use bfloat16 or float32"
        ) from None


def count_not_finite(values: np.ndarray) -> int:
    """Counts the values that are NaN or infinite; 0 for a dtype that is not floating point.

    Without its sign, a float is finite if its bits are less than those of infinity. This runs at
    memory bandwidth; `np.isfinite` of bfloat16 or float16 takes eight times as long.
    """
    if values.dtype not in _FLOATS:
        return 0
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(unsigned)[()]
    bits, magnitude = values.reshape(-1).view(unsigned), np.array(-1).astype(unsigned) >> 1
    pieces = (bits[at : at + _PIECE] & magnitude for at in range(0, bits.size, _PIECE))
    return sum(
        int(np.count_nonzero(piece >= infinity)) for piece in pieces if piece.max() >= infinity
    )


def _with_source(source: str, message: str) -> str:
    return f"{source}: {message}" if source else message


def to_official(params: Params) -> dict[str, pth.Array]:
    """Views a tree (NumPy or JAX arrays) with official names, order and shapes; values are lazy.

    Raises:
      UserError: the tree is not that of an RWKV-7 model.
    """
    n_layer = params["blocks"]["ln1"]["weight"].shape[0]
    tensors: dict[str, pth.Array] = {}
    for name, dims in official_dims(n_layer).items():
        path, layer = parameter_path(name)
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        tensors[name] = _Official(leaf, layer, (1, 1) if dims.startswith("11") else ())
    infer_config(tensors)
    return tensors


@dataclasses.dataclass(frozen=True, slots=True)
class _Official:
    """A leaf, or one layer of it, in its official shape; copied only by `np.asarray`."""

    leaf: Any
    layer: int | None
    front: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.front + tuple(self.leaf.shape[0 if self.layer is None else 1 :])

    @property
    def dtype(self) -> Any:
        return self.leaf.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        row = self.leaf if self.layer is None else self.leaf[self.layer]
        return np.asarray(row, dtype).reshape(self.shape)


_LAYER = re.compile(r"blocks\.(\d{1,4})\.")
_STATE = re.compile(r"blocks\.\d+\.att\.time_state$")
_FLOATS = (np.float32, ml_dtypes.bfloat16, np.float16, np.float64)


def parameter_path(name: str) -> tuple[tuple[str, ...], int | None]:
    """The path of an official tensor in the tree, and its row if the leaf is stacked."""
    match = _LAYER.match(name)
    rest = name[match.end() :] if match else name
    if match is None or rest.startswith("ln0."):
        return tuple(rest.split(".")), None
    return ("blocks", *rest.split(".")), int(match[1])


def tree_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the tree for an official shape: vectors lose their two leading ones."""
    return shape[2:] if len(shape) == 3 and shape[:2] == (1, 1) else shape


def without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Names as the official trainer writes them, without DeepSpeed's prefix."""
    plain = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    if len(plain) != len(tensors):
        raise UserError(f"has the same tensors with and without the prefix {_PREFIX}")
    return plain


def _differences(tensors: Mapping[str, pth.Array], config: ModelConfig) -> str:
    """The differences from such a model, for an error message; empty if there are none."""
    shapes = official_shapes(config)
    missing = [name for name in shapes if name not in tensors and name not in _OPTIONAL]
    too_many = [
        name
        for name in tensors
        if (match := _LAYER.match(name)) and int(match[1]) >= config.n_layer
    ]
    other = [
        f"{name} is {list(tensors[name].shape)} and should be {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tree_shape(tuple(tensors[name].shape)) != tree_shape(shape)
    ]
    parts = [
        f"missing {_list(missing)}" if missing else "",
        f"too many layers {_list(too_many)}" if too_many else "",
        _list(other),
    ]
    return "; ".join(part for part in parts if part)


def _list(items: list[str], most: int = _LISTED) -> str:
    """The first few items, escaped and shortened, and the number of the others."""
    shown = [ascii(item)[1:-1] for item in items[:most]]
    shown = [item if len(item) <= 120 else item[:117] + "..." for item in shown]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(shown) + more


def _brief(config: ModelConfig) -> str:
    return (
        f"{config.n_layer} layers, width {config.n_embd}, vocabulary {config.vocab_size}, "
        f"head size {config.head_size}"
    )


# A pattern for a tensor's name → the kind of file. The first match is reported.
_KINDS = {
    r"lora_[AB]|\.lora\.[01]$": "an unmerged LoRA (alone or with a model)",
    r"^blocks\.\d+\.ffn\.enn\.": "RWKV-8",
    r"^blocks\.\d+\.qkv\.": "RWKV-7b (with DeepEmbed and DEA)",
    r"\.ffn\.s_emb": "RWKV-7a (with DeepEmbed)",
    r"\.att\.r_k$": "",  # RWKV-7
    r"\.att\.time_maa": "RWKV-6",
    r"\.att\.time_faaaa": "RWKV-5.2",
    r"\.att\.ln_x\.": "RWKV-5",
    r"\.att\.time_decay": "RWKV-4",
    r"\.att\.time_state$": "a tuned initial state",
    r"model\.layers\.0\.attn\.r_proj": "a Hugging Face model",
    r"model\.layers\.0\.self_attn\.": "a transformer of Hugging Face (llama or similar)",
    r"layers\.0\.attention\.wq": "a llama",
    r"transformer\.h\.0\.": "a GPT-2",
}
_FIXES = {
    "an unmerged LoRA (alone or with a model)": "merge it into its model first",
    "a tuned initial state": "give it to python -m rwkv_jax.generate as --load_state",
    "a Hugging Face model": "convert its folder with rwkv-jax hf-to-pth",
}


def _check_architecture(tensors: Mapping[str, Any]) -> None:
    other = ("", "something else")
    kinds = (item for item in _KINDS.items() if any(re.search(item[0], name) for name in tensors))
    pattern, kind = next(kinds, other)
    if not kind and not any(_LAYER.match(name) for name in tensors):
        pattern, kind = other
    if kind:
        marks = _list([name for name in tensors if re.search(pattern, name)], 3)
        fix = f"; {_FIXES[kind]}" if kind in _FIXES else ""
        raise UserError(f"is {kind}, not RWKV-7: it has {marks or 'no tensors'}{fix}")
    if states := [name for name in tensors if _STATE.search(name)]:
        raise UserError(
            f"has a tuned initial state in addition to the model, {_list(states)}: only "
            "python -m rwkv_jax.generate uses it; give the model that it was tuned on"
        )
