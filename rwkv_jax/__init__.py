"""RWKV-7 in JAX: train it, continue training it, use it.

    model = rwkv_jax.load("rwkv-final.pth")
    logits, state = model.forward(tokens)          # tokens [B, T] → [B, T, V] float32
    logits, state = model.forward(more, state)     # continues from there

The commands are `python -m rwkv_jax.train` and `python -m rwkv_jax.generate`.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":  # jax has no CUDA there, and files cannot be locked or flushed so
    raise ImportError("rwkv-jax runs on Linux and macOS; on Windows, install it inside WSL2")

__version__ = "0.1.0"

if TYPE_CHECKING:
    import numpy as np

    from rwkv_jax.config import ModelConfig
    from rwkv_jax.model.rwkv7 import RWKV7


def load(path: str | os.PathLike[str], dtype: Any = "float32") -> "RWKV7":
    """A model from an official-format `.pth`, or from a training run.

    Args:
        path: the file, a run's `--proj_dir` (its newest checkpoint is taken), or one checkpoint.
        dtype: of the weights and of the computation: "float32", "bfloat16" or "float16".
    Returns:
        The module; see `RWKV7.forward`. Its shape is read off the file (`model.config`).
    Raises:
        UserError: the file is missing, damaged, or no RWKV-7 model.
    """
    import jax

    from rwkv_jax.model.rwkv7 import bind

    config, params = load_params(path, dtype)
    return bind(config, jax.tree.map(jax.numpy.asarray, params))


def load_params(
    path: str | os.PathLike[str], dtype: Any = "float32"
) -> tuple["ModelConfig", dict[str, Any]]:
    """The configuration and the tree of parameters, NumPy arrays, that `load` builds on.

    Memory is that of the tree in `dtype`: no wider copy of it is made on the way.
    """
    return _load(path, dtype, tuned=False)[:2]


def load_tuned(
    path: str | os.PathLike[str], dtype: Any = "float32"
) -> tuple["ModelConfig", dict[str, Any], "np.ndarray | None"]:
    """As `load_params`, with the tuned initial state that a file may hold beside the model.

    The state is that of `weights.tuned_state`. All others refuse such a file: with another state to
    begin in, it is another model.
    """
    return _load(path, dtype, tuned=True)


def _load(
    path: str | os.PathLike[str], dtype: Any, tuned: bool
) -> tuple["ModelConfig", dict[str, Any], "np.ndarray | None"]:
    from pathlib import Path

    import ml_dtypes  # noqa: F401  # by which NumPy knows "bfloat16"

    from rwkv_jax.config import HEAD_SIZES
    from rwkv_jax.errors import UserError

    if Path(path).is_dir():
        from rwkv_jax.checkpoints.store import load_newest

        config, params, state = *load_newest(Path(path), dtype), None
    else:
        from rwkv_jax.checkpoints.weights import load_pth, load_tuned_pth

        load = load_tuned_pth if tuned else load_pth
        config, params, *states = load(path, dtype=dtype)
        state = states[0] if states else None
    if config.head_size not in HEAD_SIZES:
        raise UserError(f"{path}: its heads are {config.head_size} wide, not one of {HEAD_SIZES}")
    return config, params, state


def _import_jax() -> None:
    """Imports jax where it would report, from each library of its CUDA plugin, a missing driver.

    The plugin without a driver is what the extra `plan` installs. jax 0.10 prints as the libraries
    are loaded, which no setting of it prevents.
    """
    from importlib.util import find_spec

    from rwkv_jax.device.nvidia import has_driver
    from rwkv_jax.errors import held_back

    if "jax" not in sys.modules and any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        if not has_driver():
            with held_back():
                import jax  # noqa: F401


_import_jax()
