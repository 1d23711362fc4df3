"""Which device holds what: a mesh, one table of where each tensor is cut, and the strategies.

The mesh has two axes. A batch is split over both; the state of a run is cut along `fsdp` and
repeated along `data`. The strategies carry the names that DeepSpeed and PyTorch gave them; every
one computes the same numbers.
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

# Where a tensor of the model, and its two moments, are cut. The first pattern that its official
# path fits counts. The layer axis is never cut: `lax.scan` walks along it.
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
    """What a device holds only its part of, beside its part of the masters and of Adam's moments.

    What it holds whole: the gradients, if not cut, until the end of the step; the working copy of
    the parameters, if not cut, all the time. With cut parameters there is no working copy: a layer
    is read from the masters, in the precision of the pass, where it is used. Offloaded masters need
    a working copy, cut or whole.
    """

    gradients: bool  # reduce-scattered layer by layer, each micro batch
    parameters: bool  # gathered layer by layer, in the forward and in the backward pass
    offload: bool = False  # masters and moments are in the host's memory (`offload.py`)


STRATEGIES = {
    "deepspeed_stage_1": Strategy(gradients=False, parameters=False),
    "deepspeed_stage_2": Strategy(gradients=True, parameters=False),
    "deepspeed_stage_2_offload": Strategy(gradients=True, parameters=False, offload=True),
    "deepspeed_stage_3": Strategy(gradients=True, parameters=True),
    "deepspeed_stage_3_offload": Strategy(gradients=True, parameters=True, offload=True),
}
STRATEGIES |= {alias: STRATEGIES[name] for alias, name in STRATEGY_ALIASES.items()}


def make_mesh(devices: int = 0, nodes: int = 1, shape: str = "") -> Mesh:
    """The mesh that the options --devices, --num_nodes and --mesh ask for.

    Args:
        devices: how many of each machine's; 0: all. Each process gives as many as the others.
        shape: "data=D,fsdp=F", or one of the two; all devices along `fsdp` without it.

    Raises:
        UserError: there are fewer devices, or not D·F; or jax finds none at all.
    """
    try:
        there, processes = jax.devices(), jax.process_count()
    except (RuntimeError, AssertionError) as error:  # the latter where it has no CUDA plugin
        asked = f"JAX_PLATFORMS={jax.config.jax_platforms or ''}"  # type: ignore[attr-defined]
        why = next(iter(str(error).splitlines()), "no such device here")
        raise UserError(f"{asked}: jax does not start ({why}); unset it") from None
    if devices:
        each, left = divmod(devices * nodes, processes)
        own = {device.process_index: [] for device in there}  # type: dict[int, list[jax.Device]]
        for device in there:
            own[device.process_index].append(device)
        fewest = min(map(len, own.values()))
        if left or each > fewest:
            seen = f"{fewest} ({there[0].device_kind})"
            where = (
                f" in each of {processes} processes on {nodes} machines" if processes > 1 else ""
            )
            raise UserError(
                f"--devices {devices}: jax sees {seen}{where}: leave it out to use all devices; "
                "python -m rwkv_jax.doctor says what hides others"
            )
        there = [device for some in own.values() for device in some[:each]]
    return mesh_of(there, groups(shape, len(there)))


def groups(shape: str, devices: int) -> int:
    """D of "data=D,fsdp=F"."""
    if not shape:
        return 1
    sizes = {}
    for part in shape.split(","):
        name, _, size = part.partition("=")
        if name not in (DATA, FSDP) or name in sizes or not size.isdecimal() or not int(size):
            raise UserError(f"--mesh {shape}: give sizes as in data=2,fsdp=4")
        sizes[name] = int(size)
    groups = sizes.get(DATA) or max(1, devices // sizes[FSDP])
    if groups * (sizes.get(FSDP) or devices // groups) != devices:
        raise UserError(
            f"--mesh {shape}: does not multiply up to the number of devices, {devices}; "
            f"data=1,fsdp={devices} does"
        )
    return groups


def mesh_of(devices: list[jax.Device], data: int = 1) -> Mesh:
    """A mesh over these devices: `data` groups, each of which holds the whole state once."""
    grid = np.array(devices).reshape(data, -1)
    return Mesh(grid, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2)


def specs(mesh: Mesh, tree: Any) -> Any:
    """The `PartitionSpec` of each leaf of a tree of parameters, or of the optimizer's state.

    `TABLE`'s, or, where `fsdp` does not divide the axis that it names, the first other axis that
    it does divide (not the layers'); a leaf without one, and a scalar, is whole on every device.
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


def cut(mesh: Mesh, tree: Any, offload: bool = False) -> Any:
    """`specs` as shardings over the mesh, in the devices' memory or, to offload, in the host's."""
    kind = _host_memory(mesh) if offload else None
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec, memory_kind=kind), specs(mesh, tree))


def _host_memory(mesh: Mesh) -> str | None:
    """The host's memory that devices copy from and to; None: what a device has by default.

    A GPU copies to and from pinned memory by itself. The planner's devices, which are not there,
    tell of none.
    """
    kinds = {
        memory.kind for device in mesh.local_devices for memory in device.addressable_memories()
    }
    return next((kind for kind in _HOST_MEMORIES if kind in kinds), None)


def in_host_memory(tree: Any) -> bool:
    """Whether these arrays were put where `cut` says to offload."""
    return any(
        leaf.sharding.memory_kind in _HOST_MEMORIES
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
    )


def batch_spec(mesh: Mesh) -> P:
    """Of [A, B, T + 1]: micro batches one after the other, the samples of each over the devices."""
    return P(None, mesh.axis_names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """`batch_spec` over the mesh."""
    return NamedSharding(mesh, batch_spec(mesh))


# Inside `jax.shard_map`, where each device sees its own part of what the specs cut:


def gather(mesh: Mesh, part: jax.Array, spec: P) -> jax.Array:
    """The whole tensor of which each device of `fsdp` has a part."""
    axis = _cut_axis(mesh, spec)
    return part if axis is None else jax.lax.all_gather(part, FSDP, axis=axis, tiled=True)


def scatter(mesh: Mesh, whole: jax.Array, spec: P) -> jax.Array:
    """This device's part of the sum over `fsdp`; of a tensor that is not cut, what it has."""
    axis = _cut_axis(mesh, spec)
    if axis is None:
        return whole
    return jax.lax.psum_scatter(whole, FSDP, scatter_dimension=axis, tiled=True)


def finish(mesh: Mesh, scattered: jax.Array, spec: P) -> jax.Array:
    """The sum over all devices, of which `scatter` has done a part."""
    done = (FSDP,) if _cut_axis(mesh, spec) is not None else ()
    left = [axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in done]
    return jax.lax.psum(scattered, left) if left else scattered


def _cut_axis(mesh: Mesh, spec: P) -> int | None:
    return spec.index(FSDP) if FSDP in spec and mesh.shape[FSDP] > 1 else None
