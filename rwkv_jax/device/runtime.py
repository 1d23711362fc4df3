"""jax's settings before its first use of a device: memory, compile cache, determinism."""

import contextlib
import os
import sys

import jax
from jax.experimental import topologies

from rwkv_jax.device.nvidia import ask_nvidia_smi, has_driver
from rwkv_jax.errors import UserError, held_back
from rwkv_jax.files import cache_folder

# Settings of jax that change results, or that stop what is right: as the commands need them,
# whatever the environment says (JAX_ENABLE_X64=1, …), so that the options alone decide.
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
    """Of a GPU of so many bytes, what jax takes for arrays and programs (by itself: 3/4).

    The rest, a twentieth and at least 1 GiB, is for the CUDA context, the libraries' workspaces and
    the buffers of communication.
    """
    return min(0.95, 1 - 2**30 / total)


def override_settings() -> None:
    """Gives `SETTINGS` to jax, in place of those that the environment has given it."""
    for name, value in SETTINGS.items():
        if name.upper() in os.environ and jax.config.values[name] != value:
            jax.config.update(name, value)
            print(f"note: {name.upper()} has no effect on this command", file=sys.stderr)


def prepare_jax(deterministic: bool = False) -> None:
    """Before the first use of a device: its memory, a cache of compiled programs, `SETTINGS`.

    What the user has set in the environment (`XLA_CLIENT_MEM_FRACTION` or its older name,
    `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB`, `JAX_COMPILATION_CACHE_DIR`, `XLA_FLAGS`) stays. Where
    there is no NVIDIA driver, what jax's CUDA plugin says of that is not shown.

    Args:
        deterministic: XLA compiles for GPUs only what gives the same bytes each time.

    Raises:
        UserError: the environment's share of a GPU's memory is not a number.
    """
    override_settings()
    if not has_driver():
        # jax looks for its plugins when it is first asked about a platform; none of them starts.
        with held_back(), contextlib.suppress(NotImplementedError):
            topologies.get_topology_desc(platform="none")
    if deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    _choose_memory_fraction()
    # Of the host's, for the strategies that offload: all that it has, where XLA would stop at 64.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(memory))
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))


def _choose_memory_fraction() -> None:
    """Sets the share of a GPU's memory that jax takes, unless the environment has one.

    If both names of that variable are set, or the value is not a number, jax's CUDA plugin does not
    start. jax only logs that, and everything would run on the CPU.
    """
    name, older = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if os.environ.get(name) and os.environ.pop(older, ""):
        print(f"note: {older} has no effect beside {name}", file=sys.stderr)
    for given in (name, older):
        if value := os.environ.get(given):
            try:
                positive = float(value) > 0
            except ValueError:
                positive = False
            if not positive:
                raise UserError(f"{given}={value}: set a number above 0 (as 0.9), or unset it")
            return
    largest = max((gpu.memory for gpu in ask_nvidia_smi()[0]), default=0) or 2**20  # MiB
    os.environ[name] = str(memory_fraction(largest * 2**20))
