"""From the options to the step that they mean: what train runs and plan compiles."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from pallas_kernels.gpu_targets import current_compute_capability
from rwkv_jax import sharding
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError, held_back
from rwkv_jax.files import cache_folder
from rwkv_jax.model import use_precision
from rwkv_jax.nvidia import ask_nvidia_smi, has_driver
from rwkv_jax.step import Metrics, TrainState, make_step

PRECISIONS = {"bf16": jnp.bfloat16, "fp32": jnp.float32, "tf32": jnp.float32, "fp16": jnp.float16}

# What the backward pass computes again, by --grad_cp.
RECOMPUTED = (
    "no recomputation",
    "blocks recomputed in the backward pass",
    "blocks but their matrix products recomputed in the backward pass",
)


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


def default_precision(on_gpu: bool, capability: tuple[int, int] | None) -> str:
    """A name in `PRECISIONS`: fp32 on a CPU; bf16, or fp16 on GPUs that have no bf16 units.

    Args:
        capability: of an NVIDIA GPU; those from 8.0 on have bf16 units. None: of any other.
    """
    if not on_gpu:
        return "fp32"
    return "fp16" if capability and capability < (8, 0) else "bf16"


def device_precision() -> str:
    """`default_precision` of jax's default device, for a model that is used without training."""
    return default_precision(jax.default_backend() != "cpu", current_compute_capability())


def default_batch(on_gpu: bool) -> int:
    """The micro_bsz of a run that names none."""
    return 8 if on_gpu else 1


def decide(
    config: TrainConfig, on_gpu: bool, capability: tuple[int, int] | None = None
) -> TrainConfig:
    """The options with every default that depends on the machine decided.

    Also tells jax how exact float32 products are to be.

    Args:
        capability: as for `default_precision`.
    """
    precision = default_precision(on_gpu, capability)
    config = dataclasses.replace(
        config,
        micro_bsz=config.micro_bsz or default_batch(on_gpu),
        grad_cp=int(on_gpu) if config.grad_cp == -1 else config.grad_cp,
        strategy="deepspeed_stage_2" if config.strategy == "auto" else config.strategy,
        precision=precision if config.precision == "auto" else config.precision,
    )
    use_precision(config.precision)
    return config


def build_step(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, jax.Array], tuple[TrainState, Metrics]]:
    """`step.make_step` by decided options."""
    return make_step(
        model,
        optimizer,
        mesh,
        sharding.STRATEGIES[config.strategy],
        PRECISIONS[config.precision],
        remat=config.grad_cp,
        head_chunk=config.head_chunk,
    )
