"""The weights that a run starts from: a file's, partly a file's, or fresh ones."""

import dataclasses
import secrets
from pathlib import Path
from typing import Any

import numpy as np

import rwkv_jax
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.model.initialisation import init_params, is_of_seed
from rwkv_jax.model.rwkv7 import Params, summary
from rwkv_jax.parallel import distributed


def initial_model(config: TrainConfig) -> ModelConfig:
    """Returns the model config of a run with these options; --load_model determines its shape.

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


def load(config: TrainConfig, source: Path) -> tuple[ModelConfig, Params]:
    """Loads a model and checks it against the options.

    Args:
        source: a .pth, the output folder of a run, or a checkpoint.

    Raises:
        UserError: the source cannot be read, or the options contradict its shape.
    """
    if config.load_partial:
        return _load_partial(config, source)
    model, params = rwkv_jax.load_params(source)
    check_shape(config, model, str(source))
    return model, params


def partial_model(config: TrainConfig, source: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the model config for `--load_partial 1`, and the tensors of the file.

    Sizes come from the file if it has them. The other sizes and the number of layers come from the
    options.
    """
    tensors = pth.read(source)
    try:
        tensors = weights.without_prefix(tensors)
        requested = config.model_config()
        n_layer = requested.n_layer if config.n_layer or config.size else 0
        return weights.infer_partial(tensors, requested, n_layer), tensors
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _load_partial(config: TrainConfig, source: Path) -> tuple[ModelConfig, Params]:
    """Loads the file's tensors and initializes those that it does not have."""
    model, loaded = partial_model(config, source)
    check_shape(config, model, str(source))
    seed = distributed.from_first(_seed(config))
    initial = weights.to_official(init_params(model, seed))
    merged = {name: np.asarray(tensor) for name, tensor in initial.items()}
    fresh = [name for name in merged if name not in loaded]
    if distributed.is_first():
        print(
            f"{len(merged) - len(fresh)} of {len(merged)} tensors are from {source}; fresh: "
            + (", ".join(fresh) or "none")
        )
    try:
        return weights.from_official({**merged, **loaded}, model)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def check_shape(config: TrainConfig, model: ModelConfig, source: str) -> None:
    """Refuses a model that contradicts the options. Unset options take the file's values.

    Raises:
        UserError: the options contradict the model; the message lists the differences.
    """
    head_size = config.head_size or model.head_size
    requested = dataclasses.replace(config, head_size=head_size).model_config()
    names = ["n_layer", "n_embd"] if config.size else []
    given = ("n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn")
    names += [name for name in given if getattr(config, name)]
    names += ["dim_w", "dim_a", "dim_v", "dim_g"] if config.lora_dims != "formula" else []
    wrong = [
        f"{name} {getattr(model, name)}, not {getattr(requested, name)}"
        for name in dict.fromkeys(names)
        if getattr(requested, name) != getattr(model, name)
    ]
    if wrong:
        fix = "leave the option out to use the file's value"
        if Path(config.proj_dir).absolute() in Path(source).absolute().parents:
            fix += ", or give another --proj_dir"
        raise UserError(f"{source}: has {', '.join(wrong)}; {fix}")


def prepare_init(path: Path, config: TrainConfig) -> str:
    """Writes rwkv-init.pth for --train_stage 1 if it does not exist; returns a message.

    Raises:
        UserError: the file exists and has other weights.
    """
    if not path.exists():
        return f"wrote {write_init(path, config)}"
    model, tensors = weights.open_pth(path)
    seed = config.random_seed
    same_shape = model == config.model_config()
    if same_shape and seed >= 0 and is_of_seed(np.asarray(tensors["emb.weight"]), seed):
        return f"{path} already exists, with the weights of --random_seed {seed}"
    raise UserError(
        f"{path}: exists, but is not what these options would write: leave out --train_stage 1 "
        "to train from it, or give another --proj_dir"
    )


def write_init(path: Path, config: TrainConfig) -> Path:
    """Initializes the weights, writes them to `path`, and returns `path`."""
    print(f"initialising {summary(config.model_config())} …", flush=True)
    weights.save_pth(path, init_params(config.model_config(), _seed(config)))
    return path


def _seed(config: TrainConfig) -> int:
    return secrets.randbits(31) if config.random_seed == -1 else config.random_seed
