"""A run on a disk that fills up during a save, and is freed again.

    python -m tests.support.full_disk

Needs the right to mount (root): the run's folder is a tmpfs of 12 MB, of which all but 1.5 MB are
taken for a while; a checkpoint takes 3 MB. The check for free space is switched off, so that the
writing itself fails.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from rwkv_jax import train
from rwkv_jax.checkpoints import store
from rwkv_jax.checkpoints.store import Checkpoints
from rwkv_jax.config import TrainConfig
from rwkv_jax.text.binidx import BinIdxWriter
from rwkv_jax.tracking import progress

STEPS = 60


def run(data: Path, folder: Path, ballast: Path) -> None:
    def show(self, step: int, *values: float) -> float:
        if 12 <= step < 40:  # after a checkpoint that is good
            surplus = shutil.disk_usage(folder).free - 1_500_000
            with ballast.open("ab") as file:
                file.write(bytes(max(surplus, 0)))
        if step == 40:
            checkpoints = Checkpoints(folder / "checkpoints")
            print(f"  full: the checkpoints are {checkpoints.steps()}")
            for saved in checkpoints.steps():
                checkpoints.verify(saved)  # compares every byte
            ballast.unlink()
        return shown(self, step, *values)

    shown, check = progress.ProgressLine.show, store._check_space
    progress.ProgressLine.show = show
    store._check_space = lambda folder, tree: folder.mkdir(exist_ok=True)
    try:
        train.train(
            TrainConfig(
                n_layer=2,
                n_embd=64,
                vocab_size=512,
                ctx_len=16,
                my_exit_tokens=STEPS * 16,
                data_file=str(data),
                proj_dir=str(folder),
                save_every_steps=5,
                keep_last=1,
                accelerator="cpu",
                devices=1,
            )
        )
    finally:
        progress.ProgressLine.show, store._check_space = shown, check
    checkpoints = Checkpoints(folder / "checkpoints")
    assert checkpoints.steps() == [STEPS] and (folder / "rwkv-final.pth").exists()
    checkpoints.verify(STEPS)
    print(f"  over: the checkpoint is {checkpoints.steps()}, and good")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        data, disk = Path(name) / "data", Path(name) / "disk"
        with BinIdxWriter(data) as writer:
            writer.append(np.arange(2000) ** 2 % 61 + 1, [2000])
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], check=True)
        try:
            run(data, disk / "out", disk / "ballast")
        finally:
            subprocess.run(["umount", disk], check=True)


if __name__ == "__main__":
    sys.exit(main())
