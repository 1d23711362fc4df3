"""RWKV-7 in JAX: train it, continue training it, use it.

    model = rwkv_jax.load("rwkv-final.pth")
    logits, state = model.forward(tokens)          # tokens [B, T] → [B, T, V] float32
    logits, state = model.forward(more, state)     # continues from there

`rwkv-jax --help` lists the commands; `python -m rwkv_jax.train` and so on are the same.

Scripts import `tokenizer`, `pth` and `weights` (official tensor names) from here, wherever in the
package these modules are.
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


_PUBLIC = {
    "tokenizer": "rwkv_jax.text.tokenizer",
    "pth": "rwkv_jax.checkpoints.pth",
    "weights": "rwkv_jax.checkpoints.weights",
}


def __getattr__(name: str) -> Any:
    """Imports a public module when it is first asked for."""
    from importlib import import_module

    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(_PUBLIC[name])


def load(path: str | os.PathLike[str], dtype: Any = "float32") -> "RWKV7":
    """Loads a model from an official-format `.pth`, or from a training run.

    Args:
        path: the file, a run's `--proj_dir` (its newest checkpoint is used), or one checkpoint.
        dtype: of the weights and of the computation: "float32", "bfloat16" or "float16".
    Returns:
        The module; see `RWKV7.forward`. Its configuration is inferred from the file
        (`model.config`).
    Raises:
        UserError: the file is missing, damaged, or not an RWKV-7 model.
    """
    import jax

    from rwkv_jax.model.rwkv7 import bind

    config, params = load_params(path, dtype)
    return bind(config, jax.tree.map(jax.numpy.asarray, params))


def load_params(
    path: str | os.PathLike[str], dtype: Any = "float32"
) -> tuple["ModelConfig", dict[str, Any]]:
    """Loads the configuration and the tree of parameters as NumPy arrays; used by `load`.

    Peak memory is that of the tree in `dtype`: there is no intermediate copy in a wider dtype.
    """
    return _load(path, dtype, tuned=False)[:2]


def load_tuned(
    path: str | os.PathLike[str], dtype: Any = "float32"
) -> tuple["ModelConfig", dict[str, Any], "np.ndarray | None"]:
    """As `load_params`, and also loads a tuned initial state if the file has one.

    The state has the layout of `weights.tuned_state`. All other loaders refuse such a file, because
    a model with another initial state computes something else.
    """
    return _load(path, dtype, tuned=True)


def _load(
    path: str | os.PathLike[str], dtype: Any, tuned: bool
) -> tuple["ModelConfig", dict[str, Any], "np.ndarray | None"]:
    from pathlib import Path

    import ml_dtypes  # noqa: F401  # registers "bfloat16" with NumPy

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
    """Imports jax without the CUDA plugin's messages about a missing driver.

    The extra `plan` installs the plugin on machines without a driver. jax 0.10 prints these
    messages when it loads the libraries, and no setting turns them off.
    """
    from importlib.util import find_spec

    from rwkv_jax.device.nvidia import has_driver
    from rwkv_jax.errors import suppress_stderr

    if "jax" not in sys.modules and any(find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        if not has_driver():
            with suppress_stderr():
                import jax  # noqa: F401


_import_jax()
