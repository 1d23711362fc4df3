"""What every test runs under: strict types, and eight devices to shard over."""

import importlib.util
import os
import signal
from pathlib import Path

# With fewer threads than a program on several simulated devices has parts that wait for each other,
# XLA's CPU runtime hangs. Read when jax starts its backend.
os.environ.setdefault("NPROC", "32")
# The workers of xdist have the cores already. A second thread of numpy, scipy or torch would wait
# for one in a loop: with both cores busy, a QR of 64 columns costs 60 times the CPU time.
for _threads in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from rwkv_jax.device.nvidia import has_driver  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# Silent promotions are how a bf16 model turns into a float32 one; they are errors in our tests.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# What the dev extra brings, and these import at their top: the rest runs where it is not installed.
_NEEDS = {
    "torch": ["model/test_torch_rwkv7.py", "training/test_trajectory.py"],
    "lm_eval": ["inference/test_harness.py"],
}
collect_ignore = [
    file for name, files in _NEEDS.items() if not importlib.util.find_spec(name) for file in files
]


def pytest_configure(config: pytest.Config) -> None:
    """Off a GPU, compiles quickly, also in the processes that tests start.

    Without most optimisations, unless JAX_DISABLE_MOST_OPTIMIZATIONS=0 asks for what users run, as
    a stage of CI does; and each program once, in this run and in those that follow:
    `pytest --cache-clear` removes the programs.
    """
    if has_driver():
        return
    # Else jax would look for the libraries of CUDA that the extra `plan` leaves out, and give its
    # compiler up with them.
    jax.config.update("jax_platforms", "cpu")
    settings = {}
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        settings["jax_disable_most_optimizations"] = True
    if hasattr(config, "cache"):
        # A folder a worker: jax does not write its files whole.
        folder = config.cache.mkdir("compiled") / os.environ.get("PYTEST_XDIST_WORKER", "main")
        settings["jax_compilation_cache_dir"] = str(folder)
        settings["jax_persistent_cache_min_compile_time_secs"] = 0.0
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Official-format checkpoints of a tiny model, with float64 logits and final states (.npz)."""
    return Path(__file__).parent / "data" / "oracles"


@pytest.fixture(autouse=True)
def as_before():
    """Restores after each test what commands set in jax: the precision of products, and whether
    and where compiled programs are kept.
    """
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        if jax.config.values[name] != value:
            jax.config.update(name, value)
            compilation_cache.reset_cache()  # jax keeps the folder that it used first
    jax.config.update("jax_default_matmul_precision", None)


@pytest.fixture(autouse=True)
def signals_count():
    """`nohup`, and a shell's background, ignore some: what a test starts would ignore them, too."""
    defaults = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    ignored = [number for number in defaults if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, defaults[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name first on the path, which prints what it is given."""

    def install(words: str, status: int = 0) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{words}\nEND\nexit {status}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install
