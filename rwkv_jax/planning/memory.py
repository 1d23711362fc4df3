"""What a compiled step needs of a device's memory."""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_targets import (
    GpuTarget,
    plugins,
)
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.device.runtime import memory_fraction
from rwkv_jax.errors import UserError, suppress_stderr
from rwkv_jax.files import cache_folder, written_whole
from rwkv_jax.parallel import sharding
from rwkv_jax.parallel.offload import bytes_of
from rwkv_jax.planning import cost
from rwkv_jax.training.build import build_step
from rwkv_jax.training.optimizer import learning_rate, make_optimizer
from rwkv_jax.training.step import abstract_state, programs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Need:
    """What the compiled step needs of one device, in bytes, and what it does there."""

    parameters: int  # float32 masters
    optimizer: int  # float32 moments
    passes: int  # at the peak of forward and backward pass: these, the batch, and all within
    flops: int
    traffic: int  # bytes to and from the device's memory
    compile_seconds: float  # of CPU time
    host: int = 0  # of masters and moments, what is in the host's memory instead
    visit: int = 0  # at the peak of their visits to the device, which no batch size changes
    moved: int = 0  # bytes between the two memories

    @property
    def total(self) -> int:
        """At the peak of the whole step."""
        return max(self.passes, self.visit)

    @property
    def temporary(self) -> int:
        """Activations, gradients, working copies of parameters."""
        return self.passes - (self.parameters + self.optimizer - self.host)


def measure(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    target: GpuTarget | None = None,
    progress: str = "",
) -> Need:
    """Compiles the step of decided options and reads what it needs.

    Says on standard error what is being compiled. What was found for a `target` is kept on disk,
    under a hash of the program and of what compiled and counted it.

    Args:
        config: of `build.decide`.
        mesh: of devices that are there, or of `gpu_targets.device_mesh`.
        target: the GPU that the latter stands for.
        progress: of a search, shown beside micro_bsz.

    Raises:
        UserError: the compiler cannot compile it.
    """
    optimizer = make_optimizer(config, learning_rate(config, model.n_embd, 0, 1e6))
    state = abstract_state(mesh, model, optimizer)
    shape = config.accumulate_grad_batches, mesh.size * config.micro_bsz, config.ctx_len + 1
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    began, cpu_began = time.monotonic(), _cpu_seconds()
    as_on_the_target = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with as_on_the_target if target else contextlib.nullcontext():
        parts = programs(build_step(config, model, mesh, optimizer), state, batch)
        traced = [part.function.trace(*part.arguments) for part in parts]
        lowered = [each.lower() for each in traced]
    kept = None
    if target:
        texts = [
            f"{each.as_text()}{part.other_bytes}" for each, part in zip(lowered, parts, strict=True)
        ]
        made_by = f"{jax.__version__} {plugins()} {os.environ.get('XLA_FLAGS')} {cost.COUNTED}"
        program = "\n".join((*texts, target.text(), made_by))
        kept = cache_folder() / "plans" / f"{hashlib.sha256(program.encode()).hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or not as we wrote it
            return Need(**json.loads(kept.read_text(encoding="utf-8")))

    kind = target.device_kind if target else mesh.devices.flat[0].device_kind
    what = f"compiling for {kind}, micro_bsz {config.micro_bsz}{progress} … "
    print(what, end="", file=sys.stderr, flush=True)
    with quiet_compiler():
        compiled = [each.compile() for each in lowered]
    parameters, optimizers = bytes_of(state.params), bytes_of(state.opt_state)
    offloaded = sharding.STRATEGIES[config.strategy].offload
    passes, *visits = [
        _peak(one.memory_analysis()) + part.other_bytes
        for one, part in zip(compiled, parts, strict=True)
    ]
    need = Need(
        parameters=parameters,
        optimizer=optimizers,
        passes=passes,
        flops=sum(cost.flops(one.jaxpr.jaxpr) for one in traced),
        traffic=sum(cost.memory_traffic(one.as_text()) for one in compiled),
        compile_seconds=_cpu_seconds() - cpu_began,
        host=parameters + optimizers if offloaded else 0,
        visit=max(visits, default=0),
        moved=sum(part.moved for part in parts),
    )
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s: {need.total / GIB:.2f} GiB", file=sys.stderr, flush=True)
    if kept:
        with contextlib.suppress(OSError):  # the next time it is compiled again
            _write(kept, json.dumps(dataclasses.asdict(need)))
    return need


def device_memory(mesh: jax.sharding.Mesh) -> int:
    """Bytes that jax's allocator has of this process's smallest device; 0: it does not tell."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return min(each.get("bytes_limit", 0) for each in stats)


def _peak(memory: Any) -> int:
    """Bytes of a device that a program takes: its arguments, its results and what it works with."""
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _cpu_seconds() -> float:
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Standard error of the process held back; shown if what is inside fails.

    Raises:
        UserError: the compiler failed; its own first line says why.
    """
    with suppress_stderr():
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(f"the compiler failed: {why}") from None


def available(target: GpuTarget) -> int:
    """Bytes of a GPU that `build.prepare_jax` leaves to arrays and programs."""
    total = int(target.memory_gb * GIB)
    return int(memory_fraction(total) * total)
