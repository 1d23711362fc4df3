"""`python -m rwkv_jax.train`: from text to rwkv-final.pth."""

import contextlib
import dataclasses
import datetime
import shlex
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from pallas_kernels.gpu_targets import current_compute_capability
from rwkv_jax.checkpoints import weights
from rwkv_jax.checkpoints.store import Checkpoints, MiniepochLoss, require_orbax
from rwkv_jax.config import AUTO, ModelConfig, TrainConfig, parse_train_options
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.diagnosis import rules
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.files import reporting_os_errors, written_whole
from rwkv_jax.model.rwkv7 import summary
from rwkv_jax.parallel import distributed, sharding
from rwkv_jax.planning import batch_size
from rwkv_jax.text.corpus import skipped_note
from rwkv_jax.text.dataset import Dataset, open_dataset
from rwkv_jax.text.loader import prefetch
from rwkv_jax.text.sampler import MINIEPOCH
from rwkv_jax.tracking.progress import print_line
from rwkv_jax.training import initial_weights, utilization
from rwkv_jax.training.build import RECOMPUTED, build_step, decide
from rwkv_jax.training.identity import identity
from rwkv_jax.training.initial_weights import prepare
from rwkv_jax.training.optimizer import at_step, learning_rate, make_optimizer
from rwkv_jax.training.report import PATIENCE, Report
from rwkv_jax.training.resume import Start, settle, start
from rwkv_jax.training.run_folder import FINAL, INIT, exported, lock, logged_tokens
from rwkv_jax.training.saver import Saver
from rwkv_jax.training.schedule import Schedule, make_schedule
from rwkv_jax.training.step import TrainState
from rwkv_jax.training.stopping import Stop

DEMO = Path(__file__).parents[1] / "data" / "demo.jsonl"


def train(config: TrainConfig) -> None:
    """Runs the training that the options describe, or resumes it where it stopped.

    Raises:
        UserError: the options cannot be satisfied.
    """
    began = time.monotonic()
    require_orbax()
    mesh = _choose_devices(config)
    if not config.data_file and not DEMO.is_file():
        raise UserError(
            "--data_file is needed: text (a .jsonl, a .txt …), or the prefix of a .bin and .idx"
        )
    config = dataclasses.replace(config, data_file=config.data_file or str(DEMO))
    on_gpu = mesh.devices.flat[0].platform != "cpu"
    config = decide(config, on_gpu, current_compute_capability() if on_gpu else None)
    folder = Path(config.proj_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--proj_dir {folder}: is a file, or in one; give a folder") from None
    except OSError as error:
        raise UserError(f"--proj_dir {folder}: {error.strerror}; give another folder") from None
    with lock(folder) if distributed.is_first() else contextlib.nullcontext():
        if config.train_stage == 1:
            if distributed.is_first():
                print(prepare(folder / INIT, config))
        else:
            _train(config, mesh, folder, began)


def _train(config: TrainConfig, mesh: jax.sharding.Mesh, folder: Path, began: float) -> None:
    def read_data(vocab_size: int) -> Dataset:
        source = config.data_file, config.ctx_len, config.magic_prime or None
        return open_dataset(*source, vocab_size, config.text_key, config.on_bad_line)

    vocab_size = config.vocab_size or ModelConfig.vocab_size
    data = read_data(vocab_size)
    if data.skipped and distributed.is_first():
        listed = folder / "skipped.tsv"
        with reporting_os_errors(listed, "write"), written_whole(listed) as temporary:
            shutil.copyfile(data.skipped, temporary)
        print(skipped_note(listed), file=sys.stderr)
    final = folder / FINAL
    with contextlib.closing(Checkpoints(folder / "checkpoints", config.keep_last)) as checkpoints:
        config = settle(config, checkpoints)
        if config.micro_bsz == AUTO:
            micro_bsz = _auto_batch(config, mesh, checkpoints)
            config = dataclasses.replace(config, micro_bsz=micro_bsz)
        batch = mesh.size * config.micro_bsz * config.accumulate_grad_batches
        schedule = make_schedule(config, batch, len(data.tokens))
        begin = start(
            config,
            mesh,
            lambda model: _optimizer(config, model, schedule)[1],
            schedule,
            checkpoints,
            identity(config, data, batch),
        )
        if begin.about.model.vocab_size != vocab_size:  # the file of the weights decides
            data = read_data(begin.about.model.vocab_size)
        _describe(config, mesh, data, schedule, begin)
        if begin.resumed:
            _note_exports_gone(config, schedule, begin.step)
        if distributed.from_first(final.exists()):
            if begin.step >= schedule.last_step:
                print(f"nothing left to do: all {schedule.last_step} steps are done, see {final}")
                return
            _check_longer(final, schedule)
        checkpoints.check_writable()
        stop = Stop(began + 60 * config.max_minutes if config.max_minutes else None)
        _loop(config, mesh, data, schedule, checkpoints, begin, stop)
    took = datetime.timedelta(seconds=round(time.monotonic() - began))
    print(
        f"wrote {final} after {took}\n"
        f"try it: python -m rwkv_jax.generate --load_model {shlex.quote(str(final))} "
        "--prompt $'User: 123+456=?\\n\\nAssistant:'"
    )


def _note_exports_gone(config: TrainConfig, schedule: Schedule, step: int) -> None:
    """The official scripts remove rwkv-*.pth to start over: that is not enough here."""
    folder = Path(config.proj_dir)
    due = config.epoch_save and schedule.miniepoch(step) > config.epoch_begin
    if (due or step >= schedule.last_step) and not exported(folder):
        if not (folder / FINAL).exists():
            print(
                f"note: no rwkv-{{n}}.pth or {FINAL} is left in {folder}, but its checkpoints are, "
                "and are resumed; to start over, give another --proj_dir, or move "
                f"{folder / 'checkpoints'} elsewhere"
            )


def _check_longer(final: Path, schedule: Schedule) -> None:
    """Refuses to replace the model of a longer run, whose newest checkpoints are gone.

    Raises:
        UserError: the folder's log has steps from after this run's last.
    """
    tokens, planned = logged_tokens(final.parent), schedule.last_step * schedule.tokens_per_step
    if tokens > planned * (1 + 1e-6):
        raise UserError(
            f"{final}: is of a run of {tokens:,.0f} tokens, more than these {planned:,}, and "
            "would be overwritten: move it, or give another --proj_dir"
        )


def _auto_batch(config: TrainConfig, mesh: jax.sharding.Mesh, checkpoints: Checkpoints) -> int:
    """`--micro_bsz auto`: what the run was trained with so far, else the largest that fits."""

    def claimed() -> int:
        for step in checkpoints.steps():
            with contextlib.suppress(UserError):
                samples = checkpoints.read_metadata(step).run.get("samples a step", 0)
                micro_bsz, rest = divmod(samples, mesh.size * config.accumulate_grad_batches)
                if micro_bsz and not rest:
                    return micro_bsz
        return 0

    known = distributed.from_first(claimed() if distributed.is_first() else 0)
    return known or batch_size.fitting_micro_bsz(config, initial_weights.model_of(config), mesh)


def _choose_devices(config: TrainConfig) -> jax.sharding.Mesh:
    if config.accelerator == "cpu":
        jax.config.update("jax_platforms", "cpu")
    mesh = sharding.make_mesh(config.devices, config.num_nodes, config.mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    if on_cpu and config.accelerator != "cpu":
        why = rules.why_no_gpu()
        if config.accelerator == "gpu":
            raise UserError(f"--accelerator gpu: {why or 'there is no NVIDIA driver here'}")
        if why:
            print(f"note: training on the CPU: {why}", file=sys.stderr)
    strategy = sharding.STRATEGIES.get(config.strategy)
    if mesh.size == 1 and strategy and not strategy.offload:
        print(
            f"note: --strategy {config.strategy} changes nothing on one device; where more are "
            "there, --devices takes them",
            file=sys.stderr,
        )
    return mesh


def _optimizer(
    config: TrainConfig, model: ModelConfig, schedule: Schedule
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    rate = learning_rate(config, model.n_embd, schedule.first_step, schedule.exit_step)
    return rate, make_optimizer(config, rate)


def _loop(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    data: Dataset,
    schedule: Schedule,
    checkpoints: Checkpoints,
    begin: Start,
    stop: Stop,
) -> None:
    """Steps until the schedule's end, with rwkv-final.pth written, or until `stop`.

    A step's loss is fetched while the next one runs, so that the device never waits for the host.
    Exports are written before the checkpoint of their step: whichever step a run resumes from,
    no file from before it is missing. But the first export waits for the first checkpoint, since
    weights without one are another trainer's, or a removed run's; a resumed run makes up for it.

    Raises:
        UserError: steps in a row were not finite, the data cannot be used, or the final model
            cannot be written. What was done before is saved.
    """
    folder, model, state = Path(config.proj_dir), begin.about.model, begin.state
    rate, optimizer = _optimizer(config, model, schedule)
    rates = np.asarray(rate(jnp.arange(schedule.last_step - schedule.first_step)))
    run_step = build_step(config, model, mesh, optimizer)

    def make_batch(step: int) -> jax.Array:
        A, W, B = config.accumulate_grad_batches, mesh.size, config.micro_bsz
        return distributed.make_batch(
            mesh,
            (A, W * B, config.ctx_len + 1),
            lambda number, rows: data.batch(step * A + number, W, B, rows),
        )

    def save(step: int, state: TrainState, loss: MiniepochLoss) -> None:
        report.flush()
        saver.save(step, state, dataclasses.replace(begin.about, loss=loss))

    any_process = distributed.make_any_process(mesh)
    peak = mesh.size * utilization.peak_flops(mesh.devices.flat[0].device_kind, config.precision)
    peak /= utilization.model_flops(model)
    written: dict[str, bool] = {}
    report = Report(config, schedule, data, rates, begin, peak)  # before `stop` takes Ctrl-C
    with stop, report:
        saver = Saver(checkpoints, config, report.say)
        report.callback(saver.finish)
        batches = prefetch(make_batch, begin.step, stalled=report.stalled)
        report.enter_context(contextlib.closing(batches))
        if begin.resumed and begin.step > schedule.first_step:  # a kill, or no room, prevented it
            for name in _exports(config, schedule, begin.step - 1):
                if not distributed.from_first((folder / name).exists()):
                    written[name] = report.try_export(folder / name, state.params)
        for step in range(begin.step, schedule.last_step):
            try:
                batch = next(batches)
            except UserError:
                if jax.process_count() == 1:  # the others are in the next step already
                    report.catch_up()
                    save(step, state, report.running)
                raise
            state, metrics = run_step(state, batch)
            report.add(step, metrics)
            if len(report.skipped) >= PATIENCE and metrics.skipped:
                first = report.skipped[0]  # since when nothing but the place in the schedule moved
                opt_state = at_step(state.opt_state, first - schedule.first_step)
                save(first, state._replace(opt_state=opt_state), report.before)
                saved = " and saved as before them" if saver.finish() else ""
                raise UserError(
                    f"no finite loss or gradient in {PATIENCE} steps from step {first} on "
                    f"({report.at(first)}): stopped{saved}; a lower --lr_init, "
                    "--precision fp32 or other data may help"
                )

            done, exports = step + 1, _exports(config, schedule, step)
            stopping, due = any_process((bool(stop), saver.overdue()), metrics.loss)
            if exports or stopping or due or saver.due(done):
                report.catch_up()
                keep = FINAL in exports or stopping or not report.skipped
                first = bool(exports) and not (begin.resumed or written)
                if keep and first:
                    save(done, state, report.running)
                    saver.finish()
                for name in exports:
                    written[name] = report.try_export(folder / name, state.params)
                if keep and not first:
                    save(done, state, report.running)
            if stopping and done < schedule.last_step:
                if saver.finish():
                    print_line(
                        f"stopped and saved at step {done}: the same command resumes from there"
                    )
                sys.exit(1)
    if not written.get(FINAL):  # failed, or got lost after all steps were done
        params = distributed.gather_to_first(state.params)
        if distributed.is_first():
            weights.save_pth(folder / FINAL, params)


def _exports(config: TrainConfig, schedule: Schedule, step: int) -> list[str]:
    """Names of the .pth files that hold the weights after this step."""
    names, miniepoch = [], schedule.miniepoch(step)
    if schedule.ends_miniepoch(step):
        is_last = schedule.miniepoch(step + 1) == schedule.miniepoch(schedule.last_step)
        every = config.epoch_save
        if is_last or (every and (miniepoch - config.epoch_begin) % every == 0):
            names.append(f"rwkv-{miniepoch}.pth")
    return names + ([FINAL] if step + 1 == schedule.last_step else [])


def _describe(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    data: Dataset,
    schedule: Schedule,
    begin: Start,
) -> None:
    device, model = mesh.devices.flat[0], begin.about.model
    init, final = config.learning_rates(model.n_embd)
    tokens = schedule.last_step * schedule.tokens_per_step
    offload = sharding.STRATEGIES[config.strategy].offload
    rows = {
        "model": summary(model),
        "start": begin.origin + (f", at step {begin.step}" if begin.step else ""),
        "device": f"{mesh.size} x {device.device_kind}, {config.precision}, "
        + RECOMPUTED[config.grad_cp]
        + (f", {config.strategy}" if mesh.size > 1 or offload else ""),
        "data": f"{data.name}: {len(data.tokens):,} tokens, magic_prime {data.magic_prime} "
        f"(samples of {data.ctx_len} in one pass)",
        "batch": f"{schedule.batch} samples = {mesh.size} devices x micro_bsz {config.micro_bsz} "
        f"x {config.accumulate_grad_batches}: {schedule.tokens_per_step:,} tokens a step",
        "steps": f"{schedule.last_step:,} ({tokens:,} tokens, "
        f"{tokens / (data.magic_prime * data.ctx_len):.3g} passes over the data), "
        f"a miniepoch every {MINIEPOCH / schedule.batch:,.0f}",
        "learning rate": f"{init:.3g} to {final:.3g}, "
        f"{max(config.warmup_steps, 0)} steps of warm-up",
        "output": f"{config.proj_dir}: rwkv-final.pth, train_log.txt, checkpoints/",
    }
    for name, value in rows.items():
        print(f"{name:>13}  {value}", flush=True)


def main() -> None:
    config, notes = parse_train_options(sys.argv[1:])
    for line in notes:
        print(f"note: {line}", file=sys.stderr)
    prepare_jax(deterministic=bool(config.deterministic))
    with distributed.process_group(config):
        train(config)


if __name__ == "__main__":
    run_command(main)
