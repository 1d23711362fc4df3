"""What there is on this machine: packages, GPUs, settings, and what jax makes of them."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rwkv_jax.device.nvidia import Gpu, ask_nvidia_smi

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes")
CUDA_VERSIONS = ("cuda12", "cuda13")
PLUGINS = tuple(f"jax-{cuda}-{part}" for cuda in CUDA_VERSIONS for part in ("plugin", "pjrt"))

CUDNN = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # of CUDA's libraries, what jax checks first
VARIABLES = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "XLA_FLAGS")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What there is. Rules read nothing else."""

    versions: Mapping[str, str]  # of the packages that are installed
    variables: Mapping[str, str]  # of the environment, those that are set
    gpus: tuple[Gpu, ...] = ()  # by nvidia-smi
    driver_says: str | None = None  # nvidia-smi's words when it fails; None: no such program
    platform: str = ""  # jax's: cpu, gpu, tpu; empty when jax does not start
    kinds: tuple[str, ...] = ()  # a name for each of jax's devices
    kernels: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    precisions: tuple[str, ...] = ()  # what is tried: float32, and what a run would take by itself
    jax_says: str = ""  # its last complaint

    @property
    def plugins(self) -> list[str]:
        """Of cuda12 and cuda13, those that are installed."""
        return [kind for kind in CUDA_VERSIONS if f"jax-{kind}-plugin" in self.versions]


PATIENCE = 300.0  # seconds: a GPU's first compilations, on a slow machine


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of starting jax and training on it, in a process of its own."""

    facts: Mapping[str, Any]  # `jax_facts`; empty when jax does not start
    losses: Mapping[str, Sequence[float]]  # by precision, of those trainings that came to an end
    start_says: str  # the last line of what jax complains of as it starts
    says: str  # the last line of all


def run_trial() -> Trial:
    """Runs `TRIAL`, whatever happens to it."""
    # Unbuffered: what was printed before a crash or a hang arrives, in the order it was printed.
    command = [sys.executable, "-u", "-c", TRIAL]
    try:
        said = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE
        ).stdout
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"") + f"\nnot done after {PATIENCE:.0f} seconds".encode()
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    results = [n for n, line in enumerate(lines) if line.startswith("{")]
    facts, *trained = [json.loads(lines[n]) for n in results] or [{}]
    start = lines[: results[0]] if results else lines
    return Trial(
        facts,
        {name: losses for done in trained for name, losses in done.items()},
        start[-1].strip() if start else "",
        lines[-1].strip() if lines else "",
    )


def gather_facts(trial: Trial) -> Facts:
    """The facts of this machine."""
    versions = {}
    for name in (*PACKAGES, *PLUGINS, *CUDNN):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    gpus, driver_says = ask_nvidia_smi()
    return Facts(
        versions=versions,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        gpus=gpus,
        driver_says=driver_says,
        platform=trial.facts.get("platform", ""),
        kinds=tuple(trial.facts.get("kinds", ())),
        kernels=trial.facts.get("kernels", {}),
        precisions=tuple(trial.facts.get("precisions", ())),
        jax_says=trial.start_says,
    )


# The program of `run_trial`. Prints a line of JSON for jax's facts, and for each training.
TRIAL = """
import json, pathlib, tempfile
from rwkv_jax.diagnosis import self_test
facts = self_test.jax_facts()
print(json.dumps(facts), flush=True)
with tempfile.TemporaryDirectory() as folder:
    data = pathlib.Path(folder) / "squares"
    self_test.write_self_test_data(data)
    for precision in facts["precisions"]:
        losses = self_test.losses_of_small_model(data, precision)
        print(json.dumps({precision: losses}), flush=True)
"""
