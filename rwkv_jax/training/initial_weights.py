"""The weights that a run begins with: a file's, a part of a file's, or fresh ones."""

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


def load(config: TrainConfig, source: Path) -> tuple[ModelConfig, Params]:
    """The model in a .pth, the output folder of a run or a checkpoint, held to the options.

    Raises:
        UserError: it cannot be read, or the options contradict its shape.
    """
    if config.load_partial:
        return _load_partial(config, source)
    model, params = rwkv_jax.load_params(source)
    check_shape(config, model, str(source))
    return model, params


def partial_model(config: TrainConfig, source: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The shape that `--load_partial 1` gives a model, and the tensors of the file.

    What the file has decides; the options decide about the number of layers, and the rest.
    """
    tensors = pth.read(source)
    try:
        tensors = weights.without_prefix(tensors)
        asked = config.model_config()
        n_layer = asked.n_layer if config.n_layer or config.size else 0
        return weights.infer_partial(tensors, asked, n_layer), tensors
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _load_partial(config: TrainConfig, source: Path) -> tuple[ModelConfig, Params]:
    """The file's tensors, and fresh ones where it has none."""
    model, there = partial_model(config, source)
    check_shape(config, model, str(source))
    seed = distributed.from_first(_seed(config))
    initial = weights.to_official(init_params(model, seed))
    merged = {name: np.asarray(tensor) for name, tensor in initial.items()}
    fresh = [name for name in merged if name not in there]
    if distributed.is_first():
        print(
            f"{len(merged) - len(fresh)} of {len(merged)} tensors are from {source}; fresh: "
            + (", ".join(fresh) or "none")
        )
    try:
        return weights.from_official({**merged, **there}, model)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def check_shape(config: TrainConfig, model: ModelConfig, source: str) -> None:
    """Refuses a model that the options contradict; what they leave open, the file decides."""
    head_size = config.head_size or model.head_size
    asked = dataclasses.replace(config, head_size=head_size).model_config()
    names = ["n_layer", "n_embd"] if config.size else []
    given = ("n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn")
    names += [name for name in given if getattr(config, name)]
    names += ["dim_w", "dim_a", "dim_v", "dim_g"] if config.lora_dims != "formula" else []
    wrong = [
        f"{name} {getattr(model, name)}, not {getattr(asked, name)}"
        for name in dict.fromkeys(names)
        if getattr(asked, name) != getattr(model, name)
    ]
    if wrong:
        way_out = "leave the option out to take the file's"
        if Path(config.proj_dir).absolute() in Path(source).absolute().parents:
            way_out += ", or give another --proj_dir"
        raise UserError(f"{source}: has {', '.join(wrong)}; {way_out}")


def prepare_init(path: Path, config: TrainConfig) -> str:
    """--train_stage 1: writes rwkv-init.pth where none is; returns what to say.

    Raises:
        UserError: other weights are there.
    """
    if not path.exists():
        return f"wrote {write_init(path, config)}"
    model, tensors = weights.open_pth(path)
    seed = config.random_seed
    same_shape = model == config.model_config()
    if same_shape and seed >= 0 and is_of_seed(np.asarray(tensors["emb.weight"]), seed):
        return f"{path} is there already, of --random_seed {seed}"
    raise UserError(
        f"{path}: is there, and is not what these options would write: leave --train_stage 1 out "
        "to train from it, or give another --proj_dir"
    )


def write_init(path: Path, config: TrainConfig) -> Path:
    print(f"initialising {summary(config.model_config())} …", flush=True)
    weights.save_pth(path, init_params(config.model_config(), _seed(config)))
    return path


def _seed(config: TrainConfig) -> int:
    return secrets.randbits(31) if config.random_seed == -1 else config.random_seed
