"""Times opening, copying, loading and saving a 400 MiB `.pth`, compared with torch.

    python -m benchmarks.pth_io [--repeat 9] [--folder DIR] [--output PATH]

The page cache is warm and both sides run in this process, in turn, so that the ratios hold on a
busy machine too. Prints the table.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from benchmarks import command, machine
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import run_command

if TYPE_CHECKING:
    import torch

# The tensors of the 0.1b model but for a larger vocabulary, to come to 400 MiB in bf16.
CONFIG = ModelConfig(n_layer=12, n_embd=768, vocab_size=77_600)


def torch_save_durably(tensors: "dict[str, torch.Tensor]", path: Path) -> None:
    """`torch.save` with the flush to the disk that `pth.write` includes."""
    import torch

    torch.save(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def race(ours: Callable[[], object], theirs: Callable[[], object], repeat: int) -> dict[str, float]:
    """Milliseconds of each, medians of `repeat` runs taken in turn, and the median ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat + 1):
        for side, run in zip(seconds, (ours, theirs), strict=True):
            start = time.perf_counter()
            result = run()
            side.append(time.perf_counter() - start)
            del result
    a, b = (side[1:] for side in seconds)  # the first run of each warms up
    return {
        "ours_ms": round(1e3 * statistics.median(a), 2),
        "torch_ms": round(1e3 * statistics.median(b), 2),
        "ours_best_ms": round(1e3 * min(a), 2),
        "torch_best_ms": round(1e3 * min(b), 2),
        "torch_over_ours": round(statistics.median(y / x for x, y in zip(a, b, strict=True)), 2),
    }


def main() -> None:
    parser = command.record_parser(__doc__)
    parser.add_argument("--repeat", type=int, default=9, help="timed runs of each side (9)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="of the .pth files (default a temporary one)"
    )
    arguments = parser.parse_args()
    import torch

    rng = np.random.default_rng(0)
    values = {
        name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        for name, shape in weights.official_shapes(CONFIG).items()
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path, out = Path(folder) / "in.pth", Path(folder) / "out.pth"
        pth.write(path, values)
        tensors = torch.load(path, weights_only=True)
        params = weights.load_pth(path)[1]

        def torch_to_fp32() -> "dict[str, torch.Tensor]":
            mapped = torch.load(path, weights_only=True, mmap=True)
            return {name: tensor.float() for name, tensor in mapped.items()}

        fp32 = torch_to_fp32()
        races: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "open, no data": (
                lambda: pth.read(path),
                lambda: torch.load(path, weights_only=True, mmap=True),
            ),
            "copy all": (
                lambda: {name: array.copy() for name, array in pth.read(path).items()},
                lambda: torch.load(path, weights_only=True),
            ),
            "load as fp32": (lambda: weights.load_pth(path), torch_to_fp32),
            "save bf16": (
                lambda: pth.write(out, values),
                lambda: torch_save_durably(tensors, out),
            ),
            "save fp32 as bf16": (
                lambda: weights.save_pth(out, params),
                lambda: torch_save_durably({n: t.bfloat16() for n, t in fp32.items()}, out),
            ),
        }
        rows = {
            name: race(*sides, arguments.repeat * (3 if name.startswith("open") else 1))
            for name, sides in races.items()
        }
        result = machine.record("pth_io") | {
            "file_MiB": round(path.stat().st_size / 2**20, 1),
            "tensors": len(values),
            "rows": rows,
        }
    if arguments.output:
        machine.write(arguments.output, result)
    print(f"{result['file_MiB']} MiB, {len(values)} tensors")
    print(f"{'':20}{'ours ms':>10}{'torch ms':>10}{'torch/ours':>12}")
    for name, row in rows.items():
        ours, theirs, ratio = row["ours_ms"], row["torch_ms"], row["torch_over_ours"]
        print(f"{name:20}{ours:10.1f}{theirs:10.1f}{ratio:12.2f}")


if __name__ == "__main__":
    run_command(main)
