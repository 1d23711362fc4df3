"""The memory of a compiled step on a device, and its work: FLOPs and bytes moved."""

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

from pallas_kernels.gpu_targets import GpuTarget, plugins
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.device.runtime import memory_fraction
from rwkv_jax.errors import UserError, suppress_stderr
from rwkv_jax.files import cache_folder, written_whole
from rwkv_jax.parallel import sharding
from rwkv_jax.parallel.offload import Program, bytes_of
from rwkv_jax.planning import cost
from rwkv_jax.training.build import build_step
from rwkv_jax.training.optimizer import learning_rate, make_optimizer
from rwkv_jax.training.step import TrainState, abstract_state, programs

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Memory (in bytes) and work of the compiled step on one device."""

    parameters: int  # float32 master weights
    optimizer: int  # float32 moments
    passes: int  # peak of forward and backward pass: these two, the batch, and all temporaries
    flops: int
    traffic: int  # bytes to and from the device's memory
    compile_seconds: float  # of CPU time
    host: int = 0  # the part of master weights and moments in host memory
    update: int = 0  # peak of the offloaded update; independent of the batch size
    moved: int = 0  # bytes between the two memories

    @property
    def total(self) -> int:
        """The peak of the whole step."""
        return max(self.passes, self.update)

    @property
    def temporary(self) -> int:
        """Activations, gradients and working copies of parameters."""
        return self.passes - (self.parameters + self.optimizer - self.host)


def measure(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    target: GpuTarget | None = None,
    progress: str = "",
) -> StepCost:
    """Compiles the step of resolved options and reads its memory and work.

    Prints progress on standard error. Results for a `target` are cached on disk, keyed by a hash of
    the program, the compiler and the counting code.

    Args:
        config: resolved options.
        mesh: of devices that are present, or of `gpu_targets.device_mesh`.
        target: the GPU of that mesh.
        progress: the state of a search, printed after micro_bsz.

    Raises:
        UserError: the compiler failed.
    """
    began, cpu_began = time.monotonic(), _cpu_seconds()
    as_on_the_target = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with as_on_the_target if target else contextlib.nullcontext():
        state, parts = _programs(config, model, mesh)
        traced = [part.function.trace(*part.arguments) for part in parts]
        lowered = [each.lower() for each in traced]
    cached = _cache_file(parts, lowered, target) if target else None
    if cached:
        with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or of another version
            return StepCost(**json.loads(cached.read_text(encoding="utf-8")))
    kind = target.device_kind if target else mesh.devices.flat[0].device_kind
    what = f"compiling for {kind}, micro_bsz {config.micro_bsz}{progress} … "
    print(what, end="", file=sys.stderr, flush=True)
    with quiet_compiler():
        compiled = [each.compile() for each in lowered]
    parameters, moments = bytes_of(state.params), bytes_of(state.opt_state)
    offloaded = sharding.STRATEGIES[config.strategy].offload
    passes, *updates = [
        _peak(one.memory_analysis()) + part.other_bytes
        for one, part in zip(compiled, parts, strict=True)
    ]
    result = StepCost(
        parameters=parameters,
        optimizer=moments,
        passes=passes,
        flops=sum(cost.flops(one.jaxpr.jaxpr) for one in traced),
        traffic=sum(cost.memory_traffic(one.as_text()) for one in compiled),
        compile_seconds=_cpu_seconds() - cpu_began,
        host=parameters + moments if offloaded else 0,
        update=max(updates, default=0),
        moved=sum(part.moved for part in parts),
    )
    seconds = time.monotonic() - began
    print(f"{seconds:.0f} s: {result.total / GIB:.2f} GiB", file=sys.stderr, flush=True)
    if cached:
        with contextlib.suppress(OSError):  # it is compiled again the next time
            _write(cached, json.dumps(dataclasses.asdict(result)))
    return result


def _programs(
    config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh
) -> tuple[TrainState, list[Program]]:
    """The abstract state, and the programs of the step."""
    optimizer = make_optimizer(config, learning_rate(config, model.n_embd, 0, 1e6))
    state = abstract_state(mesh, model, optimizer)
    shape = config.accumulate_grad_batches, mesh.size * config.micro_bsz, config.ctx_len + 1
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    return state, programs(build_step(config, model, mesh, optimizer), state, batch)


def _cache_file(parts: list[Program], lowered: list[Any], target: GpuTarget) -> Path:
    """The cached result for these programs, this compiler and the counting code."""
    texts = [
        f"{each.as_text()}{part.other_bytes}" for each, part in zip(lowered, parts, strict=True)
    ]
    compiler = f"{jax.__version__} {plugins()} {os.environ.get('XLA_FLAGS')} {cost.COUNTED}"
    key = "\n".join((*texts, target.text(), compiler))
    return cache_folder() / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def device_memory(mesh: jax.sharding.Mesh) -> int:
    """Bytes that jax may allocate on this process's smallest device; 0: unknown."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    return min(each.get("bytes_limit", 0) for each in stats)


def _peak(memory: Any) -> int:
    """Bytes of device memory of a program: arguments, results, temporaries and code."""
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
    """Captures standard error; prints it if the block fails.

    Raises:
        UserError: the compiler failed; the message has the first line of its error.
    """
    with suppress_stderr():
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(f"the compiler failed: {why}") from None


def available(target: GpuTarget) -> int:
    """Bytes of a GPU that `runtime.prepare_jax` lets jax allocate."""
    total = int(target.memory_gb * GIB)
    return int(memory_fraction(total) * total)
