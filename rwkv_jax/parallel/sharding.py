"""The device mesh, the sharding axis of each tensor, and the strategies.

The mesh has two axes. A batch is sharded over both; the state of a run is sharded along `fsdp` and
replicated along `data`. The strategies have DeepSpeed's and PyTorch's names; all compute the same
numbers.
"""

import fnmatch
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rwkv_jax.config import STRATEGY_ALIASES
from rwkv_jax.errors import UserError

DATA, FSDP = "data", "fsdp"
_HOST_MEMORIES = "pinned_host", "unpinned_host"

# The sharding of a model's tensors and of their two moments, by official path. The first matching
# pattern applies. The layer axis is never sharded, because `lax.scan` runs along it.
TABLE = {
    "emb.weight": P(FSDP, None),  # [V, C]
    "head.weight": P(FSDP, None),
    "blocks.att.[wavg]1": P(None, FSDP, None),  # [L, C, D]
    "blocks.att.[wavg]2": P(None, None, FSDP),  # [L, D, C]
    "blocks.att.r_k": P(None, None, FSDP),  # [L, H, N]
    "blocks.*.ln*": P(None, FSDP),  # [L, C]
    "blocks.att.*.weight": P(None, FSDP, None),  # [L, C, C]
    "blocks.ffn.key.weight": P(None, FSDP, None),  # [L, F, C]
    "blocks.ffn.value.weight": P(None, None, FSDP),  # [L, C, F]
    "blocks.*": P(None, FSDP),  # [L, C]
    "*": P(FSDP),  # [C]
}


class Strategy(NamedTuple):
    """What is sharded in addition to the master weights and Adam's moments.

    If gradients are not sharded, each device holds all of them until the end of the step. If
    parameters are not sharded, it holds a full working copy all the time. With sharded parameters
    there is no working copy: each layer is gathered from the master weights when it is used, in
    the precision of the forward and backward pass. Offloaded master weights need a working copy,
    sharded or full.
    """

    gradients: bool  # reduce-scattered layer by layer, in each micro batch
    parameters: bool  # gathered layer by layer, in the forward and the backward pass
    offload: bool = False  # master weights and moments are in host memory (`offload.py`)


STRATEGIES = {
    "deepspeed_stage_1": Strategy(gradients=False, parameters=False),
    "deepspeed_stage_2": Strategy(gradients=True, parameters=False),
    "deepspeed_stage_2_offload": Strategy(gradients=True, parameters=False, offload=True),
    "deepspeed_stage_3": Strategy(gradients=True, parameters=True),
    "deepspeed_stage_3_offload": Strategy(gradients=True, parameters=True, offload=True),
}
STRATEGIES |= {alias: STRATEGIES[name] for alias, name in STRATEGY_ALIASES.items()}


def make_mesh(devices: int = 0, nodes: int = 1, shape: str = "") -> Mesh:
    """Makes the mesh for the options --devices, --num_nodes and --mesh.

    Args:
        devices: number of devices on each machine; 0: all. Each process contributes equally many.
        shape: "data=D,fsdp=F", or one of the two; "": all devices along `fsdp`.

    Raises:
        UserError: there are fewer devices, or not D·F; or jax finds no device.
    """
    try:
        found, processes = jax.devices(), jax.process_count()
    except (RuntimeError, AssertionError) as error:  # the latter without a CUDA plugin
        asked = f"JAX_PLATFORMS={jax.config.jax_platforms or ''}"  # type: ignore[attr-defined]
        why = next(iter(str(error).splitlines()), "no such device here")
        raise UserError(f"{asked}: jax does not start ({why}); unset it") from None
    if devices:
        each, left = divmod(devices * nodes, processes)
        own = {device.process_index: [] for device in found}  # type: dict[int, list[jax.Device]]
        for device in found:
            own[device.process_index].append(device)
        fewest = min(map(len, own.values()))
        if left or each > fewest:
            seen = f"{fewest} ({found[0].device_kind})"
            where = (
                f" in each of {processes} processes on {nodes} machines" if processes > 1 else ""
            )
            raise UserError(
                f"--devices {devices}: jax sees {seen}{where}: leave it out to use all devices; "
                "python -m rwkv_jax.doctor reports why others are missing"
            )
        found = [device for some in own.values() for device in some[:each]]
    return mesh_from_devices(found, data_axis_size(shape, len(found)))


def data_axis_size(shape: str, devices: int) -> int:
    """The size of the `data` axis: D of "data=D,fsdp=F".

    Raises:
        UserError: not of this form, or D·F is not the number of devices.
    """
    if not shape:
        return 1
    sizes = {}
    for part in shape.split(","):
        name, _, size = part.partition("=")
        if name not in (DATA, FSDP) or name in sizes or not size.isdecimal() or not int(size):
            raise UserError(f"--mesh {shape}: give sizes as in data=2,fsdp=4")
        sizes[name] = int(size)
    data = sizes.get(DATA) or max(1, devices // sizes[FSDP])
    if data * (sizes.get(FSDP) or devices // data) != devices:
        raise UserError(
            f"--mesh {shape}: does not multiply up to the number of devices, {devices}; "
            f"data=1,fsdp={devices} does"
        )
    return data


def mesh_from_devices(devices: list[jax.Device], data: int = 1) -> Mesh:
    """A mesh over these devices: `data` groups, each of which holds the full state once."""
    grid = np.array(devices).reshape(data, -1)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def specs(mesh: Mesh, tree: Any) -> Any:
    """The `PartitionSpec` of each leaf of a tree of parameters, or of the optimizer state.

    The axis is the one in `TABLE`. If `fsdp` does not divide that axis, it is the first other axis
    that `fsdp` divides (not the layer axis). Otherwise the leaf is replicated, and so are scalars.
    """
    size = mesh.shape[FSDP]

    def spec(path: tuple, leaf: Any) -> P:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if leaf.ndim == 0:
            return P()
        name = ".".join(names)
        wanted = next(spec for pattern, spec in TABLE.items() if fnmatch.fnmatch(name, pattern))
        axes = [wanted.index(FSDP), *range(names[0] == "blocks", leaf.ndim)]
        axis = next((axis for axis in axes if leaf.shape[axis] % size == 0), None)
        return P(*(FSDP if at == axis else None for at in range(leaf.ndim)))

    return jax.tree.map_with_path(spec, tree)


def shardings(mesh: Mesh, tree: Any, offload: bool = False) -> Any:
    """`specs` as shardings over the mesh, in device memory or, with `offload`, in host memory."""
    kind = _host_memory(mesh) if offload else None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec, memory_kind=kind), specs(mesh, tree))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes and dtypes of a tree of arrays or shapes, with these shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _host_memory(mesh: Mesh) -> str | None:
    """The kind of host memory for transfers to the devices; None: the devices' default memory.

    A GPU transfers to and from pinned memory directly. The planner's abstract devices do not report
    any kind.
    """
    kinds = {
        memory.kind for device in mesh.local_devices for memory in device.addressable_memories()
    }
    return next((kind for kind in _HOST_MEMORIES if kind in kinds), None)


def in_host_memory(tree: Any) -> bool:
    """Whether any of these arrays is in host memory."""
    return any(
        leaf.sharding.memory_kind in _HOST_MEMORIES
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
    )


def batch_spec(mesh: Mesh) -> P:
    """The spec of a batch [A, B, T + 1]: the samples of each micro batch are sharded."""
    return P(None, mesh.axis_names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """`batch_spec` over the mesh."""
    return NamedSharding(mesh, batch_spec(mesh))


# Collectives for use inside `jax.shard_map`, where each device sees its own shard:


def all_gather(mesh: Mesh, shard: jax.Array, spec: P) -> jax.Array:
    """Gathers the full tensor over `fsdp`; a replicated tensor is returned unchanged."""
    axis = _sharded_axis(mesh, spec)
    return shard if axis is None else jax.lax.all_gather(shard, FSDP, axis=axis, tiled=True)


def reduce_scatter(mesh: Mesh, full: jax.Array, spec: P) -> jax.Array:
    """This device's shard of the sum over `fsdp`; a replicated tensor is returned unchanged."""
    axis = _sharded_axis(mesh, spec)
    if axis is None:
        return full
    return jax.lax.psum_scatter(full, FSDP, scatter_dimension=axis, tiled=True)


def finish_all_reduce(mesh: Mesh, scattered: jax.Array, spec: P) -> jax.Array:
    """The rest of the sum over all devices that `reduce_scatter` started."""
    done = (FSDP,) if _sharded_axis(mesh, spec) is not None else ()
    left = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in done]
    return jax.lax.psum(scattered, left) if left else scattered


def _sharded_axis(mesh: Mesh, spec: P) -> int | None:
    return spec.index(FSDP) if FSDP in spec and mesh.shape[FSDP] > 1 else None
