"""How a run starts: from its newest good checkpoint, weights in a file, or fresh weights."""

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rwkv_jax.checkpoints import pth
from rwkv_jax.checkpoints.store import Checkpoints, Metadata, Unreadable
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors
from rwkv_jax.model.initialisation import is_of_seed
from rwkv_jax.parallel import distributed
from rwkv_jax.parallel.sharding import STRATEGIES
from rwkv_jax.training.build import build_optimizer
from rwkv_jax.training.identity import WEIGHTS, changes, resumed_weights
from rwkv_jax.training.initial_weights import check_shape, load, write_init
from rwkv_jax.training.optimizer import with_updates
from rwkv_jax.training.run_folder import FINAL, INIT, export_path, exported, logged_tokens
from rwkv_jax.training.schedule import Schedule
from rwkv_jax.training.step import TrainState, abstract_state, fresh_moments


class Start(NamedTuple):
    """The start of a run."""

    step: int  # the next step
    state: TrainState  # before that step
    metadata: Metadata
    origin: str  # of the state, for a message
    resumed: bool  # whether from a checkpoint


def resolve_folder(config: TrainConfig, checkpoints: Checkpoints) -> TrainConfig:
    """Resolves options that depend on the folder: load_model, epoch_begin, warmup_steps −1.

    A folder with checkpoints is resumed, with the epoch_begin of its run. A folder with weights
    rwkv-{n}.pth but without checkpoints is a run of the official trainer, or a run whose
    checkpoints were removed. It continues as in the official train_stage 2 and 3: the largest n is
    loaded, or the previous n if the file is damaged, and the run continues at miniepoch n + 1. In
    any other folder rwkv-init.pth is loaded, if it exists.

    Raises:
        UserError: the options would overwrite these weights or rwkv-final.pth, or leave a gap after
            them; or all of them are damaged.
    """
    steps = checkpoints.steps()
    for step in steps:
        with contextlib.suppress(UserError):  # `restore_or_initialize` reports the damage
            run = checkpoints.read_metadata(step).run
            begin, warmup = config.epoch_begin, config.warmup_steps
            return dataclasses.replace(
                config,
                epoch_begin=begin or run.get("epoch_begin", begin),
                warmup_steps=run.get("warmup_steps", warmup) if warmup < 0 else warmup,
            )
    if steps:
        return config
    folder = Path(config.proj_dir)
    if (final := folder / FINAL).exists():
        raise UserError(
            f"{final}: exists without a checkpoint, and would be overwritten: move it, or give "
            f"another --proj_dir (and --load_model {shlex.quote(str(final))} to train it further)"
        )
    numbers = exported(folder)
    if numbers and (config.load_model or config.train_stage == 0):
        if numbers[0] >= config.epoch_begin:
            option = "--load_model" if config.load_model else "--train_stage"
            raise UserError(
                f"{export_path(folder, numbers[0])}: exists without a checkpoint, and would be "
                f"overwritten: to continue from it, leave out {option}; otherwise give another "
                "--proj_dir"
            )
    elif numbers:
        return _continue_exports(config, folder, numbers)
    if not config.load_model and (folder / INIT).exists():
        return dataclasses.replace(config, load_model=str(folder / INIT))
    return config


def _continue_exports(config: TrainConfig, folder: Path, numbers: list[int]) -> TrainConfig:
    """Resolves load_model to the newest readable weights, and epoch_begin to the next miniepoch."""
    damaged = []
    for number in [*numbers, -1] if (folder / INIT).exists() else numbers:
        path = export_path(folder, number)
        with reporting_os_errors(path, "read"):  # an error here does not mean damage
            path.open("rb").close()
        try:
            pth.read(path)
        except UserError as error:
            damaged.append(error)
            continue
        if config.epoch_begin not in (0, number + 1):
            raise UserError(
                f"{path}: exists without a checkpoint: training continues at miniepoch "
                f"{number + 1}, not at --epoch_begin {config.epoch_begin}; leave out the option, "
                "or give another --proj_dir"
            )
        for reason in damaged:
            print(f"warning: {reason}; using {path.name}, at miniepoch {number + 1}", flush=True)
        warmup = 10 if config.warmup_steps < 0 and number >= 0 else config.warmup_steps
        return dataclasses.replace(
            config, load_model=str(path), epoch_begin=number + 1, warmup_steps=warmup
        )
    raise UserError(
        f"{damaged[0]}; no other weights exist: copy it again, or give another --proj_dir"
    )


def restore_or_initialize(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    schedule: Schedule,
    checkpoints: Checkpoints,
    identity: dict[str, Any],
) -> Start:
    """Restores the newest good checkpoint; without one, loads or initializes the weights.

    New weights are written to rwkv-init.pth first, so that a run always starts from weights in a
    file.

    Args:
        config: from `resolve_folder`.
        schedule: its first step is where a run without a checkpoint starts.
        identity: from `identity.identity`; the checkpoint must have the same one.

    Raises:
        UserError: the contents of the folder cannot be used, or belong to another run.
    """
    if distributed.from_first(bool(checkpoints.steps())):
        return _restore(config, mesh, schedule, checkpoints, identity)
    init = Path(config.proj_dir) / INIT
    source = Path(config.load_model or init)
    with distributed.first_process_first():
        if not config.load_model:
            write_init(init, config)
    model, params = load(config, source)
    if source == init and config.random_seed > 0:
        if not is_of_seed(params["emb"]["weight"], config.random_seed):
            print(
                f"note: {source} does not match --random_seed {config.random_seed}; used as it is"
            )
    abstract = _abstract_state(config, model, mesh, schedule)
    params = distributed.device_put_global(
        params, jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    )
    opt_state = fresh_moments(build_optimizer(config, model, schedule)[1], abstract)
    origin = f"the weights of {source} and a fresh optimizer"
    if source == export_path(Path(config.proj_dir), config.epoch_begin - 1) != init:
        origin = (
            f"continued from {source} at miniepoch {config.epoch_begin} with weights only: "
            "the optimizer and the warm-up start over"
        )
    state, metadata = TrainState(params, opt_state), Metadata(model, run=identity)
    return Start(schedule.first_step, state, metadata, origin, resumed=False)


def _abstract_state(
    config: TrainConfig, model: ModelConfig, mesh: jax.sharding.Mesh, schedule: Schedule
) -> TrainState:
    optimizer = build_optimizer(config, model, schedule)[1]
    return abstract_state(mesh, model, optimizer, STRATEGIES[config.strategy].offload)


def _restore(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    schedule: Schedule,
    checkpoints: Checkpoints,
    identity: dict[str, Any],
) -> Start:
    # Only one process verifies the files: the others would read them over the same network.
    saved, metadata = _newest_good(checkpoints) if distributed.is_first() else (0, None)
    saved = distributed.from_first(saved)
    metadata = metadata or checkpoints.read_metadata(saved)
    source = checkpoints.folder / str(saved)
    check_shape(config, metadata.model, str(source))
    changed = _check_changes(config, metadata.run, identity, checkpoints.folder)
    if changed:
        _check_later_exports(config, schedule, metadata.run, changed, source)
        print(f"note: until now this run was trained with {', '.join(changed)}")
    saved_tokens, tokens = (
        run.get("samples a step", 0) * run.get("ctx_len", 0) for run in (metadata.run, identity)
    )
    step = max(schedule.first_step, saved * saved_tokens // tokens)
    state = checkpoints.restore(saved, _abstract_state(config, metadata.model, mesh, schedule))
    opt_state = with_updates(state.opt_state, step - schedule.first_step)
    state = state._replace(opt_state=opt_state)
    run = {**identity, WEIGHTS: resumed_weights(metadata.run, identity)}
    metadata = dataclasses.replace(metadata, run=run)
    if step != saved:
        _renumber(checkpoints, step, state, metadata)
    return Start(step, state, metadata, f"resumed from {source}", resumed=True)


def _check_changes(
    config: TrainConfig, saved: dict[str, Any], current: dict[str, Any], folder: Path
) -> list[str]:
    """Returns the changes since the checkpoint was written, as "name old, not new".

    Args:
        saved: the identity in the checkpoint.
        current: the identity from the options.

    Raises:
        UserError: the changes make it another run.
    """
    another, changed = changes(saved, current)
    if another and not config.resume_anyway:
        same = "the same data and options"
        if all(change.startswith(WEIGHTS) for change in another):
            same = "them, or without --load_model"
        raise UserError(
            f"{folder}: this run was started with {', '.join(another)}; resume "
            f"with {same}, give another --proj_dir, or --resume_anyway 1"
        )
    precisions = saved.get("precision"), current["precision"]
    if precisions[0] != precisions[1] and "fp16" in precisions:
        raise UserError(
            f"{folder}: precision {precisions[0]}, not {precisions[1]}: "
            "fp16 checkpoints contain a loss scale; resume with the same precision, or start over "
            "with --load_model"
        )
    return another + changed


def _check_later_exports(
    config: TrainConfig,
    schedule: Schedule,
    saved: dict[str, Any],
    changed: list[str],
    source: Path,
) -> None:
    """Refuses to overwrite .pth files of later steps whose checkpoints were damaged or removed.

    Args:
        saved: the identity in the checkpoint.
        source: the checkpoint that is restored.

    Raises:
        UserError: such files exist.
    """
    step, batch = int(source.name), saved.get("samples a step", 0)
    miniepoch = dataclasses.replace(schedule, batch=batch).miniepoch(step)
    folder = Path(config.proj_dir)
    later = [export_path(folder, number) for number in exported(folder) if number >= miniepoch]
    tokens = step * batch * saved.get("ctx_len", 0)
    # If only my_exit_tokens changed, a finished run is extended.
    if not all(change.startswith("my_exit_tokens ") for change in changed):
        if (folder / FINAL).exists() and logged_tokens(folder) > tokens * (1 + 1e-6):
            later.append(folder / FINAL)
    if later:
        raise UserError(
            f"{later[0]}: is from a later step than {source}, and would be overwritten by a run "
            f"with {', '.join(changed)}: move it, or give another --proj_dir"
        )


def _renumber(checkpoints: Checkpoints, step: int, state: TrainState, metadata: Metadata) -> None:
    """Saves the state under another step number, and renames the other checkpoints.

    Steps have another size from here on, so the old step numbers are invalid.
    """
    with distributed.first_process_first():
        if step in checkpoints.steps():
            checkpoints.set_aside(step)
    checkpoints.save(step, state, metadata)
    checkpoints.close()
    with distributed.first_process_first():
        for other in checkpoints.steps():
            if other != step:
                checkpoints.set_aside(other)


def _newest_good(checkpoints: Checkpoints) -> tuple[int, Metadata]:
    """Returns the newest good checkpoint; reports and renames newer, damaged ones."""
    damaged: list[tuple[int, UserError]] = []
    for step in checkpoints.steps():
        try:
            metadata = checkpoints.verify(step)
        except Unreadable:
            raise
        except UserError as error:
            damaged.append((step, error))
            continue
        for number, reason in damaged:
            aside = checkpoints.set_aside(number)
            print(
                f"warning: {reason}; renamed to {aside.name}, continuing from step {step}",
                flush=True,
            )
        return step, metadata
    raise UserError(
        f"{damaged[0][1]}; no other checkpoint is intact: copy one there, move "
        f"{checkpoints.folder} elsewhere to continue from the last rwkv-{{n}}.pth, or give another "
        "--proj_dir"
    )
