"""`python -m rwkv_jax.train`: from text to rwkv-final.pth."""

import contextlib
import dataclasses
import datetime
import functools
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv_jax
from rwkv_jax import pth, sharding, weights
from rwkv_jax.build import build_step, decide
from rwkv_jax.checkpoint import Checkpoints
from rwkv_jax.config import ModelConfig, TrainConfig, parse_train_options
from rwkv_jax.dataset import MINIEPOCH, Dataset, open_dataset, prefetch
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.initialisation import init_params
from rwkv_jax.metrics import MiniepochLoss, ProgressLine, append_train_log
from rwkv_jax.model import Params
from rwkv_jax.optimizer import learning_rate, make_optimizer
from rwkv_jax.step import Metrics, TrainState, abstract_state
from rwkv_jax.tracking import open_trackers

DEMO = Path(__file__).parents[1] / "data" / "demo.jsonl"
PATIENCE = 8  # steps in a row without a finite loss and gradient, then the run stops


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The arithmetic of a run: what a step is, and how many there are.

    A step takes `batch` = devices · micro_bsz · accumulate_grad_batches samples of ctx_len tokens.
    """

    batch: int
    ctx_len: int
    first_step: int  # where a run begins that has weights alone (--epoch_begin)
    exit_step: float  # my_exit_tokens in steps, not rounded: the end of the learning rate's decay
    last_step: int  # the run is over when so many steps are done

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.ctx_len

    def miniepoch(self, step: int) -> int:
        """The miniepoch in which the first sample of a step lies."""
        return step * self.batch // MINIEPOCH

    def ends_miniepoch(self, step: int) -> bool:
        return self.miniepoch(step + 1) > self.miniepoch(step)


def make_schedule(config: TrainConfig, batch: int, data_tokens: int) -> Schedule:
    """The schedule of these options for steps of `batch` samples.

    Raises:
        UserError: no step is left to do.
    """
    exit_step = (config.my_exit_tokens or data_tokens) / (batch * config.ctx_len)
    first, last = config.epoch_begin * MINIEPOCH // batch, math.ceil(exit_step)
    if config.epoch_count:
        last = min(last, (config.epoch_begin + config.epoch_count) * MINIEPOCH // batch)
    if first >= last:
        raise UserError(
            f"--epoch_begin {config.epoch_begin} is step {first}, but the run ends at step {last}: "
            "give a smaller one, or a larger --my_exit_tokens"
        )
    return Schedule(batch, config.ctx_len, first, exit_step, last)


def train(config: TrainConfig) -> None:
    """Runs the training that the options describe, or goes on with it where it stopped.

    Raises:
        UserError: the options cannot be satisfied.
    """
    began = time.monotonic()
    mesh = _choose_devices(config)
    if not config.data_file and not DEMO.is_file():
        raise UserError("--data_file is needed: a .jsonl, or the prefix of a .bin and .idx")
    config = dataclasses.replace(config, data_file=config.data_file or str(DEMO))
    config = decide(config, on_gpu=mesh.devices.flat[0].platform != "cpu")
    folder = Path(config.proj_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--proj_dir {folder}: {error.strerror}; give another folder") from None
    final = folder / "rwkv-final.pth"

    if config.train_stage == 1:
        print(f"wrote {_write_init(folder / 'rwkv-init.pth', config)}")
        return

    source = config.data_file, config.ctx_len, config.magic_prime or None
    data = open_dataset(*source, config.vocab_size)
    batch = mesh.size * config.micro_bsz * config.accumulate_grad_batches
    schedule = make_schedule(config, batch, len(data.tokens))
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        order = {
            "samples a step": batch,
            "ctx_len": config.ctx_len,
            "magic_prime": data.magic_prime,
            "epoch_begin": config.epoch_begin,
        }
        model, step, state, running, origin = _start(config, mesh, schedule, checkpoints, order)
        if model.vocab_size != config.vocab_size:  # the file of the weights decides
            data = open_dataset(*source, model.vocab_size)
        _describe(config, model, mesh, data, schedule, step, origin)
        if step >= schedule.last_step and final.exists():
            print(f"nothing left to do: all {schedule.last_step} steps are done, see {final}")
            return
        save = functools.partial(checkpoints.save, order=order)
        state, done = _loop(config, model, mesh, data, schedule, save, step, state, running)
    if done < schedule.last_step:
        print(f"stopped and saved at step {done}: the same command goes on from there")
        sys.exit(1)
    weights.save_pth(final, state.params)
    took = datetime.timedelta(seconds=round(time.monotonic() - began))
    print(
        f"wrote {final} after {took}\n"
        f"try it: python -m rwkv_jax.generate --load_model {final} "
        "--prompt $'User: 123+456=?\\n\\nAssistant:'"
    )


def _choose_devices(config: TrainConfig) -> jax.sharding.Mesh:
    if config.accelerator == "cpu":
        jax.config.update("jax_platforms", "cpu")
    mesh = sharding.make_mesh(config.devices)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if on_cpu and config.accelerator != "cpu" and shutil.which("nvidia-smi"):
        print(
            "note: this machine has an NVIDIA driver, but jax has no CUDA: training on the CPU. "
            "installing the extra cuda12 (or cuda13) changes that",
            file=sys.stderr,
        )
    if on_cpu and config.accelerator == "gpu":
        raise UserError("--accelerator gpu: jax sees no GPU; install the cuda12 or cuda13 extra")
    return mesh


def _start(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    schedule: Schedule,
    checkpoints: Checkpoints,
    order: dict[str, int],
) -> tuple[ModelConfig, int, TrainState, MiniepochLoss, str]:
    """The model, the step to do next, the state before it, the miniepoch's loss, and whence.

    In this order: the newest checkpoint of this run, --load_model, rwkv-init.pth (written first if
    it is not there, so that a run always starts from weights that a file holds).
    """
    newest = checkpoints.latest()
    if newest is not None:
        model = checkpoints.model_config(newest)
        _check_shape(config, model, str(checkpoints.folder))
        then = checkpoints.order(newest)
        changed = [
            f"{name} {then[name]}, not {order[name]}" for name in then if then[name] != order[name]
        ]
        if changed:
            raise UserError(
                f"{checkpoints.folder}: this run was begun with {', '.join(changed)}; go on with "
                "the same data and options, or give another --proj_dir"
            )
        if config.load_model:
            print(f"note: {checkpoints.folder} goes on; --load_model is for a new --proj_dir")
        _, optimizer = _optimizer(config, model, schedule)
        state, running = checkpoints.restore(newest, abstract_state(mesh, model, optimizer))
        origin = f"resumed from {checkpoints.folder / str(newest)}"
        return model, newest, state, running, origin

    if config.load_model:
        source = Path(config.load_model)
        model, params = _load_partial(config) if config.load_partial else _load(config)
    else:
        source = Path(config.proj_dir) / "rwkv-init.pth"
        if not source.exists():
            _write_init(source, config)
        model, params = weights.load_pth(source, config.model_config())
    _, optimizer = _optimizer(config, model, schedule)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(mesh, model, optimizer))
    params = jax.device_put(params, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    origin = f"weights of {source}, fresh optimizer"
    return model, schedule.first_step, TrainState(params, opt_state), MiniepochLoss(), origin


def _load(config: TrainConfig) -> tuple[ModelConfig, Params]:
    model, params = rwkv_jax.load_params(config.load_model)
    _check_shape(config, model, config.load_model)
    return model, params


def _load_partial(config: TrainConfig) -> tuple[ModelConfig, Params]:
    """Tensors of the file where it has them in the right shape, fresh ones elsewhere."""
    model = config.model_config()
    there = {
        name.removeprefix("_forward_module."): tensor
        for name, tensor in pth.read(config.load_model).items()
    }
    fresh = weights.to_official(init_params(model, config.random_seed))
    merged = {name: np.asarray(tensor) for name, tensor in fresh.items()}
    taken = [
        name
        for name, tensor in merged.items()
        if name in there and np.squeeze(there[name]).shape == np.squeeze(tensor).shape
    ]
    if not taken:
        raise UserError(
            f"{config.load_model}: no tensor fits {_brief(model)}; is it another model's?"
        )
    print(f"{len(taken)} of {len(merged)} tensors are from {config.load_model}, the rest is fresh")
    return weights.from_official({**merged, **{name: there[name] for name in taken}}, model)


def _check_shape(config: TrainConfig, model: ModelConfig, source: str) -> None:
    """Refuses a model that the options contradict; what they leave open, the file decides."""
    asked = config.model_config()
    names = ["n_layer", "n_embd"] if config.size else []
    names += [name for name in ("n_layer", "n_embd", "dim_ffn") if getattr(config, name)]
    names += ["dim_w", "dim_a", "dim_v", "dim_g"] if config.lora_dims != "formula" else []
    wrong = [
        f"{name} {getattr(model, name)}, not {getattr(asked, name)}"
        for name in dict.fromkeys(names)
        if getattr(asked, name) != getattr(model, name)
    ]
    if wrong:
        raise UserError(
            f"{source}: has {', '.join(wrong)}; leave the option out to take the file's"
        )


def _write_init(path: Path, config: TrainConfig) -> Path:
    print(f"initialising {_brief(config.model_config())} …", flush=True)
    weights.save_pth(path, init_params(config.model_config(), config.random_seed))
    return path


def _optimizer(
    config: TrainConfig, model: ModelConfig, schedule: Schedule
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    rate = learning_rate(config, model.n_embd, schedule.first_step, schedule.exit_step)
    return rate, make_optimizer(config, rate)


def _loop(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    data: Dataset,
    schedule: Schedule,
    save: Callable[[int, ModelConfig, TrainState, MiniepochLoss], None],
    first: int,
    state: TrainState,
    running: MiniepochLoss,
) -> tuple[TrainState, int]:
    """Steps until the schedule's end or a signal; returns the state and the steps that are done.

    A step's loss is fetched while the next one runs, so that the device never waits for the host.
    """
    folder = Path(config.proj_dir)
    rate, optimizer = _optimizer(config, model, schedule)
    rates = np.asarray(rate(jnp.arange(schedule.last_step - schedule.first_step)))
    run_step = build_step(config, model, mesh, optimizer)
    skipped: list[int] = []  # the last steps, in a row, that were not finite
    bar = {"auto": None, "True": True, "False": False}[config.enable_progress_bar]

    def make_batch(step: int) -> jax.Array:
        A = config.accumulate_grad_batches
        micro = [data.batch(step * A + a, mesh.size, config.micro_bsz) for a in range(A)]
        return jax.device_put(np.stack(micro), sharding.batch_sharding(mesh))

    def report(step: int, metrics: Metrics) -> None:
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        lr = float(rates[step - schedule.first_step])
        if metrics.skipped:
            skipped.append(step)
            progress.say(f"step {step}: loss {loss}, gradient norm {norm}: left out")
            if len(skipped) == PATIENCE:
                first = data.offsets(np.arange(schedule.batch) + 1 + skipped[0] * schedule.batch)
                raise UserError(
                    f"no finite loss or gradient in {PATIENCE} steps from step {skipped[0]} on, "
                    f"which has the samples at the tokens {', '.join(map(str, first))}: stopped; "
                    "the last checkpoint is from before. A lower --lr_init, or --precision fp32, "
                    "may help"
                )
        else:
            skipped.clear()
            running.add(loss)
        speed = progress.show(step, loss, running.mean, lr, norm)
        values = {
            "loss": loss,
            "lr": lr,
            "wd": config.weight_decay,
            "Gtokens": (step + 1) * schedule.tokens_per_step / 1e9,
            "kt/s": speed / 1000,
            "grad_norm": norm,
        }
        for tracker in trackers:
            tracker.log(step, values)
        if schedule.ends_miniepoch(step) or step + 1 == schedule.last_step:
            miniepoch = schedule.miniepoch(step)
            append_train_log(folder, miniepoch, running.mean, lr, miniepoch - config.epoch_begin)
            running.reset()

    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(prefetch(make_batch, first)))
        trackers = [
            stack.enter_context(contextlib.closing(tracker))
            for tracker in open_trackers(config, folder)
        ]
        stop = stack.enter_context(_stop_signal())
        progress = ProgressLine(first, schedule.last_step, schedule.tokens_per_step, bar)
        stack.enter_context(contextlib.closing(progress))
        pending: tuple[int, Metrics] | None = None
        for step in range(first, schedule.last_step):
            state, metrics = run_step(state, next(batches))
            if pending:
                report(*pending)
            pending = step, metrics

            done, miniepoch, stopping = step + 1, schedule.miniepoch(step), bool(stop)
            export = (
                config.epoch_save
                and schedule.ends_miniepoch(step)
                and (miniepoch - config.epoch_begin) % config.epoch_save == 0
            )
            on_schedule = config.save_every_steps and done % config.save_every_steps == 0
            if export or on_schedule or done == schedule.last_step or stopping:
                report(step, metrics)
                pending = None
                save(done, model, state, running)
            if export:
                path = folder / f"rwkv-{miniepoch}.pth"
                weights.save_pth(path, state.params)
                progress.say(f"wrote {path}")
            if stopping:
                return state, done
    return state, schedule.last_step


@contextlib.contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM puts its number in; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(
    config: TrainConfig,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
    data: Dataset,
    schedule: Schedule,
    step: int,
    origin: str,
) -> None:
    device = mesh.devices.flat[0]
    init = config.lr_init or 0.45 / model.n_embd
    final = config.lr_final or 0.04 / model.n_embd
    remat = "blocks recomputed in the backward pass" if config.grad_cp else "no recomputation"
    tokens = schedule.last_step * schedule.tokens_per_step
    rows = {
        "model": _brief(model),
        "start": origin + (f", at step {step}" if step else ""),
        "device": f"{mesh.size} x {device.device_kind}, {config.precision}, {remat}"
        + (f", {config.strategy}" if mesh.size > 1 else ""),
        "data": f"{data.name}: {len(data.tokens):,} tokens, magic_prime {data.magic_prime} "
        f"(samples of {data.ctx_len} in one pass)",
        "batch": f"{schedule.batch} samples = {mesh.size} devices x micro_bsz {config.micro_bsz} "
        f"x {config.accumulate_grad_batches}: {schedule.tokens_per_step:,} tokens a step",
        "steps": f"{schedule.last_step:,} ({tokens:,} tokens, "
        f"{tokens / len(data.tokens):.3g} passes over the data), "
        f"a miniepoch every {MINIEPOCH / schedule.batch:,.0f}",
        "learning rate": f"{init:.3g} to {final:.3g}, {config.warmup_steps} steps of warm-up",
        "output": f"{config.proj_dir}: rwkv-final.pth, train_log.txt, checkpoints/",
    }
    for name, value in rows.items():
        print(f"{name:>13}  {value}", flush=True)


def _brief(model: ModelConfig) -> str:
    count = sum(math.prod(shape) for shape in weights.official_shapes(model).values())
    low_rank = "/".join(str(getattr(model, f"dim_{name}")) for name in "wavg")
    return (
        f"RWKV-7, {model.n_layer} layers of width {model.n_embd}, {count / 1e6:,.1f} M parameters "
        f"(vocabulary {model.vocab_size}, head size {model.head_size}, low-rank {low_rank})"
    )


def main() -> None:
    config, ignored = parse_train_options(sys.argv[1:])
    for line in ignored:
        print(f"note: {line}", file=sys.stderr)
    train(config)


if __name__ == "__main__":
    run_command(main)
