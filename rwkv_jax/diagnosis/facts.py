"""The facts about this machine: packages, GPUs, settings and jax's devices."""

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

CUDNN = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # the CUDA library that jax checks first
VARIABLES = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "XLA_FLAGS")


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts about this machine. Rules read only these."""

    versions: Mapping[str, str]  # of installed packages
    variables: Mapping[str, str]  # environment variables that are set
    gpus: tuple[Gpu, ...] = ()  # as nvidia-smi reports them
    driver_error: str | None = None  # nvidia-smi's error message; None: it is not installed
    platform: str = ""  # jax's: cpu, gpu, tpu; empty if jax does not start
    kinds: tuple[str, ...] = ()  # device kinds of jax's devices
    kernels: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    precisions: tuple[str, ...] = ()  # of the self-test: float32 and the default of a run
    jax_error: str = ""  # last error message of jax

    @property
    def plugins(self) -> list[str]:
        """The installed ones of cuda12 and cuda13."""
        return [kind for kind in CUDA_VERSIONS if f"jax-{kind}-plugin" in self.versions]


PATIENCE = 300.0  # seconds; enough for the first compilations for a GPU on a slow machine


@dataclasses.dataclass(frozen=True)
class Trial:
    """Result of starting jax and training with it in a subprocess."""

    facts: Mapping[str, Any]  # `jax_facts`; empty if jax does not start
    losses: Mapping[str, Sequence[float]]  # by precision, for the trainings that finished
    start_message: str  # last line of jax's start-up messages
    last_message: str  # last line of the whole output


def run_trial() -> Trial:
    """Runs `TRIAL` in a subprocess and collects its output, even if it crashes or hangs."""
    # Unbuffered, so that output printed before a crash or a hang arrives, in order.
    command = [sys.executable, "-u", "-c", TRIAL]
    try:
        output = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE
        ).stdout
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"") + f"\nnot done after {PATIENCE:.0f} seconds".encode()
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    results = [n for n, line in enumerate(lines) if line.startswith("{")]
    facts, *trainings = [json.loads(lines[n]) for n in results] or [{}]
    start = lines[: results[0]] if results else lines
    return Trial(
        facts,
        {name: losses for training in trainings for name, losses in training.items()},
        start[-1].strip() if start else "",
        lines[-1].strip() if lines else "",
    )


def gather_facts(trial: Trial) -> Facts:
    """Collects the facts about this machine."""
    versions = {}
    for name in (*PACKAGES, *PLUGINS, *CUDNN):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    gpus, driver_error = ask_nvidia_smi()
    return Facts(
        versions=versions,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        gpus=gpus,
        driver_error=driver_error,
        platform=trial.facts.get("platform", ""),
        kinds=tuple(trial.facts.get("kinds", ())),
        kernels=trial.facts.get("kernels", {}),
        precisions=tuple(trial.facts.get("precisions", ())),
        jax_error=trial.start_message,
    )


# The program of `run_trial`. Prints one line of JSON for jax's facts, and one for each training.
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
