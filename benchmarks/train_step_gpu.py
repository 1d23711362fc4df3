"""Times the training step on a GPU: tokens per second, MFU, peak memory.

    python -m benchmarks.train_step_gpu --size 0.1b --ctx_len 4096 --runs 8/1 16/1 [--output PATH]

Each of --runs is micro_bsz/grad_cp, in a process of its own: where one does not fit, its row says
so and the others are timed. The step is the one that `python -m rwkv_jax.train` compiles for the
same options, from weights as it makes them, with the moments fresh; the batch is random tokens, the
same in every step. Steps are dispatched in groups and waited for at a group's end, so that the host
is not in the way; `ms` is the median over groups. No checkpoint is written.

With --command the command itself is run as well, with the first of --runs, until it has done as
many steps, and ended; its own speed, from step_log.tsv, shows what the loop adds.

With --compile_only nothing is run, and all are compiled at once: the next call, and the command,
find them on disk. All other options are those of `python -m rwkv_jax.train`.

On a CPU everything runs in the same way; its times mean nothing.
"""

import multiprocessing
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv_jax
from benchmarks import command, gpu_inputs, machine
from pallas_kernels.gpu_targets import current_compute_capability
from rwkv_jax.config import ModelConfig, TrainConfig, parse_train_options
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import UserError, message_and_status, one_line, run_command
from rwkv_jax.parallel import distributed, sharding
from rwkv_jax.tracking.step_log import STEP_LOG, read_step_log
from rwkv_jax.training import utilization
from rwkv_jax.training.build import build_step, resolve_config
from rwkv_jax.training.initial_weights import write_init
from rwkv_jax.training.optimizer import learning_rate, make_optimizer
from rwkv_jax.training.schedule import make_schedule
from rwkv_jax.training.step import TrainState, abstract_state, fresh_moments, programs

GROUP = 5  # steps that are dispatched before one is waited for
# The end of the learning rate's decay is a number in the program: as the command gets it.
EXIT_TOKENS = 10**9


class Prepared(NamedTuple):
    """A step, compiled, for one device."""

    run: Any  # (state, batch) → (state, metrics); `as_text()` is its HLO
    config: TrainConfig  # decided
    model: ModelConfig
    rate: optax.Schedule
    make_state: Callable[[], TrainState]  # of the weights in --load_model, which is read
    batch: np.ndarray  # [1, B, T + 1] int32
    batch_sharding: jax.sharding.Sharding
    compile_s: float
    from_disk: bool  # it had been compiled before


def options_for(arguments: list[str], run: str) -> list[str]:
    """The command line of train for one of --runs.

    Raises:
        UserError: it is not micro_bsz/grad_cp.
    """
    micro_bsz, _, grad_cp = run.partition("/")
    if not (micro_bsz.isdecimal() and grad_cp.isdecimal()):
        raise UserError(f"--runs {run}: give micro_bsz/grad_cp, such as 8/1")
    return [*arguments, "--micro_bsz", micro_bsz, "--grad_cp", grad_cp]


def prepare(arguments: list[str]) -> Prepared:
    """Compiles the step that train's options mean, for the first device.

    Raises:
        UserError: it is none that can be compiled as one program.
    """
    config, _ = parse_train_options(arguments)
    if config.accumulate_grad_batches > 1:
        raise UserError("--accumulate_grad_batches: a step is one micro batch here; leave it out")
    on_gpu = jax.default_backend() == "gpu"
    config = resolve_config(config, on_gpu, current_compute_capability() if on_gpu else None)
    model, mesh = config.model_config(), sharding.make_mesh(1)
    schedule = make_schedule(config, config.micro_bsz, config.my_exit_tokens)
    rate = learning_rate(config, model.n_embd, schedule.first_step, schedule.exit_step)
    optimizer = make_optimizer(config, rate)
    abstract = abstract_state(mesh, model, optimizer)
    tokens = gpu_inputs.tokens(config.micro_bsz, config.ctx_len, model.vocab_size)[None]
    where = sharding.batch_sharding(mesh)
    batch = jax.ShapeDtypeStruct(tokens.shape, jnp.int32, sharding=where)
    if sharding.STRATEGIES[config.strategy].offload:
        raise UserError(f"--strategy {config.strategy}: a step is one program here; give another")
    [program] = programs(build_step(config, model, mesh, optimizer), abstract, batch)
    lowered = program.function.lower(*program.arguments)
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    began = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - began
    from_disk = "/jax/compilation_cache/cache_hits" in events

    def make_state() -> TrainState:
        of_file, params = rwkv_jax.load_params(config.load_model)
        if of_file != model:
            raise UserError(f"{config.load_model}: is of another shape than the options'")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
        params = distributed.device_put_global(params, shardings)
        return TrainState(params, fresh_moments(optimizer, abstract))

    return Prepared(compiled, config, model, rate, make_state, tokens, where, compile_s, from_disk)


def measure(arguments: list[str], steps: int, compile_only: bool) -> dict[str, Any]:
    """The rest of a row: what `describe_run` cannot know before."""
    prepared = prepare(arguments)
    config, model = prepared.config, prepared.model
    device = jax.devices()[0]
    row: dict[str, Any] = {
        "precision": config.precision,
        "compile_s": prepared.compile_s,
        "from_disk": prepared.from_disk,
    }
    if compile_only:
        return row
    state, batch = prepared.make_state(), jax.device_put(prepared.batch, prepared.batch_sharding)

    def group(state: TrainState, count: int) -> tuple[TrainState, float, float]:
        began = time.perf_counter()
        for _ in range(count):
            state, metrics = prepared.run(state, batch)
        loss = float(metrics.loss)
        return state, (time.perf_counter() - began) / count, loss

    state, _, _ = group(state, max(1, steps // 3))  # memory is new, and the clocks are low
    seconds = []
    for _ in range(max(1, steps // GROUP)):
        state, took, loss = group(state, min(GROUP, steps))
        seconds.append(took)
    return row | {
        "steps": len(seconds) * min(GROUP, steps),
        **speed(config, model, device.device_kind, statistics.median(seconds)),
        "ms_range": [1e3 * min(seconds), 1e3 * max(seconds)],
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "batch_sha256": gpu_inputs.sha256(prepared.batch),
        "loss": loss,
    }


def speed(
    config: TrainConfig, model: ModelConfig, device_kind: str, seconds: float
) -> dict[str, float | None]:
    """Of steps of so many seconds; `mfu` is None for a device whose peak is not known."""
    tokens_per_s = config.micro_bsz * config.ctx_len / seconds
    peak = utilization.peak_flops(device_kind, config.precision)
    mfu = tokens_per_s * utilization.model_flops(model) / peak if peak else None
    return {"ms": 1e3 * seconds, "tokens_per_s": tokens_per_s, "mfu": mfu}


def in_this_process(pipe: Connection, arguments: list[str], *more: Any) -> None:
    """Sends the row of `measure`, with the device's name, or with what went wrong."""
    row: dict[str, Any] = {}
    try:
        prepare_jax(bool(parse_train_options(arguments)[0].deterministic))
        row["device_kind"] = jax.devices()[0].device_kind
        row |= measure(arguments, *more)
    except Exception as error:
        row["error"] = one_line(message_and_status(error)[0].removeprefix("error: "))
    pipe.send(row)


def in_its_own_process(*arguments: Any) -> dict[str, Any]:
    """A row of `in_this_process`, whatever becomes of it."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=in_this_process, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        return {"error": f"the process ended with status {process.exitcode}"}
    finally:
        process.join()


def describe_run(arguments: list[str]) -> dict[str, Any]:
    """What the options say of a row."""
    config, _ = parse_train_options(arguments)
    model = config.model_config()
    return {
        "size": config.size or f"L{model.n_layer}-D{model.n_embd}",
        "ctx_len": config.ctx_len,
        "micro_bsz": config.micro_bsz,
        "grad_cp": config.grad_cp,
    }


def run_the_command(arguments: list[str], steps: int, folder: Path) -> dict[str, Any]:
    """`python -m rwkv_jax.train` until it has done so many steps; the median of its own speed."""
    command = [sys.executable, "-m", "rwkv_jax.train", *arguments, "--proj_dir", str(folder)]
    command += [
        "--devices",
        "1",
        "--epoch_save",
        "0",
        "--save_every_minutes",
        "0",
        "--enable_progress_bar",
        "False",
    ]
    folder.mkdir()
    row = describe_run(arguments) | {"command": "python -m rwkv_jax.train"}
    began, first = time.monotonic(), None
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            done = 0
            while done < steps and process.poll() is None:
                time.sleep(0.1)
                if (folder / STEP_LOG).exists():
                    done = len((folder / STEP_LOG).read_bytes().splitlines()) - 1
                if done > 0 and first is None:
                    first = time.monotonic() - began
        finally:
            process.send_signal(signal.SIGKILL)  # it would save, else
            process.wait()
    if first is None or done < steps:
        said = (folder / "output").read_text("utf-8", "replace").strip().splitlines()
        return row | {"error": one_line(said[-1] if said else "it printed nothing")}
    log = read_step_log(folder / STEP_LOG)
    tokens_per_s = float(np.nanmedian(1e3 * log["kt/s"][steps // 3 :]))
    return row | {
        "steps": len(log["step"]),
        "seconds_to_first_step": first,
        "tokens_per_s": tokens_per_s,
        "ms": 1e3 * row["micro_bsz"] * row["ctx_len"] / tokens_per_s,
        "loss": float(log["loss"][-1]),
    }


def outcome(row: dict[str, Any]) -> str:
    what = f"micro_bsz {row['micro_bsz']} grad_cp {row['grad_cp']}"
    if "command" in row:
        what += ", the command"
    if "error" in row:
        return f"{what}: {row['error']}"
    if "ms" not in row:
        return f"{what}: compiled in {row['compile_s']:.1f} s"
    words = [f"{row['ms']:.2f} ms a step", f"{row['tokens_per_s']:,.0f} tokens/s"]
    if row.get("mfu"):
        words.append(f"MFU {row['mfu']:.1%}")
    if row.get("peak_bytes"):
        words.append(f"{row['peak_bytes'] / 2**30:.1f} GiB")
    return f"{what}: {', '.join(words)}"


def main() -> None:
    parser = command.record_parser(
        __doc__, "write the record (JSON) here, row by row", allow_abbrev=False
    )
    parser.add_argument(
        "--runs", nargs="+", default=["8/1"], metavar="B/G", help="micro_bsz/grad_cp (default 8/1)"
    )
    parser.add_argument("--steps", type=int, default=30, help="timed ones (default 30)")
    parser.add_argument("--command", action="store_true", help="run train itself as well")
    parser.add_argument("--compile_only", action="store_true", help="run nothing")
    options, arguments = parser.parse_known_args()
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}: give at least 1")
    arguments += ["--my_exit_tokens", str(EXIT_TOKENS)]
    runs = [options_for(arguments, run) for run in options.runs]
    config = parse_train_options(runs[0])[0]

    result = machine.record("train_step") | {"rows": []}
    if gpu := result["machine"].get("gpu"):  # known even if no row gets as far as its name
        result |= {"device_kind": gpu["name"], "on_gpu": True}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        weights: list[str] = []
        if not (config.load_model or options.compile_only):
            weights = ["--load_model", str(write_init(Path(folder, "rwkv-init.pth"), config))]

        def add(row: dict[str, Any]) -> None:
            print(outcome(row), flush=True)
            kind = row.pop("device_kind", None)
            if kind and kind != result.get("device_kind"):
                result.update(device_kind=kind, on_gpu=kind.lower() != "cpu")
                if kind == "cpu":
                    print("no GPU: a rehearsal on a CPU, whose times mean nothing", flush=True)
            if "command" in row:
                result["command"] = row
            else:
                result["rows"].append(row)
            if options.output:
                machine.write(options.output, result)

        def measured(run: list[str]) -> dict[str, Any]:
            row = in_its_own_process([*run, *weights], options.steps, options.compile_only)
            return describe_run(run) | row

        if options.compile_only:  # what is timed does not share the machine
            with ThreadPoolExecutor(len(runs)) as pool:
                for row in pool.map(measured, runs):
                    add(row)
        else:
            for number, run in enumerate(runs):
                add(measured(run))
                if options.command and not number:
                    add(run_the_command([*run, *weights], options.steps, Path(folder, "run")))
    if all("error" in row for row in result["rows"]):
        raise UserError("none of --runs could be timed")


if __name__ == "__main__":
    run_command(main)
