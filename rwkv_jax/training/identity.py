"""The identity of a run: what makes it the same run, and what may change on resume."""

from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax.checkpoints.store import MANIFEST, Checkpoints
from rwkv_jax.config import TrainConfig
from rwkv_jax.files import reporting_os_errors
from rwkv_jax.text.dataset import Dataset, fingerprint

WEIGHTS = "weights of load_model"  # key in a run's identity: their content, not their path
_GONE = "missing"  # its value if the path of --load_model does not exist

# Options that may change on resume, although they change all later steps.
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
    """Returns the identity of a run besides its model.

    Together with the step number and the model, it determines a step. Only the initial weights are
    random; random_seed is the only random key.
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
    """Returns a fingerprint of the content of --load_model; empty if there is none.

    The fingerprint of a folder is that of its newest checkpoint's manifest, which has the hash of
    every file.

    Raises:
        UserError: the file cannot be read.
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


def resumed_weights(saved: dict[str, Any], current: dict[str, Any]) -> str | None:
    """Returns the `WEIGHTS` of a resumed run.

    On resume, --load_model may be omitted, and its file may have been removed.

    Args:
        saved: the identity in the checkpoint.
        current: the identity from the options.

    Returns:
        The fingerprint; None if it is unknown, because the checkpoint was written before
        fingerprints were recorded.
    """
    initial, given = saved.get(WEIGHTS), current[WEIGHTS]
    return initial if not given or (given == _GONE and initial != "") else given


def changes(saved: dict[str, Any], current: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the differences from the saved identity, as "name old, not new".

    A run that started with --load_model can be resumed without it: this is not a difference.

    Returns:
        The differences that make it another run, and those that are allowed.
    """
    current = {**current, WEIGHTS: resumed_weights(saved, current)}
    if saved.get(WEIGHTS) is None:
        saved = {**saved, WEIGHTS: current[WEIGHTS]}
    differing = [name for name in current if saved.get(name) != current[name]]
    given = {name: "unset" if current[name] is None else current[name] for name in differing}
    texts = {name: f"{name} {saved.get(name) or 'unset'}, not {given[name]}" for name in differing}
    return (
        [texts[name] for name in differing if name not in _CHANGEABLE],
        [texts[name] for name in differing if name in _CHANGEABLE],
    )
