"""Measures whether memory grows during a long run.

    python -m benchmarks.long_run [--steps 2000] [--output PATH]

A tiny run in this process, with a checkpoint every 50 steps; the memory that it holds (VmRSS) every
tenth of it.
"""

import re
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import command, machine
from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import run_command
from rwkv_jax.text.binidx import BinIdxWriter
from rwkv_jax.tracking import progress
from rwkv_jax.train import train


def resident() -> float:
    """MB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1000


def main() -> None:
    parser = command.record_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="default 2000")
    options = parser.parse_args()
    sizes: list[float] = []
    show = progress.ProgressLine.show

    def watch(self, step: int, *values: float) -> float:
        if (step + 1) % (options.steps // 10) == 0:
            sizes.append(resident())
        return show(self, step, *values)

    progress.ProgressLine.show = watch
    with tempfile.TemporaryDirectory() as name:
        with BinIdxWriter(Path(name) / "data") as writer:
            writer.append(np.arange(20_000) ** 2 % 61 + 1, [20_000])
        train(
            TrainConfig(
                n_layer=2,
                n_embd=64,
                vocab_size=512,
                ctx_len=16,
                micro_bsz=2,
                my_exit_tokens=options.steps * 32,
                data_file=str(Path(name) / "data"),
                proj_dir=str(Path(name) / "out"),
                save_every_steps=50,
                accelerator="cpu",
                devices=1,
            )
        )
    print("MB at each tenth:", ", ".join(f"{size:.0f}" for size in sizes))
    print(f"from the first to the last: {sizes[-1] - sizes[0]:+.1f} MB")
    if options.output:
        record = machine.record("long_run") | {"steps": options.steps, "resident_mb": sizes}
        machine.write(options.output, record)


if __name__ == "__main__":
    run_command(main)
