"""Where a run begins: its newest good checkpoint, --load_model, or a fresh initialisation."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import rwkv_jax
from rwkv_jax import distributed, pth, weights
from rwkv_jax.checkpoint import About, Checkpoints, Unreadable
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.initialisation import init_params, is_of_seed
from rwkv_jax.model import Params
from rwkv_jax.optimizer import at_step
from rwkv_jax.run import changes
from rwkv_jax.sharding import STRATEGIES
from rwkv_jax.step import TrainState, abstract_state, fresh_moments

MakeOptimizer = Callable[[ModelConfig], optax.GradientTransformation]


class Start(NamedTuple):
    """The step to do next, the state before it, what they are, and where they come from."""

    step: int
    state: TrainState
    about: About
    origin: str


def start(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    make_optimizer: MakeOptimizer,
    first_step: int,
    checkpoints: Checkpoints,
    run: dict[str, Any],
) -> Start:
    """In this order: the newest good checkpoint of this run, --load_model, rwkv-init.pth.

    The last is written first if it is not there, so that a run always starts from weights that a
    file holds.

    Args:
        first_step: of a run that has weights alone.
        run: `run.identity`, which a checkpoint's has to equal.

    Raises:
        UserError: what is there cannot be used, or is of another run.
    """
    if checkpoints.steps():
        return _resume(config, mesh, make_optimizer, first_step, checkpoints, run)
    if config.load_model:
        source = Path(config.load_model)
        model, params = _load_partial(config) if config.load_partial else _load(config)
    else:
        source = Path(config.proj_dir) / "rwkv-init.pth"
        with distributed.first_ahead():
            if not source.exists():
                write_init(source, config)
        model, params = weights.load_pth(source, config.model_config())
        if config.random_seed and not is_of_seed(params["emb"]["weight"], config.random_seed):
            raise UserError(
                f"{source}: is not of --random_seed {config.random_seed}; remove it, leave the "
                "option out, or give another --proj_dir"
            )
    optimizer = make_optimizer(model)
    abstract = abstract_state(mesh, model, optimizer, STRATEGIES[config.strategy].offload)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    params, opt_state = distributed.place(params, where), fresh_moments(optimizer, abstract)
    origin = f"the weights of {source} and a fresh optimizer"
    return Start(first_step, TrainState(params, opt_state), About(model, run=run), origin)


def _resume(
    config: TrainConfig,
    mesh: jax.sharding.Mesh,
    make_optimizer: MakeOptimizer,
    first_step: int,
    checkpoints: Checkpoints,
    run: dict[str, Any],
) -> Start:
    with distributed.first_ahead():
        saved, about = _newest_good(checkpoints)
    source = checkpoints.folder / str(saved)
    check_shape(config, about.model, str(source))
    another, changed = changes(about.run, run)
    if another and not config.resume_anyway:
        raise UserError(
            f"{checkpoints.folder}: this run was begun with {', '.join(another)}; go on with the "
            "same data and options, give another --proj_dir, or --resume_anyway 1"
        )
    then, now = about.run.get("precision"), run["precision"]
    if then != now and "fp16" in (then, now):
        raise UserError(
            f"{checkpoints.folder}: precision {then}, not {now}: "
            "fp16 keeps a loss scale in its checkpoints; go on in the same, or begin anew with "
            "--load_model"
        )
    if another or changed:
        print(f"note: this run went on so far with {', '.join(another + changed)}")
    tokens_per_step = [
        then.get("samples a step", 0) * then.get("ctx_len", 0) for then in (about.run, run)
    ]
    step = max(first_step, saved * tokens_per_step[0] // tokens_per_step[1])
    offload = STRATEGIES[config.strategy].offload
    abstract = abstract_state(mesh, about.model, make_optimizer(about.model), offload)
    state = checkpoints.restore(saved, abstract)
    state = state._replace(opt_state=at_step(state.opt_state, step - first_step))
    run = {**run, "load_model": run["load_model"] or about.run.get("load_model", "")}
    about = dataclasses.replace(about, run=run)
    if step != saved:  # steps have another size from here on: the old numbers mean nothing
        with distributed.first_ahead():
            if step in checkpoints.steps():
                checkpoints.set_aside(step)
        checkpoints.save(step, state, about)
        checkpoints.close()
        with distributed.first_ahead():
            for other in checkpoints.steps():
                if other != step:
                    checkpoints.set_aside(other)
    return Start(step, state, about, f"resumed from {source}")


def _newest_good(checkpoints: Checkpoints) -> tuple[int, About]:
    """The newest checkpoint without damage; those with damage are named and set aside."""
    damaged: list[tuple[int, UserError]] = []
    for step in checkpoints.steps():
        try:
            about = checkpoints.about(step)
        except Unreadable:
            raise
        except UserError as error:
            damaged.append((step, error))
            continue
        for number, reason in damaged:
            aside = checkpoints.set_aside(number)
            print(f"warning: {reason}; now {aside.name}, going on from step {step}", flush=True)
        return step, about
    raise UserError(
        f"{damaged[0][1]}; no other checkpoint is whole: to begin anew, remove {checkpoints.folder}"
    )


def _load(config: TrainConfig) -> tuple[ModelConfig, Params]:
    model, params = rwkv_jax.load_params(config.load_model)
    check_shape(config, model, config.load_model)
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
            f"{config.load_model}: no tensor fits {brief(model)}; is it another model's?"
        )
    print(f"{len(taken)} of {len(merged)} tensors are from {config.load_model}, the rest is fresh")
    return weights.from_official({**merged, **{name: there[name] for name in taken}}, model)


def check_shape(config: TrainConfig, model: ModelConfig, source: str) -> None:
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


def write_init(path: Path, config: TrainConfig) -> Path:
    print(f"initialising {brief(config.model_config())} …", flush=True)
    weights.save_pth(path, init_params(config.model_config(), config.random_seed))
    return path


def brief(model: ModelConfig) -> str:
    count = sum(math.prod(shape) for shape in weights.official_shapes(model).values())
    low_rank = "/".join(str(getattr(model, f"dim_{name}")) for name in "wavg")
    return (
        f"RWKV-7, {model.n_layer} layers of width {model.n_embd}, {count / 1e6:,.1f} M parameters "
        f"(vocabulary {model.vocab_size}, head size {model.head_size}, low-rank {low_rank})"
    )
