"""`python -m rwkv_jax.doctor`: reports what this machine would train on, and its problems.

First facts are collected; then rules over the facts report problems, each with a fix. jax's facts
and the losses of a small model that is trained for a few steps come from a subprocess, so that a
crashing driver or a full GPU can be reported.
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from rwkv_jax.diagnosis.facts import PACKAGES, PLUGINS, Facts, gather_facts, run_trial
from rwkv_jax.diagnosis.rules import dotted, notes, problems
from rwkv_jax.diagnosis.self_test import check_losses
from rwkv_jax.errors import CommandParser, UserError, run_command


def report(facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts, as (heading, line)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "system", f"{platform.platform()}, Python {platform.python_version()}, {cpus} CPU cores"
    yield "packages", ", ".join(f"{x} {facts.versions.get(x, 'missing')}" for x in PACKAGES)
    plugins = [f"{name} {facts.versions[name]}" for name in PLUGINS if name in facts.versions]
    yield "CUDA", ", ".join(plugins) or "jax has no CUDA plugin"
    if not facts.gpus:
        yield "driver", facts.driver_error or "no NVIDIA driver (no nvidia-smi)"
    for gpu in facts.gpus:
        yield (
            "GPU",
            f"{gpu.name}, compute capability {dotted(gpu.capability)}, "
            f"{gpu.memory / 1024:.1f} GiB, driver {gpu.driver}",
        )
    for name, value in facts.variables.items():
        yield "environment", f"{name}={value}"
    if facts.platform:
        yield "jax runs on", f"{len(facts.kinds)} x {facts.kinds[0]} ({facts.platform})"
    for dtype, (name, why) in facts.kernels.items():
        yield f"WKV, {dtype}", f"{name}: {why}"


def main() -> None:
    """Takes 8 s on two cores of a slow virtual machine, nearly all of it compilation and imports;
    6 s after that, because compiled programs are cached.
    """
    CommandParser(
        description="Report the device and kernels that training would use, and problems with "
        "drivers, packages and settings; then train a small model for a few steps and compare its "
        "losses with known values. Exits with 1 if there is a problem.",
    ).parse_args()
    print("starting jax, and training a small model on it …", flush=True)
    began = time.monotonic()
    trial = run_trial()
    took = time.monotonic() - began
    facts = gather_facts(trial)
    for heading, text in report(facts):
        print(f"{heading:>14}  {text}")
    wrong = list(problems(facts))
    for precision in facts.precisions:
        try:
            print(f"{'self-test':>14}  {check_losses(trial, precision)} ({took:.1f} s)")
        except UserError as error:
            wrong.append(str(error))
    for note in notes(facts, shutil.disk_usage(".").free):
        print(f"note: {note}")
    for problem in wrong:
        print(f"problem: {problem}")
    if wrong:
        sys.exit(1)
    if facts.jax_error:
        print(f"note: jax printed at start-up: {facts.jax_error}")
    print("nothing else is wrong" if facts.jax_error else "nothing is wrong")


if __name__ == "__main__":
    run_command(main)
