"""`python -m rwkv_jax.plan`: whether a run fits a GPU that is not here, and how fast it could be.

The very step that `rwkv_jax.train` would run with these options is compiled for the GPU, and XLA's
own plan of its memory is read. That takes no GPU, only the compiler: the extra `plan`.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

import rwkv_jax
from pallas_kernels.gpu_targets import (
    GPU_TARGETS,
    GpuTarget,
    can_compile,
    device_mesh,
    plugins,
)
from rwkv_jax import cost, pth, sharding, weights
from rwkv_jax.build import (
    RECOMPUTED,
    build_step,
    decide,
    default_batch,
    memory_fraction,
    override_settings,
)
from rwkv_jax.config import ModelConfig, TrainConfig, parse_train_options
from rwkv_jax.dataset import MINIEPOCH
from rwkv_jax.errors import CommandParser, UserError, held_back, run_command
from rwkv_jax.files import cache_folder, written_whole
from rwkv_jax.offload import bytes_of
from rwkv_jax.optimizer import learning_rate, make_optimizer
from rwkv_jax.start import brief, partial_model
from rwkv_jax.step import abstract_state, programs

GIB = 2**30
COMPILATIONS = 8  # that a search for the largest batch takes at most
TOLERANCE = 1.02  # within which a batch is the largest
PCIE_GB_S = 25  # each way, what a card's 16 lanes of PCIe 4.0 reach
WAYS_OUT = (
    "try --grad_cp 1, a smaller --ctx_len, --strategy fsdp_offload, or more devices to shard over"
)


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
            f"{each.as_text()}{part.beside}" for each, part in zip(lowered, parts, strict=True)
        ]
        made_by = f"{jax.__version__} {plugins()} {os.environ.get('XLA_FLAGS')} {cost.COUNTED}"
        program = "\n".join((*texts, target.text(), made_by))
        kept = cache_folder() / "plans" / f"{hashlib.sha256(program.encode()).hexdigest()}.json"
        with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or not as we wrote it
            return Need(**json.loads(kept.read_text(encoding="utf-8")))

    kind = target.device_kind if target else mesh.devices.flat[0].device_kind
    what = f"compiling for {kind}, micro_bsz {config.micro_bsz}{progress} … "
    print(what, end="", file=sys.stderr, flush=True)
    with _without_the_compilers_words():
        compiled = [each.compile() for each in lowered]
    parameters, optimizers = bytes_of(state.params), bytes_of(state.opt_state)
    offloaded = sharding.STRATEGIES[config.strategy].offload
    passes, *visits = [
        _peak(one.memory_analysis()) + part.beside
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


def largest_batch(need: Callable[[int], int], limit: int, most: int = 2**31 - 1) -> int:
    """The largest batch whose need is within the limit, of those measured; 0: not even 1 is.

    A need costs a compilation to know, so at most `COMPILATIONS` are measured. It is nearly affine
    in the batch, but for jumps and for slopes that fall or rise: the line through the two largest
    batches that fit is followed, until one is too large or no batch beyond is expected to fit. Then
    the need is interpolated between the largest batch that fits and the next that does not, until
    they are within 2 % (or next to each other). The interpolation stays away from both: from a
    small distance while each measurement halves the interval, else from a growing one, which ends
    in bisection.

    Args:
        need: batch → bytes.
        limit: bytes.
        most: the largest batch of interest.
    """
    known: dict[int, int] = {}
    batch, margin, ratio = 1, TOLERANCE, math.inf
    while True:
        known[batch] = need(batch)
        best = max((b for b in known if known[b] <= limit), default=0)
        beyond = min((b for b in known if b > best), default=most + 1)
        if not best or len(known) == COMPILATIONS or beyond <= max(TOLERANCE * best, best + 1):
            return best
        if beyond > most:  # none was too large so far
            if len(known) == 1:  # of an affine need, limit / need fits
                batch = max(2, limit // max(known[best], 1))
            else:
                slope = _slope(known, sorted(known)[-2], best)
                batch = best + int((limit - known[best]) / slope)
                if batch <= TOLERANCE * best:
                    return best
            batch = min(batch, 64 * best, most)
            continue
        halved, ratio = beyond / best <= math.sqrt(ratio), beyond / best
        margin = TOLERANCE if halved else margin**3
        affine = best + (limit - known[best]) / _slope(known, best, beyond)
        fits = max(known[best], 1)
        power = math.log(limit / fits) / math.log(known[beyond] / fits)
        guess = max(affine, best * ratio**power)  # the latter of a need that rises as a power
        low, high = best * margin, beyond / margin
        if low > high:
            low = high = math.sqrt(best * beyond)
        batch = min(max(int(guess), math.ceil(low), best + 1), int(high), beyond - 1)
        batch = max(batch, best + 1)


def _slope(known: dict[int, int], a: int, b: int) -> float:
    return max((known[b] - known[a]) / (b - a), 1e-9)


def find_largest(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    limit: int,
    target: GpuTarget | None = None,
) -> tuple[int, dict[int, Need]]:
    """The largest micro_bsz whose step needs at most `limit` bytes, and all that was measured.

    A step takes at most a miniepoch: the official trainer knows no larger ones. The arguments are
    those of `measure`.
    """
    needs: dict[int, Need] = {}

    def cost_of(batch: int) -> int:
        """Affine in the batch, and beyond the limit if a visit is."""
        need = needs[batch]
        return need.passes if need.visit <= limit else limit + need.passes

    def need(batch: int) -> int:
        progress = f" (compilation {len(needs) + 1} of at most {COMPILATIONS}"
        if fit := max((b for b in needs if cost_of(b) <= limit), default=0):
            progress += f"; {fit} fits"
        if too_large := min((b for b in needs if b > fit), default=0):
            progress += f", {too_large} does not"
        options = dataclasses.replace(config, micro_bsz=batch)
        needs[batch] = measure(options, model, mesh, target, f"{progress})")
        return cost_of(batch)

    return largest_batch(need, limit, most_samples(config, mesh.size)), needs


def most_samples(config: TrainConfig, devices: int) -> int:
    """The micro_bsz at which a step is a miniepoch."""
    return max(1, MINIEPOCH // (devices * config.accumulate_grad_batches))


def fitting_batch(
    config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh, limit: int | None = None
) -> int:
    """The largest micro_bsz that fits the devices of a mesh, which are there: `--micro_bsz auto`.

    Where jax does not say how much memory a device has, as of a CPU: the default, and a note.

    Args:
        limit: bytes of a device; None: what jax's allocator has of it.

    Raises:
        UserError: not even 1 fits.
    """
    kind, platform = mesh.devices.flat[0].device_kind, mesh.devices.flat[0].platform
    if limit is None:
        limit = int(0.97 * device_memory(mesh))  # the rest: the next batch, an export
        if jax.process_count() > 1:  # all compile the same; in MiB, for int32
            limit = 2**20 * int(np.min(process_allgather(np.int32(limit // 2**20))))
    if not limit:
        batch = default_batch(on_gpu=platform != "cpu")
        print(
            f"note: --micro_bsz auto: jax does not know the memory of {kind}: training with the "
            f"default, {batch}",
            file=sys.stderr,
        )
        return batch
    batch = find_largest(config, model, mesh, limit)[0]
    if not batch:
        raise UserError(
            f"--micro_bsz auto: not even 1 fits the {limit / GIB:.1f} GiB of {kind}; {WAYS_OUT}"
        )
    return batch


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
def _without_the_compilers_words() -> Iterator[None]:
    """Standard error of the process held back; shown if what is inside fails.

    Raises:
        UserError: the compiler failed; its own first line says why.
    """
    with held_back():
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            why = str(error).strip().partition("\n")[0]
            raise UserError(f"the compiler failed: {why}") from None


def model_of(config: TrainConfig) -> ModelConfig:
    """The model that a run of these options begins with: a --load_model decides its shape.

    Raises:
        UserError: the file cannot be used.
    """
    if not config.load_model:
        return config.model_config()
    if config.load_partial:
        return partial_model(config, Path(config.load_model))[0]
    if Path(config.load_model).is_dir():
        return rwkv_jax.load_params(config.load_model)[0]
    try:
        return weights.infer_config(pth.read(config.load_model))
    except UserError as error:
        raise UserError(f"{config.load_model}: {error}") from None


def available(target: GpuTarget) -> int:
    """Bytes of a GPU that `build.prepare_jax` leaves to arrays and programs."""
    total = int(target.memory_gb * GIB)
    return int(memory_fraction(total) * total)


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
    with _without_the_compilers_words():
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
        "model": brief(model),
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
        prog="python -m rwkv_jax.plan",
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
