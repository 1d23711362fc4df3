"""`python -m rwkv_jax.plan`: whether a run fits a GPU that is not here, and how fast it could be.

The very step that `rwkv_jax.train` would run with these options is compiled for the GPU, and XLA's
own plan of its memory is read. That takes no GPU, only the compiler: the extra `plan`.
"""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import jax

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from pallas_kernels.gpu_targets import (
    GPU_TARGETS,
    GpuTarget,
    can_compile,
    device_mesh,
)
from rwkv_jax.config import ModelConfig, TrainConfig, parse_train_options
from rwkv_jax.device.runtime import override_settings
from rwkv_jax.errors import CommandParser, UserError, run_command
from rwkv_jax.model.rwkv7 import summary
from rwkv_jax.parallel import sharding
from rwkv_jax.planning.batch_size import WAYS_OUT, find_largest, most_samples
from rwkv_jax.planning.memory import GIB, Need, available, measure, quiet_compiler
from rwkv_jax.training.build import RECOMPUTED, decide
from rwkv_jax.training.initial_weights import model_of

PCIE_GB_S = 25  # each way, what a card's 16 lanes of PCIe 4.0 reach


def find_target(gpu: str) -> GpuTarget:
    """The GPU of that name.

    Raises:
        UserError: it is not known, or the compiler is not installed.
    """
    if gpu not in GPU_TARGETS:
        what = f"--gpu {gpu}: not known" if gpu else "--gpu is needed"
        raise UserError(f"{what}: give one of {', '.join(GPU_TARGETS)}")
    if not can_compile():
        raise UserError(
            "the compiler for GPUs is not installed: pip install -e '.[plan]', or "
            "'rwkv-jax[plan]'; beside jax's plugin for CUDA 13, nvidia-cuda-nvcc and absl-py"
        )
    return GPU_TARGETS[gpu]


class Plan(NamedTuple):
    """Steps for one GPU and one set of options, by their micro_bsz; the largest that fits, or 0."""

    target: GpuTarget
    config: TrainConfig
    model: ModelConfig
    needs: dict[int, Need]
    largest: int


def plan(config: TrainConfig, target: GpuTarget, search: bool = True) -> Plan:
    """Measures micro_bsz (-1, or 0: 1) and, to `search`, what it takes to know the largest."""
    start = max(config.micro_bsz, 1)
    config = dataclasses.replace(config, devices=config.devices or 1, micro_bsz=start)
    config = decide(config, on_gpu=True, capability=target.compute_capability)
    count = config.devices * config.num_nodes
    with quiet_compiler():
        there = list(device_mesh(target, count, config.num_nodes).devices.flat)
    mesh = sharding.mesh_of(there, sharding.groups(config.mesh, count))
    model, limit = model_of(config), available(target)
    if search:
        largest, needs = find_largest(config, model, mesh, limit, target)
    else:
        needs = {start: measure(config, model, mesh, target)}
        largest = start if needs[start].total <= limit else 0
    return Plan(target, config, model, needs, largest)


def report(result: Plan, micro_bsz: int, command: str) -> str:
    """What `main` prints of a plan, at one of its micro_bsz."""
    target, config, model, needs, largest = result
    need = needs[micro_bsz]
    fits = need.total <= available(target)
    grows = _grown(needs, micro_bsz)
    stays = need.temporary - grows
    in_16_bits = config.precision in ("bf16", "fp16")
    rate = target.tensor_tflops if in_16_bits else target.fp32_tflops
    arithmetic = need.flops / (rate * 1e12)
    memory = need.traffic / (target.bandwidth_gb_s * 1e9)
    host = need.moved / (PCIE_GB_S * 1e9)
    limit = max(arithmetic, memory) + host  # one waits for the other
    where = " in the host's memory" if need.host else ""
    count = config.devices * config.num_nodes
    tokens = micro_bsz * config.accumulate_grad_batches * config.ctx_len * count
    rows = {
        "model": summary(model),
        "devices": f"{count} x {target.device_kind}"
        + (f" in {config.num_nodes} machines" if config.num_nodes > 1 else "")
        + f", {config.precision}, {RECOMPUTED[config.grad_cp]}"
        + (f", {config.strategy}" if count > 1 or need.host else ""),
        "batch": f"micro_bsz {micro_bsz}, ctx_len {config.ctx_len}: {tokens:,} tokens a step",
        "parameters": f"{_gib(need.parameters)} float32 masters{where}",
        "optimizer": f"{_gib(need.optimizer)} Adam's moments{where}",
        "activations": f"{_gib(grows)} {grows / micro_bsz / GIB:.2f} GiB a sample",
        "gradients": f"{_gib(stays)} and working copies",
        "peak": f"{_gib(need.total)} a device; of its {target.memory_gb} GiB jax has "
        f"{available(target) / GIB:.1f}, the rest is the CUDA context's and libraries': "
        + ("fits" if fits else "DOES NOT FIT"),
        "largest": f"micro_bsz {largest} fits: {_gib(needs[largest].total).strip()}"
        + (", a miniepoch a step" if largest == most_samples(config, count) else "")
        if largest
        else f"not even micro_bsz 1 fits; {WAYS_OUT}",
        "step": f"{need.flops / 1e12:,.1f} TFLOP a device, {1e3 * arithmetic:,.0f} ms at "
        f"{rate:,g} TFLOP/s; {need.traffic / 1e9:,.0f} GB of memory traffic, "
        f"{1e3 * memory:,.0f} ms at {target.bandwidth_gb_s:,g} GB/s",
        "host": f"{need.moved / 1e9:,.0f} GB to and from its memory, "
        f"{1e3 * host:,.0f} ms at {PCIE_GB_S} GB/s; {count} x {_gib(need.host).strip()} there",
        "speed": f"at most {tokens / limit:,.0f} tokens/s by these limits of the card",
        "train": command,
    }
    if not need.host:
        del rows["host"]
    if need.visit > need.passes:
        rows["activations"] = f"{_gib(0)} at the fullest moment, the update of the state"
        rows["gradients"] = f"{_gib(need.visit)} and the part of the state that is being updated"
    elif len(needs) == 1:  # one batch does not tell what grows with it
        rows["activations"] = f"{_gib(need.temporary)} with gradients and working copies"
        del rows["gradients"]
    if len(needs) == 1:
        rows["largest"] = "leave --micro_bsz out to search for the largest that fits"
        if not fits:
            rows["largest"] += f", or {WAYS_OUT}"
    return "\n".join(f"{name:>12}  {value}" for name, value in rows.items())


def _grown(needs: dict[int, Need], micro_bsz: int) -> float:
    """Bytes of a need's `temporary` that grow with the batch, of 0 to all of it.

    By the line through the smallest batch that was measured and this one (or the next).
    """
    smallest, *larger = sorted(needs)
    temporary = needs[micro_bsz].temporary
    if not larger:
        return temporary
    other = max(micro_bsz, larger[0])
    slope = (needs[other].passes - needs[smallest].passes) / (other - smallest)
    return min(max(slope * micro_bsz, 0.0), temporary)


def _gib(count: float) -> str:
    return f"{count / GIB:6.2f} GiB"


def main() -> None:
    parser = CommandParser(
        usage="%(prog)s --gpu h100 [--size 1.5b] [--micro_bsz 4] [option of train …]",
        description="Whether a run fits a GPU, how large a batch does, and how fast a step could "
        "be, on a machine without one. Compiles the step that python -m rwkv_jax.train would run: "
        "once where --micro_bsz is a number, else three to eight times to find the largest.",
        epilog="Every option of python -m rwkv_jax.train is taken; those that matter are --size, "
        "--n_layer, --n_embd, --ctx_len, --micro_bsz, --accumulate_grad_batches, --grad_cp, "
        "--head_chunk, --precision, --devices, --num_nodes and --strategy.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default="", help=f"one of {', '.join(GPU_TARGETS)}")
    options, rest = parser.parse_known_args()
    override_settings()
    jax.config.update("jax_platforms", "cpu")
    # A kernel's program names the lines that it was traced from: without them, what was compiled
    # once is known again wherever the code lies, and after every change that changes no program.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # What is compiled for a GPU that is not there cannot be loaded again: jax would write it into
    # the cache of `JAX_COMPILATION_CACHE_DIR`, and warn whenever it finds it there.
    jax.config.update("jax_enable_compilation_cache", False)
    config, _ = parse_train_options(rest)
    result = plan(config, find_target(options.gpu), search=config.micro_bsz < 1)
    micro_bsz = config.micro_bsz if config.micro_bsz > 0 else result.largest or 1
    given = _without(rest, "--micro_bsz")
    command = shlex.join(["python", "-m", "rwkv_jax.train", *given, "--micro_bsz", str(micro_bsz)])
    print(report(result, micro_bsz, command))
    if micro_bsz > result.largest:
        sys.exit(1)


def _without(arguments: list[str], option: str) -> list[str]:
    """The command line less one option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] != option:
            kept.append(argument)
        skip = argument == option
    return kept


if __name__ == "__main__":
    run_command(main)
