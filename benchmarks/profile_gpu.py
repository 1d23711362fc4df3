"""Profiles a training step on a GPU, by kernel and by part of the model.

    python -m benchmarks.profile_gpu --size 0.1b --ctx_len 4096 --micro_bsz 8 [--output PATH]

Five steps, after a warm-up, under jax's profiler. The step is that of `train_step_gpu`; all other
options are those of `python -m rwkv_jax.train`. A kernel's part (`PARTS`) follows from the named
scope of its instruction in the compiled program, or else from the kernel's name: for a product in a
CUDA graph the profiler may not name the instruction. Milliseconds are of one step; kernels that
overlap count in full.

On a CPU everything runs in the same way, with the operations on the host as kernels.
"""

import collections
import glob
import gzip
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from benchmarks import command, machine
from benchmarks.train_step_gpu import EXIT_TOKENS, describe_run, prepare
from rwkv_jax.config import parse_train_options
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.training.initial_weights import write_init

WARM_UP, STEPS = 8, 5

# The first that fits: of the scope, of the kernel's name, of either.
SCOPES = {"wkv7": "wkv7", "loss_and_head": "head_loss", "optimizer": "optimizer"}
PARTS = {
    **SCOPES,
    "collectives": r"nccl|all-?reduce|all-?gather|reduce-?scatter|collective",
    "matrix_products": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|split-?k|\bdot|_dot|dot_general",
    "copies": r"^mem(cpy|set)|^copy|^wrapped_copy|^transpose|^wrapped_transpose",
    "elementwise": "",
}


class Event(NamedTuple):
    name: str
    hlo_op: str  # the instruction; "" where the profiler does not say
    start: float  # ns
    end: float


def scopes(hlo: str) -> dict[str, str]:
    """Of each instruction of a compiled program, where in our code it is from.

    Kernels that XLA generates are called as their instruction is, in the characters that C has.
    """
    found = {}
    for line in hlo.splitlines():
        if match := re.match(
            r"\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{.*?op_name=\"(.*?)\"", line
        ):
            found[match[1]] = found[re.sub(r"\W", "_", match[1])] = match[2]
    return found


def part_of(name: str, scope: str) -> str:
    """A name in `PARTS` for a kernel, by its scope ("" if unknown) and its own name."""
    for part, pattern in SCOPES.items():
        if pattern in scope or pattern in name:
            return part
    for part, pattern in PARTS.items():
        if re.search(pattern, name, re.IGNORECASE):
            if part == "elementwise" and scope.endswith("dot_general"):
                return "matrix_products"
            return part
    raise AssertionError("the last part takes everything")


def lines_of(data: ProfileData, on_gpu: bool) -> Iterator[list[Event]]:
    """What ran on each stream of the GPUs; of a CPU's thread, the operations of programs."""
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU" if on_gpu else "/host:CPU"):
            continue
        for line in plane.lines:
            if on_gpu and not line.name.startswith("Stream"):
                continue  # made from the streams
            events = []
            for event in line.events:
                stats = dict(event.stats)
                if on_gpu or "hlo_op" in stats:
                    end = event.start_ns + event.duration_ns
                    hlo_op = str(stats.get("hlo_op", ""))
                    events.append(Event(event.name, hlo_op, event.start_ns, end))
            yield events


def own_times(line: Iterable[Event]) -> Iterator[tuple[Event, float]]:
    """Each event with its nanoseconds, less those of events inside it (a loop has its body's)."""
    open_: list[list[Any]] = []  # [event, its own time]
    for event in sorted(line, key=lambda event: (event.start, -event.end)):
        while open_ and open_[-1][0].end <= event.start:
            yield tuple(open_.pop())
        if open_:
            open_[-1][1] -= min(event.end, open_[-1][0].end) - event.start
        open_.append([event, event.end - event.start])
    while open_:
        yield tuple(open_.pop())


def summarise(
    data: ProfileData, scope_of: dict[str, str], steps: int, on_gpu: bool
) -> dict[str, Any]:
    """Parts and kernels of a trace, in milliseconds a step; the longest kernels first.

    Args:
        scope_of: of `scopes`.
        on_gpu: else the host's operations are taken for kernels.
    Raises:
        UserError: nothing that the device ran is in it.
    """
    time_of: dict[tuple[str, str], float] = collections.defaultdict(float)
    calls: dict[tuple[str, str], int] = collections.defaultdict(int)
    spans, scoped = [], 0.0
    for line in lines_of(data, on_gpu):
        for event, own in own_times(line):
            name = event.name.strip()
            scope = scope_of.get(event.hlo_op) or scope_of.get(name, "")
            key = name, part_of(name, scope)
            time_of[key] += own
            scoped += own if scope else 0.0
            calls[key] += 1
            spans.append((event.start, event.end))
    total = sum(time_of.values())
    if not total:
        raise UserError("the profiler gave a trace in which no device ran anything: is CUPTI here?")
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    parts = dict.fromkeys(PARTS, 0.0)
    for (_, part), ns in time_of.items():
        parts[part] += ns / steps / 1e6
    longest = sorted(time_of, key=lambda key: -time_of[key])
    return {
        "steps": steps,
        "busy_share": busy / (end - min(spans)[0]),
        "scoped_share": scoped / total,
        "parts": parts,
        "kernels": [
            {
                "name": name,
                "ms": time_of[name, part] / steps / 1e6,
                "share": time_of[name, part] / total,
                "calls": calls[name, part] / steps,
                "part": part,
            }
            for name, part in longest
        ],
    }


def trace(arguments: list[str], folder: Path) -> tuple[str, float]:
    """Traces `STEPS` steps into a folder; the program's HLO, and the seconds of a step.

    Raises:
        UserError: the profiler does not start.
    """
    prepared = prepare(arguments)
    state, batch = prepared.make_state(), jax.device_put(prepared.batch, prepared.batch_sharding)
    for _ in range(WARM_UP):
        state, _ = prepared.run(state, batch)
    jax.block_until_ready(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 2 if jax.default_backend() == "cpu" else 1
    options.raise_error_on_start_failure = True
    try:
        jax.profiler.start_trace(str(folder), profiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the profiler does not start: {error}") from None
    began = time.perf_counter()
    for _ in range(STEPS):
        state, _ = prepared.run(state, batch)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / STEPS
    jax.profiler.stop_trace()
    return prepared.run.as_text() or "", seconds  # not every program from disk has it


def read(folder: Path) -> Path:
    """The trace in a folder of jax's profiler.

    Raises:
        UserError: there is none.
    """
    found = glob.glob(f"{glob.escape(str(folder))}/**/*.xplane.pb", recursive=True)
    if not found:
        raise UserError("the profiler left no trace")
    return Path(found[0])


def main() -> None:
    parser = command.record_parser(__doc__, allow_abbrev=False)
    parser.add_argument(
        "--trace", type=Path, metavar="PATH", help="keep the profiler's file here (.xplane.pb.gz)"
    )
    options, arguments = parser.parse_known_args()
    arguments += ["--my_exit_tokens", str(EXIT_TOKENS)]
    config, _ = parse_train_options(arguments)
    prepare_jax(bool(config.deterministic))
    device = jax.devices()[0]
    if device.platform == "cpu":
        print("no GPU: a rehearsal on a CPU, whose times mean nothing", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not config.load_model:
            arguments += ["--load_model", str(write_init(folder / "rwkv-init.pth", config))]
        hlo, seconds = trace(arguments, folder)
        path = read(folder)
        if options.trace:
            with path.open("rb") as source, gzip.open(options.trace, "wb", 6) as target:
                shutil.copyfileobj(source, target)
        data = ProfileData.from_file(str(path))
        summary = summarise(data, scopes(hlo), STEPS, device.platform == "gpu")
    result = machine.record("profile") | {
        "device_kind": device.device_kind,
        "on_gpu": device.platform == "gpu",
        **describe_run(arguments),
        "step_ms": 1e3 * seconds,
        **summary,
    }
    if options.output:
        machine.write(options.output, result)
    print(f"{result['step_ms']:.2f} ms a step, the device busy for {summary['busy_share']:.0%}")
    print(f"the scope is known of {summary['scoped_share']:.0%} of its time, else the name decides")
    total = sum(summary["parts"].values())
    for part, ms in summary["parts"].items():
        print(f"{ms:10.3f} ms {ms / total:6.1%}  {part}")
    print("the longest kernels:")
    for row in summary["kernels"][:30]:
        what = f"{row['part']}: {row['name'][:90]}"
        print(f"{row['ms']:10.3f} ms {row['share']:6.1%} x{row['calls']:<6g} {what}")


if __name__ == "__main__":
    run_command(main)
