"""Kills `python -m rwkv_jax.train` at random moments until one tiny run is over, and compares.

    python -m tests.support.kills --kills 30 --signal KILL      (or TERM)

Another run of the same options is left alone. Both have to end with the same rwkv-final.pth and
rwkv-{n}.pth, byte for byte, the same train_log.txt but for the times of day, and every step in
step_log.tsv, where the last line of a step counts. `test_kills.py` does it with three kills.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rwkv_jax.text.binidx import BinIdxWriter
from rwkv_jax.tracking.step_log import read_step_log

V, T, BATCH = 64, 2, 8064  # five steps a miniepoch
MINIEPOCH_STEPS = 40320 // BATCH
ENVIRONMENT = {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_NUM_CPU_DEVICES": "1",
}


def command(data: Path, folder: Path, steps: int) -> list[str]:
    options = {
        "n_layer": 1,
        "n_embd": 16,
        "head_size": 16,
        "vocab_size": V,
        "data_file": data,
        "proj_dir": folder,
        "ctx_len": T,
        "micro_bsz": BATCH,
        "my_exit_tokens": steps * BATCH * T,
        "save_every_steps": 2,
        "epoch_save": 1,
        "accelerator": "cpu",
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "rwkv_jax.train", *words]


def start(arguments: list[str], cache: Path) -> subprocess.Popen:
    environment = {**os.environ, **ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def steps_of(folder: Path) -> list[str]:
    log = folder / "step_log.tsv"
    return [line.split()[0] for line in log.read_text().splitlines()[1:]] if log.exists() else []


def kill_once(process: subprocess.Popen, folder: Path, number: int, rng: random.Random) -> str:
    """Kills at a random moment; returns what was going on, or "" if the run was over before."""
    begin, before = time.monotonic(), len(steps_of(folder))
    # One in six while it starts, the others within some steps and saves from the first one on.
    wait_for_steps = rng.random() > 1 / 6
    steps, seconds = rng.randrange(1, 8), rng.uniform(0, 0.5)
    limit = time.monotonic() + (600 if wait_for_steps else rng.uniform(0, 12))
    while process.poll() is None and time.monotonic() < limit:
        # The step log goes back when a run goes on, then grows again.
        now = len(steps_of(folder))
        before = min(before, now)
        if wait_for_steps and now >= before + steps:
            time.sleep(seconds)
            break
        time.sleep(0.02)
    if process.poll() is not None:
        return ""
    process.send_signal(number)
    out = process.communicate()[0]
    if process.returncode == 0:
        return ""
    assert process.returncode in (-number, 1), (process.returncode, out)
    assert "Traceback" not in out and "error:" not in out, out
    during = "during a save" if list(folder.glob("checkpoints/*.partial*")) else "between saves"
    if list(folder.glob(".*.tmp")):
        during = "during an export"
    if not wait_for_steps:
        during = "while it started"
    return f"{during}, after {time.monotonic() - begin:.1f} s, with {len(steps_of(folder))} steps"


def compare(folder: Path, alone: Path, steps: int) -> None:
    # A run that is killed before its first checkpoint begins anew, and appends; what is left of a
    # miniepoch at the end is not logged.
    assert read_step_log(folder / "step_log.tsv")["step"].tolist() == list(range(steps))
    logs = [
        {
            line.split()[0]: line.split()[1:4] + line.split()[6:]
            for line in (run / "train_log.txt").read_text().splitlines()
        }
        for run in (folder, alone)
    ]
    assert logs[0] == logs[1] and len(logs[0]) == steps // MINIEPOCH_STEPS
    names = [sorted(path.name for path in run.glob("*.pth")) for run in (folder, alone)]
    assert names[0] == names[1] and "rwkv-final.pth" in names[0]
    for name in names[0]:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps_a_kill", type=int, default=8)
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    number, steps = signal.Signals[f"SIG{options.signal}"], options.kills * options.steps_a_kill + 5
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with BinIdxWriter(root / "data") as writer:
            writer.append(np.arange(2000) ** 2 % 61 + 1, [2000])
        runs = {run: command(root / "data", root / run, steps) for run in ("alone", "killed")}
        print(f"{steps} steps; the run that is left alone …", flush=True)
        process = start(runs["alone"], root / "cache")
        out = process.communicate()[0]
        assert process.returncode == 0, out
        hits: list[str] = []
        while len(hits) < options.kills:
            process = start(runs["killed"], root / "cache")
            hit = kill_once(process, root / "killed", number, rng)
            if not hit:
                break
            hits.append(hit)
            print(f"SIG{options.signal} {len(hits)}: {hit}", flush=True)
        if hit:
            process = start(runs["killed"], root / "cache")
            process.wait()
        out = process.communicate()[0]
        assert process.returncode == 0, out
        compare(root / "killed", root / "alone", steps)
    kinds = [re.split(", after", hit)[0] for hit in hits]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(
        f"killed {len(hits)} times by SIG{options.signal} ({counts}): every .pth byte-identical to "
        f"the run left alone, {steps} steps in step_log.tsv, and each miniepoch in train_log.txt"
    )
    assert len(hits) == options.kills, "the run was over before all kills: raise --steps_a_kill"


if __name__ == "__main__":
    main()
