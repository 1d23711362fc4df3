"""The command that shows the contents of a model, or the differences of two."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rwkv_jax.checkpoints import pth
from rwkv_jax.checkpoints.store import open_newest
from rwkv_jax.checkpoints.weights import count_not_finite, infer_config, without_state
from rwkv_jax.convert.st import is_safetensors, read_st
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import CommandParser, UserError
from rwkv_jax.text.tokenizer import other_tokenizer


def of_tensors(path: Path, use: Callable[[Mapping[str, pth.Array]], str]) -> str:
    """Calls `use` with the tensors, by official name, of a .pth, a .st, a checkpoint or a run.

    Raises:
        UserError: it cannot be read.
    """
    if path.is_dir():
        return open_newest(path, lambda _, tensors: use(tensors))
    return use(read_st(path) if is_safetensors(path) else pth.read(path))


def describe(tensors: Mapping[str, pth.Array]) -> str:
    """The architecture, the number of parameters, and a table; equal layers share a row."""
    model = without_state(tensors)
    try:
        c = infer_config(model or tensors)
        whose = other_tokenizer(c.vocab_size)
        what = (
            f"RWKV-7, {c.n_layer} layers of width {c.n_embd}, inner width {c.dim_ffn}, vocabulary "
            f"{c.vocab_size}{f' ({whose})' if whose else ''}, head size {c.head_size}, low-rank "
            f"widths w,a,v,g {c.dim_w},{c.dim_a},{c.dim_v},{c.dim_g}"
        )
        if len(model) < len(tensors):
            what += ", and a tuned initial state"
    except UserError as error:
        what = str(error)
    count = sum(math.prod(tensor.shape) for tensor in tensors.values())
    size = sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in tensors.values())
    bad = {name: count_not_finite(np.asarray(tensor)) for name, tensor in tensors.items()}
    rows = [
        (name, _shape(tensor), str(tensor.dtype), f"{bad[name]:,} not finite" if bad[name] else "")
        for name, tensor in tensors.items()
    ]
    total = sum(bad.values())
    return (
        f"{what}\n{count:,} parameters in {len(tensors)} tensors, {size / 1e6:,.1f} MB"
        + (f", {total:,} of them not finite (NaN or infinity)" if total else "")
        + "\n\n"
        + _table(("name", "shape", "dtype", ""), rows)
    )


def compare(one: Mapping[str, pth.Array], two: Mapping[str, pth.Array]) -> str:
    """A row for each tensor that differs; the largest `|one - two|` if the shapes agree."""
    rows, largest = [], 0.0
    for name in dict.fromkeys([*one, *two]):
        if name not in two or name not in one:
            rows.append((name, "only in the " + ("first" if name in one else "second")))
            continue
        a, b = one[name], two[name]
        notes = []
        if a.shape != b.shape:
            notes.append(f"shape {_shape(a)}, {_shape(b)}")
        if a.dtype != b.dtype:
            notes.append(f"dtype {a.dtype}, {b.dtype}")
        if a.shape == b.shape:
            difference = _largest_difference(np.asarray(a), np.asarray(b))
            largest = max(largest, difference, key=lambda x: (math.isnan(x), x))
            if difference != 0:
                notes.append(f"values by up to {difference:.3g}")
        if notes:
            rows.append((name, "; ".join(notes)))
    if not rows:
        return "the same names, shapes, dtypes and values"
    return (
        _table(("name", "differs in"), rows)
        + f"\n\nlargest absolute difference of values: {largest:.3g}"
    )


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """NaN if a value is NaN in one only, or is not comparable."""
    if a.dtype == b.dtype and a.tobytes() == b.tobytes():
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = a.astype(np.float64)
        difference -= b
        return float(np.abs(difference, out=difference).max(initial=0.0))


def _shape(tensor: pth.Array) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns; rows that differ only in the layer are merged: `blocks.0-11.ln1.weight`."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name, *rest in rows:
        # A name comes from a file: shown escaped, so that it cannot write to the terminal.
        shown = ascii(name)[1:-1]
        match = re.match(r"blocks\.(0|[1-9]\d{0,3})\.", shown)
        key = (f"blocks.*.{shown[match.end() :]}" if match else shown, *rest)
        groups.setdefault(key, []).extend([int(match[1])] if match else [])
    table = [head] + [
        (name.replace("*", _ranges(layers), 1) if layers else name, *rest)
        for (name, *rest), layers in groups.items()
    ]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _ranges(numbers: Sequence[int]) -> str:
    """0-2,5 for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        description="Show the contents of a model, or the differences of two models in names, "
        "shapes, dtypes and values.",
        epilog="example: %(prog)s out/rwkv-init.pth out/rwkv-final.pth",
    )
    parser.add_argument(
        "first",
        metavar="FILE",
        type=Path,
        help="A .pth or .st, a checkpoint, or the output folder of a run.",
    )
    parser.add_argument(
        "second", metavar="FILE2", type=Path, nargs="?", help="Another model to compare with."
    )
    args = parser.parse_args(argv)
    prepare_jax()
    if args.second:
        print(of_tensors(args.first, lambda one: of_tensors(args.second, partial(compare, one))))
    else:
        print(of_tensors(args.first, describe))
