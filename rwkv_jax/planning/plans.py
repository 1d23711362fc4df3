"""Plans of runs on GPUs that need not be present: the cost of a step, and a report of it."""

import dataclasses
from typing import NamedTuple

from pallas_kernels.gpu_targets import (
    GPU_TARGETS,
    GpuTarget,
    can_compile,
    device_mesh,
)
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
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
