"""Checkpoints of a run: all that is needed to go on as if nothing had happened. Orbax is here.

`FOLDER/{step}/` holds the masters and the optimizer's state as two items, so that a reader who
wants the model takes that alone, and the model's configuration as metadata.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.metrics import MiniepochLoss
from rwkv_jax.model import Params, abstract_params
from rwkv_jax.step import TrainState


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` of them; one is written at a time.

    Args:
        folder: made when the first checkpoint is.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._orbax = ocp.training.Checkpointer(folder.absolute(), preservation_policy=policy)
        self._pending: Any = None

    def latest(self) -> int | None:
        """The newest step saved, or None."""
        newest = self._orbax.latest
        return None if newest is None else newest.step

    def save(
        self,
        step: int,
        config: ModelConfig,
        state: TrainState,
        running: MiniepochLoss,
        order: dict[str, int] | None = None,
    ) -> None:
        """Copies the state off the devices, then writes in the background.

        A checkpoint appears under its name only when it is complete. `order` is what makes the step
        number a place in the data and in the schedule; a run that goes on has to have the same.
        """
        self.wait()
        self._pending = self._orbax.save_checkpointables_async(
            step,
            state._asdict(),
            custom_metadata={
                "model": dataclasses.asdict(config),
                "miniepoch_loss": dataclasses.asdict(running),
                "order": order or {},
            },
            force=True,
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, MiniepochLoss]:
        """The state of a step, laid out over the devices as `abstract` (with shardings) says."""
        items = self._orbax.load_checkpointables(step, abstract._asdict())
        metadata = self._orbax.checkpointables_metadata(step).custom_metadata
        return TrainState(**items), MiniepochLoss(**metadata["miniepoch_loss"])

    def order(self, step: int) -> dict[str, int]:
        """What `save` was given as `order`."""
        return self._orbax.checkpointables_metadata(step).custom_metadata["order"]

    def model_config(self, step: int) -> ModelConfig:
        """The configuration of the model of a step."""
        metadata = self._orbax.checkpointables_metadata(step)
        return ModelConfig(**metadata.custom_metadata["model"])

    def wait(self) -> None:
        """Returns when the last `save` is on disk; raises what went wrong with it."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        self.wait()
        self._orbax.close()


def save_model(folder: Path, config: ModelConfig, params: Params) -> None:
    """Writes one checkpoint that holds a model and no optimizer, for `load_newest`.

    Args:
        folder: becomes the checkpoint; appears under its name only when it is complete.

    Raises:
        UserError: it exists or cannot be written.
    """
    try:
        # Orbax, when it cannot make the folder, has its threads wait minutes for it.
        folder.mkdir(parents=True)
        folder.rmdir()
        ocp.save_checkpointables(
            folder.absolute(),
            {"params": params},
            custom_metadata={"model": dataclasses.asdict(config)},
        )
    except FileExistsError:
        raise UserError(f"{folder}: exists already; give a new folder") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None


def load_newest(path: Path) -> tuple[ModelConfig, Params]:
    """The model of a checkpoint, or of the newest checkpoint in a run's output folder.

    Returns:
        The configuration and the tree of float32 NumPy arrays; the optimizer's state is not read.

    Raises:
        UserError: there is none.
    """
    folder = path.absolute()
    # Orbax alone is not strict enough: a folder of checkpoints is one to it, too.
    if not ((folder / "params").is_dir() and ocp.is_orbax_checkpoint(folder)):
        newest = None
        if (folder / "checkpoints").is_dir():  # which orbax would make
            with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
                newest = checkpoints.latest()
        if newest is None:
            raise UserError(
                f"{path}: no checkpoints; give a .pth, the output folder of a run, or a checkpoint"
            )
        folder = folder / "checkpoints" / str(newest)
    metadata = ocp.checkpointables_metadata(folder).custom_metadata
    if not metadata or "model" not in metadata:
        raise UserError(f"{path}: an orbax checkpoint, but not one of rwkv-jax")
    config = ModelConfig(**metadata["model"])
    abstract = jax.tree.map(lambda p: np.empty(p.shape, p.dtype), abstract_params(config))
    return config, ocp.load_checkpointables(folder, {"params": abstract})["params"]
