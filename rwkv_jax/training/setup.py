"""Builds a `Run` from resolved options: data, output folder, schedule and start."""

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from rwkv_jax.checkpoints.store import Checkpoints
from rwkv_jax.config import AUTO, ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors, written_whole
from rwkv_jax.model.rwkv7 import summary
from rwkv_jax.parallel import distributed, sharding
from rwkv_jax.text.corpus import skipped_note
from rwkv_jax.text.dataset import Dataset, open_dataset
from rwkv_jax.text.sampler import MINIEPOCH
from rwkv_jax.training.build import RECOMPUTED
from rwkv_jax.training.identity import identity
from rwkv_jax.training.resume import resolve_folder, restore_or_initialize
from rwkv_jax.training.run import Run
from rwkv_jax.training.run_folder import FINAL, exported, logged_tokens
from rwkv_jax.training.schedule import make_schedule


def setup_run(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    fitting_micro_bsz: Callable[[TrainConfig], int],
) -> Run:
    """Reads the data and the output folder, and restores or initializes the state.

    Args:
        config: from `build.resolve_config`.
        checkpoints: those in the output folder.
        fitting_micro_bsz: finds micro_bsz for `--micro_bsz auto`, if no checkpoint has it.

    Raises:
        UserError: the options contradict the data or the output folder.
    """
    vocab_size = config.vocab_size or ModelConfig.vocab_size
    data = _open_data(config, vocab_size)
    _copy_skipped_lines(data, Path(config.proj_dir))
    config = resolve_folder(config, checkpoints)
    if config.micro_bsz == AUTO:
        micro_bsz = _saved_micro_bsz(config, mesh, checkpoints) or fitting_micro_bsz(config)
        config = dataclasses.replace(config, micro_bsz=micro_bsz)
    batch = mesh.size * config.micro_bsz * config.accumulate_grad_batches
    schedule = make_schedule(config, batch, len(data.tokens))
    run_identity = identity(config, data, batch)
    start = restore_or_initialize(config, mesh, schedule, checkpoints, run_identity)
    if start.metadata.model.vocab_size != vocab_size:  # the weights file decides
        data = _open_data(config, start.metadata.model.vocab_size)
    return Run(config, mesh, data, schedule, checkpoints, start)


def is_finished(run: Run) -> bool:
    """Whether the output folder has the final model of these steps.

    Raises:
        UserError: it has the final model of a longer run whose newest checkpoints are gone.
    """
    final = run.folder / FINAL
    if not distributed.from_first(final.exists()):
        return False
    if run.start.step >= run.schedule.last_step:
        return True
    tokens = logged_tokens(run.folder)
    planned = run.schedule.last_step * run.schedule.tokens_per_step
    if tokens > planned * (1 + 1e-6):
        raise UserError(
            f"{final}: is from a run of {tokens:,.0f} tokens, longer than the planned {planned:,}, "
            "and would be overwritten: move it, or give another --proj_dir"
        )
    return False


def describe(run: Run) -> None:
    """Prints a summary before the first step: one line each for model, data, batch …"""
    config, model, data, schedule = run.config, run.model, run.data, run.schedule
    init, final = config.learning_rates(model.n_embd)
    tokens = schedule.last_step * schedule.tokens_per_step
    offload = sharding.STRATEGIES[config.strategy].offload
    rows = {
        "model": summary(model),
        "start": run.start.origin + (f", at step {run.start.step}" if run.start.step else ""),
        "device": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}, {config.precision}, "
        + RECOMPUTED[config.grad_cp]
        + (f", {config.strategy}" if run.mesh.size > 1 or offload else ""),
        "data": f"{data.name}: {len(data.tokens):,} tokens, magic_prime {data.magic_prime} "
        f"(samples of {data.ctx_len} in one pass)",
        "batch": f"{schedule.batch} samples = {run.mesh.size} devices x micro_bsz "
        f"{config.micro_bsz} x {config.accumulate_grad_batches}: "
        f"{schedule.tokens_per_step:,} tokens per step",
        "steps": f"{schedule.last_step:,} ({tokens:,} tokens, "
        f"{tokens / (data.magic_prime * data.ctx_len):.3g} passes over the data), "
        f"a miniepoch every {MINIEPOCH / schedule.batch:,.0f}",
        "learning rate": f"{init:.3g} to {final:.3g}, "
        f"{max(config.warmup_steps, 0)} steps of warm-up",
        "output": f"{config.proj_dir}: rwkv-final.pth, train_log.txt, checkpoints/",
    }
    for name, value in rows.items():
        print(f"{name:>13}  {value}", flush=True)
    if run.start.resumed:
        _note_missing_exports(run)


def _note_missing_exports(run: Run) -> None:
    """Prints a note if the checkpoints of a run are resumed although all its .pth files are gone.

    The official scripts remove rwkv-*.pth to start over, which is not enough here.
    """
    config, schedule, step = run.config, run.schedule, run.start.step
    due = config.epoch_save and schedule.miniepoch(step) > config.epoch_begin
    if (due or step >= schedule.last_step) and not exported(run.folder):
        if not (run.folder / FINAL).exists():
            print(
                f"note: {run.folder} has no rwkv-{{n}}.pth or {FINAL}, but its checkpoints are "
                "resumed; to start over, give another --proj_dir, or move "
                f"{run.checkpoints.folder} elsewhere"
            )


def _open_data(config: TrainConfig, vocab_size: int) -> Dataset:
    source = config.data_file, config.ctx_len, config.magic_prime or None
    return open_dataset(*source, vocab_size, config.text_key, config.on_bad_line)


def _copy_skipped_lines(data: Dataset, folder: Path) -> None:
    if data.skipped and distributed.is_first():
        listed = folder / "skipped.tsv"
        with reporting_os_errors(listed, "write"), written_whole(listed) as temporary:
            shutil.copyfile(data.skipped, temporary)
        print(skipped_note(listed), file=sys.stderr)


def _saved_micro_bsz(config: TrainConfig, mesh: jax.sharding.Mesh, checkpoints: Checkpoints) -> int:
    """Returns the micro_bsz of the newest checkpoint whose batch suits these devices; 0: none."""

    def from_checkpoints() -> int:
        for step in checkpoints.steps():
            with contextlib.suppress(UserError):
                samples = checkpoints.read_metadata(step).run.get("samples a step", 0)
                micro_bsz, rest = divmod(samples, mesh.size * config.accumulate_grad_batches)
                if micro_bsz and not rest:
                    return micro_bsz
        return 0

    return distributed.from_first(from_checkpoints() if distributed.is_first() else 0)
