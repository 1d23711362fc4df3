"""The command that checks which programs can load a model, and why others cannot.

Every reader loads official files but has its own requirements: the container, the order of the
tensors, a shape. These are known from reading and running the programs.
"""

import pickletools
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rwkv_jax.checkpoints import pth
from rwkv_jax.checkpoints.weights import official_shapes, validate_model, without_prefix
from rwkv_jax.config import ModelConfig, default_low_rank
from rwkv_jax.convert.st import is_safetensors, read_st
from rwkv_jax.errors import CommandParser, UserError
from rwkv_jax.text.tokenizer import VOCAB_SIZE

MIXES = "rwkvag"  # att.x_*, in the order that rwkv.cpp's converter assumes


class Model(NamedTuple):
    """A model file, as the checks see it."""

    path: Path
    tensors: Mapping[str, pth.Array]  # as named in the file, in its order
    config: ModelConfig


def rwkv_package(model: Model) -> str:
    """The `rwkv` pip package: maps the zip, so it needs uncompressed records and plain names."""
    if model.path.suffix != ".pth":
        return "its name must end in .pth, which the package appends"
    if not zipfile.is_zipfile(model.path):
        return "it is in the old container; the package maps a zip"
    with zipfile.ZipFile(model.path) as file:
        if any(record.compress_type != zipfile.ZIP_STORED for record in file.infolist()):
            return "its records are compressed; the package maps them"
        names = file.namelist()
        if not any(name.endswith("/version") for name in names):
            return "it has no version record"
        pickled = file.read(next(name for name in names if name.endswith("/data.pkl")))
    keys = {argument for _, argument, _ in pickletools.genops(pickled) if type(argument) is str}
    nested = keys & {"state_dict", "module", "model"}
    if nested:
        return f"its tensors are nested under {min(nested)!r}"
    if without_prefix(model.tensors).keys() != model.tensors.keys():
        return "its names begin with _forward_module."
    if len(model.tensors["blocks.0.att.r_k"].shape) != 2:
        return "blocks.0.att.r_k is not [H, N], which gives the head size"
    return ""


def rwkv_runner(model: Model) -> str:
    """RWKV Runner: identifies a model by the order of its tensors, and uses the package."""
    seen_ln_x = False
    for name in model.tensors:
        if ".att.r_k" in name and seen_ln_x:
            break
        seen_ln_x |= ".att.ln_x." in name
    else:
        return "no att.r_k after an att.ln_x: it needs the official order and 2 layers"
    if model.config.vocab_size != VOCAB_SIZE:
        return (
            f"{model.config.vocab_size} rows of emb.weight; the World tokenizer needs {VOCAB_SIZE}"
        )
    return rwkv_package(model)


def rwkv_cpp(model: Model) -> str:
    """rwkv.cpp's converter: concatenates att.x_* in file order, and keeps shapes."""
    for layer in range(model.config.n_layer):
        mark = f"blocks.{layer}.att.x_"
        order = "".join(name.rpartition("_")[2] for name in model.tensors if mark in name)
        if order != MIXES:
            return f"att.x_* are in the order {','.join(order)}; it assumes {','.join(MIXES)}"
    flat = _other_shape(model, lambda name: ".x_" in name or name.endswith(("_k", "_a")))
    return flat and f"{flat}: it would be a different tensor"


def web_rwkv(model: Model) -> str:
    """web-rwkv and Ai00: load a float16 .st, and identify version 7 by layer 1."""
    if is_safetensors(model.path):
        others = (name for name, tensor in model.tensors.items() if tensor.dtype != np.float16)
        if other := next(others, ""):
            return f"{other} is {model.tensors[other].dtype}; it loads only float16"
    if "blocks.1.att.v1" in model.tensors:
        return ""
    return "no blocks.1.att.v1, which identifies version 7: it needs 2 layers and plain names"


def official_trainer(model: Model) -> str:
    """The official trainer: loads strictly, into a model with the widths of its own formula."""
    names = official_shapes(model.config)
    missing = [name for name in names if name not in model.tensors]
    if missing:
        return f"{missing[0]} is missing; it loads strictly"
    other = _other_shape(model, lambda name: True)
    if other:
        return f"{other}; it loads strictly"
    formula = default_low_rank(model.config.n_embd)
    widths = {name: getattr(model.config, name) for name in formula}
    if widths != formula:
        given, own = (",".join(map(str, sizes.values())) for sizes in (widths, formula))
        return (
            f"its source needs to be edited to the low-rank widths w,a,v,g {given} instead of {own}"
        )
    return ""


def _other_shape(model: Model, chosen: Callable[[str], bool]) -> str:
    for name, shape in official_shapes(model.config).items():
        there = model.tensors.get(name)
        if there is not None and chosen(name) and tuple(there.shape) != shape:
            return f"{name} is {list(there.shape)}, not {list(shape)}"
    return ""


READERS: dict[str, Callable[[Model], str]] = {
    "rwkv package": rwkv_package,
    "RWKV Runner": rwkv_runner,
    "rwkv.cpp": rwkv_cpp,
    "web-rwkv, Ai00": web_rwkv,
    "official trainer": official_trainer,
}


def verify(path: Path) -> dict[str, str]:
    """Reader → why it cannot load the file; empty if it can.

    Raises:
        UserError: the file is not a usable RWKV-7 model.
    """
    is_st = is_safetensors(path)
    tensors = read_st(path) if is_st else pth.read(path)
    config, checked = validate_model(tensors, source=str(path))
    for tensor in checked.values():
        np.asarray(tensor)
    model = Model(path, tensors, config)
    return {
        reader: check(model) for reader, check in READERS.items() if check is web_rwkv or not is_st
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Check whether a .pth is ready for each program that reads RWKV-7 models: "
        + ", ".join(READERS)
        + "; or a .st, for those that load one. The exit status is 0 if it is ready for all of "
        "them. To make a file ready: rwkv-jax pth-to-orbax, then rwkv-jax orbax-to-pth.",
        epilog="example: %(prog)s out/rwkv-final.pth",
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="The .pth or .st of an RWKV-7 (x070) model."
    )
    args = parser.parse_args(argv)
    reasons = verify(args.file)
    for reader, reason in reasons.items():
        print(f"{reader:16}  {f'no: {reason}' if reason else 'yes'}")
    refusing = [reader for reader, reason in reasons.items() if reason]
    if refusing:
        raise UserError(f"{args.file}: not ready for {', '.join(refusing)}")
