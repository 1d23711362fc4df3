"""A run as a thing with an identity: what makes it this one, who may resume it, when it stops and
when it saves.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax.checkpoints.store import MANIFEST, Checkpoints
from rwkv_jax.config import TrainConfig
from rwkv_jax.files import reporting_os_errors
from rwkv_jax.text.dataset import Dataset, fingerprint

WEIGHTS = "weights of load_model"  # in a run's identity: what they are, not where
_GONE = "missing"  # instead of these, where --load_model names nothing

# Options that may change when a run is resumed; every later step is another for it.
_CHANGEABLE = (
    "my_exit_tokens",
    "lr_init",
    "lr_final",
    "warmup_steps",
    "beta1",
    "beta2",
    "adam_eps",
    "weight_decay",
    "grad_clip",
    "precision",
)


def identity(config: TrainConfig, data: Dataset, batch: int) -> dict[str, Any]:
    """What a run is made of besides its model: with the step number, all that a step depends on.

    Nothing is drawn at random but the initial weights, by random_seed: there is no other key.
    """
    return {
        "data": fingerprint(data.tokens),
        "samples a step": batch,
        "ctx_len": config.ctx_len,
        "magic_prime": data.magic_prime,
        "epoch_begin": config.epoch_begin,
        "random_seed": config.random_seed,
        WEIGHTS: weights_fingerprint(config.load_model),
        **{name: getattr(config, name) for name in _CHANGEABLE},
    }


def weights_fingerprint(load_model: str) -> str:
    """Tells the content of one --load_model from another's; empty for none.

    A folder is known by the manifest of its newest checkpoint, which has the hash of every file.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(load_model)
    if load_model and path.is_dir() and not (path / MANIFEST).exists():
        path = path / "checkpoints" / str(next(iter(Checkpoints(path / "checkpoints").steps()), ""))
    file = path / MANIFEST if path.is_dir() else path
    if not load_model or not file.exists():
        return _GONE if load_model else ""
    with reporting_os_errors(file, "read"):
        content = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.empty(0, np.uint8)
    return fingerprint(content)


def resumed_weights(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The `WEIGHTS` of a resumed run, which needs no --load_model: it may be left out, or be gone.

    None: not known, of a checkpoint from before they were recorded.
    """
    begun, given = then.get(WEIGHTS), now[WEIGHTS]
    return begun if not given or (given == _GONE and begun != "") else given


def changes(then: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What has changed, as "name old, not new": what makes it another run, and what may change.

    A run that began with --load_model continues without it, too.
    """
    now = {**now, WEIGHTS: resumed_weights(then, now)}
    if then.get(WEIGHTS) is None:
        then = {**then, WEIGHTS: now[WEIGHTS]}
    differing = [name for name in now if then.get(name) != now[name]]
    given = {name: "unset" if now[name] is None else now[name] for name in differing}
    told = {name: f"{name} {then.get(name) or 'unset'}, not {given[name]}" for name in differing}
    return (
        [told[name] for name in differing if name not in _CHANGEABLE],
        [told[name] for name in differing if name in _CHANGEABLE],
    )
