"""Where a run begins: its newest good checkpoint, weights in a file, or a fresh initialisation."""

import contextlib
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from rwkv_jax.checkpoints import pth
from rwkv_jax.checkpoints.store import Checkpoints, Metadata, Unreadable
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors
from rwkv_jax.model.initialisation import is_of_seed
from rwkv_jax.parallel import distributed
from rwkv_jax.parallel.sharding import STRATEGIES
from rwkv_jax.training.identity import WEIGHTS, changes, resumed_weights
from rwkv_jax.training.initial_weights import check_shape, load, write_init
from rwkv_jax.training.optimizer import at_step
from rwkv_jax.training.run_folder import FINAL, INIT, export_path, exported, logged_tokens
from rwkv_jax.training.schedule import Schedule
from rwkv_jax.training.step import TrainState, abstract_state, fresh_moments

MakeOptimizer = Callable[[ModelConfig], optax.GradientTransformation]


class Start(NamedTuple):
    """The step to do next, the state before it, what they are, and where they come from."""

    step: int
    state: TrainState
    about: Metadata
    origin: str
    resumed: bool  # from a checkpoint


def settle(config: TrainConfig, checkpoints: Checkpoints) -> TrainConfig:
    """The options, with what the output folder decides: load_model, epoch_begin, warmup_steps −1.

    A folder with checkpoints is resumed, with the epoch_begin of its run. One that has none, but
    has weights rwkv-{n}.pth, is a run of the official trainer (or one whose checkpoints were
    removed): as there, in its train_stage 2 and 3, the largest n is loaded and miniepoch n + 1 is
    the next; the one before it, if the file is damaged. Else rwkv-init.pth is loaded, if it is
    there.

    Raises:
        UserError: the options would have such weights, or rwkv-final.pth, overwritten, or leave a
            gap after them; or they are all damaged.
    """
    steps = checkpoints.steps()
    for step in steps:
        with contextlib.suppress(UserError):  # `start` names what is damaged
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
            f"{final}: is there without a checkpoint, and would be overwritten: move it, or give "
            f"another --proj_dir (and --load_model {shlex.quote(str(final))} to train it further)"
        )
    numbers = exported(folder)
    if numbers and (config.load_model or config.train_stage == 0):
        if numbers[0] >= config.epoch_begin:
            option = "--load_model" if config.load_model else "--train_stage"
            raise UserError(
                f"{export_path(folder, numbers[0])}: is there without a checkpoint, and would be "
                f"overwritten: to continue from it leave {option} out; else give another --proj_dir"
            )
    elif numbers:
        return _continued(config, folder, numbers)
    if not config.load_model and (folder / INIT).exists():
        return dataclasses.replace(config, load_model=str(folder / INIT))
    return config


def _continued(config: TrainConfig, folder: Path, numbers: list[int]) -> TrainConfig:
    """The options with the newest of these weights that can be read, and the miniepoch after it."""
    damaged = []
    for number in [*numbers, -1] if (folder / INIT).exists() else numbers:
        path = export_path(folder, number)
        with reporting_os_errors(path, "read"):  # which does not mean that it is damaged
            path.open("rb").close()
        try:
            pth.read(path)
        except UserError as error:
            damaged.append(error)
            continue
        if config.epoch_begin not in (0, number + 1):
            raise UserError(
                f"{path}: is there without a checkpoint: training continues at miniepoch "
                f"{number + 1}, not at --epoch_begin {config.epoch_begin}; leave the option out, "
                "or give another --proj_dir"
            )
        for reason in damaged:
            print(f"warning: {reason}; taking {path.name}, at miniepoch {number + 1}", flush=True)
        warmup = 10 if config.warmup_steps < 0 and number >= 0 else config.warmup_steps
        return dataclasses.replace(
            config, load_model=str(path), epoch_begin=number + 1, warmup_steps=warmup
        )
    raise UserError(
        f"{damaged[0]}; no other weights are there: copy it again, or give another --proj_dir"
    )


def start(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    make_optimizer: MakeOptimizer,
    schedule: Schedule,
    checkpoints: Checkpoints,
    run: dict[str, Any],
) -> Start:
    """In this order: the newest good checkpoint of this run, the load_model of `settle`, neither.

    For the last, rwkv-init.pth is written first, so that a run always starts from weights that a
    file holds.

    Args:
        config: settled.
        schedule: whose first step is that of a run that has weights alone.
        run: `run.identity`, which a checkpoint's has to equal.

    Raises:
        UserError: what is there cannot be used, or is of another run.
    """

    def abstract(model: ModelConfig) -> TrainState:
        offload = STRATEGIES[config.strategy].offload
        return abstract_state(mesh, model, make_optimizer(model), offload)

    if distributed.from_first(bool(checkpoints.steps())):
        return _resume(config, abstract, schedule, checkpoints, run)
    init = Path(config.proj_dir) / INIT
    source = Path(config.load_model or init)
    with distributed.first_process_first():
        if not config.load_model:
            write_init(init, config)
    model, params = load(config, source)
    if source == init and config.random_seed > 0:
        if not is_of_seed(params["emb"]["weight"], config.random_seed):
            print(f"note: {source} is not of --random_seed {config.random_seed}: used as it is")
    of_model = abstract(model)
    where = jax.tree.map(lambda leaf: leaf.sharding, of_model.params)
    params = distributed.device_put_global(params, where)
    opt_state = fresh_moments(make_optimizer(model), of_model)
    origin = f"the weights of {source} and a fresh optimizer"
    if _is_numbered_of(config, source):
        origin = (
            f"continued from {source} at miniepoch {config.epoch_begin}, with the weights alone: "
            "the optimizer and the warm-up start anew"
        )
    return Start(
        schedule.first_step, TrainState(params, opt_state), Metadata(model, run=run), origin, False
    )


def _is_numbered_of(config: TrainConfig, source: Path) -> bool:
    return source == Path(config.proj_dir) / f"rwkv-{config.epoch_begin - 1}.pth"


def _resume(
    config: TrainConfig,
    abstract: Callable[[ModelConfig], TrainState],
    schedule: Schedule,
    checkpoints: Checkpoints,
    run: dict[str, Any],
) -> Start:
    # Every byte is compared by one process, not by each over the same network.
    saved, about = _newest_good(checkpoints) if distributed.is_first() else (0, None)
    saved = distributed.from_first(saved)
    about = about or checkpoints.read_metadata(saved)
    source = checkpoints.folder / str(saved)
    check_shape(config, about.model, str(source))
    another, changed = changes(about.run, run)
    if another and not config.resume_anyway:
        same = "the same data and options"
        if all(change.startswith(WEIGHTS) for change in another):
            same = "them, or without --load_model"
        raise UserError(
            f"{checkpoints.folder}: this run was begun with {', '.join(another)}; continue "
            f"with {same}, give another --proj_dir, or --resume_anyway 1"
        )
    then, now = about.run.get("precision"), run["precision"]
    if then != now and "fp16" in (then, now):
        raise UserError(
            f"{checkpoints.folder}: precision {then}, not {now}: "
            "fp16 keeps a loss scale in its checkpoints; continue in the same, or start over with "
            "--load_model"
        )
    if another or changed:
        batch = about.run.get("samples a step", 0)
        miniepoch = dataclasses.replace(schedule, batch=batch).miniepoch(saved)
        folder = Path(config.proj_dir)
        later = [export_path(folder, number) for number in exported(folder) if number >= miniepoch]
        tokens = saved * batch * about.run.get("ctx_len", 0)
        if not all(change.startswith("my_exit_tokens ") for change in another + changed):
            # Else it is a finished run that continues for longer.
            if (folder / FINAL).exists() and logged_tokens(folder) > tokens * (1 + 1e-6):
                later.append(folder / FINAL)
        if later:  # the newer checkpoints were damaged, or removed
            raise UserError(
                f"{later[0]}: is of a later step than {source}, and would be overwritten by a run "
                f"with {', '.join(another + changed)}: move it, or give another --proj_dir"
            )
        print(f"note: this run was trained so far with {', '.join(another + changed)}")
    tokens_per_step = [
        then.get("samples a step", 0) * then.get("ctx_len", 0) for then in (about.run, run)
    ]
    step = max(schedule.first_step, saved * tokens_per_step[0] // tokens_per_step[1])
    state = checkpoints.restore(saved, abstract(about.model))
    state = state._replace(opt_state=at_step(state.opt_state, step - schedule.first_step))
    about = dataclasses.replace(about, run={**run, WEIGHTS: resumed_weights(about.run, run)})
    if step != saved:  # steps have another size from here on: the old numbers mean nothing
        with distributed.first_process_first():
            if step in checkpoints.steps():
                checkpoints.set_aside(step)
        checkpoints.save(step, state, about)
        checkpoints.close()
        with distributed.first_process_first():
            for other in checkpoints.steps():
                if other != step:
                    checkpoints.set_aside(other)
    return Start(step, state, about, f"resumed from {source}", True)


def _newest_good(checkpoints: Checkpoints) -> tuple[int, Metadata]:
    """The newest checkpoint without damage; those with damage are named and set aside."""
    damaged: list[tuple[int, UserError]] = []
    for step in checkpoints.steps():
        try:
            about = checkpoints.verify(step)
        except Unreadable:
            raise
        except UserError as error:
            damaged.append((step, error))
            continue
        for number, reason in damaged:
            aside = checkpoints.set_aside(number)
            print(f"warning: {reason}; now {aside.name}, continuing from step {step}", flush=True)
        return step, about
    raise UserError(
        f"{damaged[0][1]}; no other checkpoint is whole: copy one there again, move "
        f"{checkpoints.folder} elsewhere to continue from the last rwkv-{{n}}.pth, or give another "
        "--proj_dir"
    )
