"""Which device holds what: one axis of devices, and a strategy's table of what is cut along it.

The strategies carry the names that DeepSpeed gave them. Every one computes the same numbers.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from rwkv_jax.errors import UserError

AXIS = "data"


class Strategy(NamedTuple):
    """What a device holds only its part of; a batch is always split. The rest is on every one."""

    gradients: bool  # reduce-scattered instead of all-reduced
    parameters: bool  # the working copy, gathered a layer at a time where it is used


# Master weights and Adam's moments are cut in all of them.
STRATEGIES = {
    "deepspeed_stage_1": Strategy(gradients=False, parameters=False),
    "deepspeed_stage_2": Strategy(gradients=True, parameters=False),
    "deepspeed_stage_3": Strategy(gradients=True, parameters=True),
}


def make_mesh(devices: int = 0) -> jax.sharding.Mesh:
    """A mesh of the first `devices` devices (0: all).

    Raises:
        UserError: there are fewer.
    """
    there = jax.devices()
    if devices > len(there):
        raise UserError(f"--devices {devices}: jax sees {len(there)} ({there[0].device_kind})")
    chosen = there[: devices or len(there)]
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((len(chosen),), (AXIS,), axis_types=auto, devices=chosen)


def replicated(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def cut(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Shardings that split each leaf over the devices, by its path and shape.

    The longest axis that the devices divide is cut, but never the layer axis of a block's tensor,
    along which `lax.scan` walks. A leaf without such an axis is whole on every device.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        stacked = any(getattr(entry, "key", None) == "blocks" for entry in path)
        axes = range(1 if stacked else 0, len(leaf.shape))
        fitting = [axis for axis in axes if leaf.shape[axis] % mesh.size == 0]
        spec: list[str | None] = [None] * len(leaf.shape)
        if fitting:
            spec[max(fitting, key=lambda axis: leaf.shape[axis])] = AXIS
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map_with_path(sharding, tree)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of [A, B, T + 1]: micro batches one after the other, the samples of each over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, AXIS))
