"""jax's settings before its first use of a device: memory, compile cache, determinism."""

import contextlib
import os
import sys

import jax
from jax.experimental import topologies

from rwkv_jax.device.nvidia import ask_nvidia_smi, has_driver
from rwkv_jax.errors import UserError, suppress_stderr
from rwkv_jax.files import cache_folder

# jax settings that change results or break correct programs. The commands set them to fixed values
# whatever the environment says (JAX_ENABLE_X64=1, …), so that results depend on the options alone.
SETTINGS = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
    "jax_check_tracer_leaks": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_transfer_guard": "allow",
}

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"  # a flag of XLA


def memory_fraction(total: int) -> float:
    """The fraction of a GPU's `total` bytes that jax may allocate (jax's own default is 3/4).

    The rest, 5 % and at least 1 GiB, is for the CUDA context, the libraries' workspaces and the
    communication buffers.
    """
    return min(0.95, 1 - 2**30 / total)


def override_settings() -> None:
    """Applies `SETTINGS`, overriding the environment; notes each variable that has no effect."""
    for name, value in SETTINGS.items():
        if name.upper() in os.environ and jax.config.values[name] != value:
            jax.config.update(name, value)
            print(f"note: {name.upper()} has no effect on this command", file=sys.stderr)


def prepare_jax(deterministic: bool = False) -> None:
    """Configures jax before the first use of a device: GPU memory share, compilation cache,
    `SETTINGS`.

    Values that the user set in the environment (`XLA_CLIENT_MEM_FRACTION` or its older name,
    `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB`, `JAX_COMPILATION_CACHE_DIR`, `XLA_FLAGS`) are kept. If
    there is no NVIDIA driver, the CUDA plugin's messages about that are suppressed.

    Args:
        deterministic: on GPUs, XLA uses only operations that give the same bytes in every run.

    Raises:
        UserError: the environment's share of a GPU's memory is not a number.
    """
    override_settings()
    if not has_driver():
        # jax loads its plugins on the first query of any platform; this query starts none of them.
        with suppress_stderr(), contextlib.suppress(NotImplementedError):
            topologies.get_topology_desc(platform="none")
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    _choose_memory_fraction()
    # Offloading may use all host memory; XLA's default limit is 64 GB.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(memory))
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _choose_memory_fraction() -> None:
    """Sets the share of a GPU's memory that jax may allocate, unless the environment sets it.

    If both names of that variable are set, or the value is not a number, jax's CUDA plugin does not
    start. jax only logs that, and everything would run on the CPU.
    """
    name, older = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if os.environ.get(name) and os.environ.pop(older, ""):
        print(f"note: {older} has no effect, because {name} is set", file=sys.stderr)
    for given in (name, older):
        if value := os.environ.get(given):
            try:
                positive = float(value) > 0
            except ValueError:
                positive = False
            if not positive:
                raise UserError(f"{given}={value}: set a number above 0 (such as 0.9), or unset it")
            return
    largest = max((gpu.memory for gpu in ask_nvidia_smi()[0]), default=0) or 2**20  # MiB
    os.environ[name] = str(memory_fraction(largest * 2**20))
