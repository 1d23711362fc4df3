"""`python -m rwkv_jax.doctor`: what this machine would train on, and what is wrong with it.

Facts are gathered first; then rules over the facts say what is wrong, in plain words and with the
way out. jax's facts, and the losses of a small model that is trained for a few steps, come from one
process of their own, so that a driver that crashes or a GPU that is full is something to report.
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
from rwkv_jax.diagnosis.rules import dotted, notes, problems, self_test
from rwkv_jax.errors import CommandParser, UserError, run_command


def report(facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts, a heading and a line each."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "system", f"{platform.platform()}, Python {platform.python_version()}, {cpus} CPU cores"
    yield "packages", ", ".join(f"{x} {facts.versions.get(x, 'missing')}" for x in PACKAGES)
    plugins = [f"{name} {facts.versions[name]}" for name in PLUGINS if name in facts.versions]
    yield "CUDA", ", ".join(plugins) or "jax has no CUDA plugin"
    if not facts.gpus:
        yield "driver", facts.driver_says or "no NVIDIA driver (no nvidia-smi)"
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
    """On two cores of a slow virtual machine: 8 s, nearly all of it compiling and imports; then 6,
    as compiled programs are kept.
    """
    CommandParser(
        description="Say what this machine would train on, which kernels would run, and what is "
        "wrong with drivers, packages and settings; then train a small model for some steps whose "
        "losses are known. Exits with 1 when something is wrong.",
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
            print(f"{'self-test':>14}  {self_test(trial, precision)} ({took:.1f} s)")
        except UserError as error:
            wrong.append(str(error))
    for note in notes(facts, shutil.disk_usage(".").free):
        print(f"note: {note}")
    for problem in wrong:
        print(f"problem: {problem}")
    if wrong:
        sys.exit(1)
    if facts.jax_says:
        print(f"note: jax says as it starts: {facts.jax_says}")
    print("nothing else is wrong" if facts.jax_says else "nothing is wrong")


if __name__ == "__main__":
    run_command(main)
