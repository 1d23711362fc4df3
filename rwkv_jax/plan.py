"""`python -m rwkv_jax.plan`: memory and speed of a run on a GPU that this machine does not have.

Compiles the step that `rwkv_jax.train` would run with the same options for the GPU, and reads XLA's
memory plan. This needs no GPU, only the compiler (the extra `plan`).
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
from rwkv_jax.planning.batch_size import SUGGESTIONS, find_largest_micro_bsz, max_micro_bsz
from rwkv_jax.planning.memory import GIB, StepCost, available, measure, quiet_compiler
from rwkv_jax.training.build import RECOMPUTED, resolve_config
from rwkv_jax.training.initial_weights import initial_model

PCIE_GB_S = 25  # in each direction; 16 lanes of PCIe 4.0 reach this


def find_target(gpu: str) -> GpuTarget:
    """Finds the GPU of that name.

    Raises:
        UserError: the GPU is not known, or the compiler is not installed.
    """
    if gpu not in GPU_TARGETS:
        what = f"--gpu {gpu}: not known" if gpu else "--gpu is needed"
        raise UserError(f"{what}: give one of {', '.join(GPU_TARGETS)}")
    if not can_compile():
        raise UserError(
            "the compiler for GPUs is not installed: pip install -e '.[plan]', or "
            "'rwkv-jax[plan]'; where jax's plugin for CUDA 13 is installed, pip install "
            "nvidia-cuda-nvcc absl-py instead"
        )
    return GPU_TARGETS[gpu]


class Plan(NamedTuple):
    """The cost of a step on one GPU by micro_bsz; `largest` is the largest that fits, or 0."""

    target: GpuTarget
    config: TrainConfig
    model: ModelConfig
    costs: dict[int, StepCost]
    largest: int


def plan(config: TrainConfig, target: GpuTarget, search: bool = True) -> Plan:
    """Measures one micro_bsz (-1 or 0: 1) and, with `search`, the batches needed to find the
    largest.
    """
    start = max(config.micro_bsz, 1)
    config = dataclasses.replace(config, devices=config.devices or 1, micro_bsz=start)
    config = resolve_config(config, on_gpu=True, capability=target.compute_capability)
    count = config.devices * config.num_nodes
    with quiet_compiler():
        devices = list(device_mesh(target, count, config.num_nodes).devices.flat)
    mesh = sharding.mesh_from_devices(devices, sharding.data_axis_size(config.mesh, count))
    model, limit = initial_model(config), available(target)
    if search:
        largest, costs = find_largest_micro_bsz(config, model, mesh, limit, target)
    else:
        costs = {start: measure(config, model, mesh, target)}
        largest = start if costs[start].total <= limit else 0
    return Plan(target, config, model, costs, largest)


def report(result: Plan, micro_bsz: int, command: str) -> str:
    """The text that `main` prints for a plan, at one of its micro_bsz."""
    target, config, model, costs, largest = result
    cost = costs[micro_bsz]
    fits = cost.total <= available(target)
    grows = _grown(costs, micro_bsz)
    stays = cost.temporary - grows
    in_16_bits = config.precision in ("bf16", "fp16")
    rate = target.tensor_tflops if in_16_bits else target.fp32_tflops
    arithmetic = cost.flops / (rate * 1e12)
    traffic = cost.traffic / (target.bandwidth_gb_s * 1e9)
    host = cost.moved / (PCIE_GB_S * 1e9)
    limit = max(arithmetic, traffic) + host  # transfers do not overlap with the computation
    where = " in host memory" if cost.host else ""
    count = config.devices * config.num_nodes
    tokens = micro_bsz * config.accumulate_grad_batches * config.ctx_len * count
    rows = {
        "model": summary(model),
        "devices": f"{count} x {target.device_kind}"
        + (f" in {config.num_nodes} machines" if config.num_nodes > 1 else "")
        + f", {config.precision}, {RECOMPUTED[config.grad_cp]}"
        + (f", {config.strategy}" if count > 1 or cost.host else ""),
        "batch": f"micro_bsz {micro_bsz}, ctx_len {config.ctx_len}: {tokens:,} tokens per step",
        "parameters": f"{_gib(cost.parameters)} float32 master weights{where}",
        "optimizer": f"{_gib(cost.optimizer)} Adam's moments{where}",
        "activations": f"{_gib(grows)} {grows / micro_bsz / GIB:.2f} GiB per sample",
        "gradients": f"{_gib(stays)} and working copies",
        "peak": f"{_gib(cost.total)} per device; of its {target.memory_gb} GiB jax has "
        f"{available(target) / GIB:.1f}, the rest is for the CUDA context and libraries: "
        + ("fits" if fits else "DOES NOT FIT"),
        "largest": f"micro_bsz {largest} fits: {_gib(costs[largest].total).strip()}"
        + (", a miniepoch per step" if largest == max_micro_bsz(config, count) else "")
        if largest
        else f"not even micro_bsz 1 fits; {SUGGESTIONS}",
        "step": f"{cost.flops / 1e12:,.1f} TFLOP per device, {1e3 * arithmetic:,.0f} ms at "
        f"{rate:,g} TFLOP/s; {cost.traffic / 1e9:,.0f} GB of memory traffic, "
        f"{1e3 * traffic:,.0f} ms at {target.bandwidth_gb_s:,g} GB/s",
        "host": f"{cost.moved / 1e9:,.0f} GB to and from host memory, "
        f"{1e3 * host:,.0f} ms at {PCIE_GB_S} GB/s; {count} x {_gib(cost.host).strip()} in it",
        "speed": f"at most {tokens / limit:,.0f} tokens/s by these limits of the card",
        "train": command,
    }
    if not cost.host:
        del rows["host"]
    if cost.update > cost.passes:
        rows["activations"] = f"{_gib(0)} at the peak, which is the update of the state"
        rows["gradients"] = f"{_gib(cost.update)} and the part of the state that is being updated"
    elif len(costs) == 1:  # one batch does not show what grows with the batch
        rows["activations"] = f"{_gib(cost.temporary)} with gradients and working copies"
        del rows["gradients"]
    if len(costs) == 1:
        rows["largest"] = "leave out --micro_bsz to search for the largest that fits"
        if not fits:
            rows["largest"] += f", or {SUGGESTIONS}"
    return "\n".join(f"{name:>12}  {value}" for name, value in rows.items())


def _grown(costs: dict[int, StepCost], micro_bsz: int) -> float:
    """Bytes of a step's `temporary` that grow with the batch, between 0 and all of it.

    From the line through the smallest measured batch and this one (or the next).
    """
    smallest, *larger = sorted(costs)
    temporary = costs[micro_bsz].temporary
    if not larger:
        return temporary
    other = max(micro_bsz, larger[0])
    slope = (costs[other].passes - costs[smallest].passes) / (other - smallest)
    return min(max(slope * micro_bsz, 0.0), temporary)


def _gib(count: float) -> str:
    return f"{count / GIB:6.2f} GiB"


def main() -> None:
    parser = CommandParser(
        usage="%(prog)s --gpu h100 [--size 1.5b] [--micro_bsz 4] [option of train …]",
        description="Plan a run on a GPU that this machine does not have: whether it fits, the "
        "largest batch that fits, and an upper bound on its speed. Compiles the step that "
        "python -m rwkv_jax.train would run, once if --micro_bsz is a number, else three to eight "
        "times to find the largest.",
        epilog="Accepts every option of python -m rwkv_jax.train; these affect the plan: --size, "
        "--n_layer, --n_embd, --ctx_len, --micro_bsz, --accumulate_grad_batches, --grad_cp, "
        "--head_chunk, --precision, --devices, --num_nodes and --strategy.",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu", default="", help=f"one of {', '.join(GPU_TARGETS)}")
    options, rest = parser.parse_known_args()
    override_settings()
    jax.config.update("jax_platforms", "cpu")
    # A kernel's program names the source lines that it was traced from. Without these locations the
    # cache key does not depend on where the code is or on edits that do not change the program.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    # A program compiled for an absent GPU cannot be loaded again: jax would write it to the cache
    # of `JAX_COMPILATION_CACHE_DIR`, and warn whenever it finds it there.
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
    """The command line without one option and its value."""
    others, skip = [], False
    for argument in arguments:
        if not skip and argument.partition("=")[0] != option:
            others.append(argument)
        skip = argument == option
    return others


if __name__ == "__main__":
    run_command(main)
