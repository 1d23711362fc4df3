"""A train step with master weights and moments in host memory, updated on the device in groups.

A device holds the working copy of the parameters and its gradients, both in the precision of the
forward and backward pass. The master weights and moments, 12 bytes per parameter, are copied to the
device for their update and back, one group of tensors at a time. The copies happen between
programs, not inside one, so that this module, not XLA's scheduler, decides what is on the device,
and the planner can add it up.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rwkv_jax.model.rwkv7 import Params
from rwkv_jax.parallel import sharding
from rwkv_jax.parallel.layout import Layout

Name = tuple[str, ...]  # a parameter's path in the tree


class Program(NamedTuple):
    """One of the programs that a step runs in order."""

    function: Any  # of `jax.jit`
    arguments: tuple
    other_bytes: int = 0  # on the device meanwhile, besides the arguments
    moved: int = 0  # bytes copied from host memory before it and back after it


class OffloadedStep:
    """(state, batch [A, B, T + 1]) → (state, metrics), with the state in host memory.

    The given state is donated.

    Args:
        differentiate: (working copy, batch, loss scale) → (gradients, metrics).
        update: (state, gradients, metrics) → state; works on any subset of the tensors.
        loss_scale: optimizer state → the scale of the next step's loss.
    """

    def __init__(
        self, layout: Layout, differentiate: Callable, update: Callable, loss_scale: Callable
    ):
        mesh = layout.mesh

        def update_group(state: Any, gradients: Params, metrics: Any) -> tuple[Any, Params]:
            new = update(state, gradients, metrics)
            new = jax.lax.with_sharding_constraint(new, sharding.shardings(mesh, new))
            return new, layout.working_copy(new.params)

        self._mesh, self._weights = mesh, layout.abstract_weights
        self._groups, self._loss_scale = group_parameters(self._weights), loss_scale
        self._differentiate, self._read = jax.jit(differentiate), jax.jit(layout.working_copy)
        self._update_group = jax.jit(update_group, donate_argnums=0)
        self._last: tuple[Any, Params] = None, {}  # the last returned state and its working copy

    def __call__(self, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        last, weights = self._last
        if state is not last:
            weights = merge(
                [self._working_copy_of(select(state.params, group)) for group in self._groups]
            )
        scale = self._loss_scale(state.opt_state)
        scale = self._fetch(scale) if sharding.in_host_memory(scale) else scale
        gradients, metrics = self._differentiate(weights, batch, scale)
        states, copies = [], []
        for group in self._groups:
            _free(select(weights, group))
            old, own = select(state, group), select(gradients, group)
            on_device, copy = self._update_group(self._fetch(old), own, metrics)
            _free([old, own])
            states.append(self._store(on_device))
            copies.append(copy)
            del on_device  # otherwise it would still be on the device when the next group arrives
        self._last = merge(states), merge(copies)
        return self._last[0], metrics

    def programs(self, state: Any, batch: Any) -> list[Program]:
        """The programs of a step, for the planner; state and batch as shapes with shardings."""
        scale = jax.eval_shape(self._loss_scale, state.opt_state)
        gradients, metrics = jax.eval_shape(self._differentiate, self._weights, batch, scale)
        gradients = sharding.with_shardings(gradients, sharding.shardings(self._mesh, gradients))
        programs = [Program(self._differentiate, (self._weights, batch, scale))]
        waiting = bytes_of(gradients)
        for group in self._groups:
            on_device, own = select(state, group), select(gradients, group)
            on_device = sharding.with_shardings(
                on_device, sharding.shardings(self._mesh, on_device)
            )
            waiting -= bytes_of(own)
            other = waiting + bytes_of(self._weights) - bytes_of(select(self._weights, group))
            arguments = on_device, own, metrics
            programs.append(Program(self._update_group, arguments, other, 2 * bytes_of(on_device)))
        return programs

    def _working_copy_of(self, masters: Params) -> Params:
        return jax.block_until_ready(self._read(self._fetch(masters)))

    def _fetch(self, tree: Any) -> Any:
        """Copies to device memory."""
        return jax.device_put(tree, sharding.shardings(self._mesh, tree))

    def _store(self, tree: Any) -> Any:
        """Copies to host memory and waits, so that the next group has room."""
        on_host = sharding.shardings(self._mesh, tree, offload=True)
        return jax.block_until_ready(jax.device_put(tree, on_host))


def group_parameters(params: Params) -> list[frozenset[Name]]:
    """Groups the tensors' paths so that no group is larger than the largest tensor."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    sizes = {tuple(entry.key for entry in path): leaf.size for path, leaf in paths}
    groups: list[list[Name]] = [[]]
    room = largest = max(sizes.values())
    for path in sorted(sizes, key=lambda path: sizes[path]):
        if sizes[path] > room:
            groups.append([])
            room = largest
        groups[-1].append(path)
        room -= sizes[path]
    return [frozenset(group) for group in groups]


def select(tree: Any, group: frozenset[Name]) -> Any:
    """Selects these tensors from every parameter-shaped dict in a tree; other leaves stay."""

    def select_in(node: Params, path: Name = ()) -> Params:
        selected = {
            name: select_in(child, (*path, name)) if _is_dict(child) else child
            for name, child in node.items()
            if _is_dict(child) or (*path, name) in group
        }
        return {name: child for name, child in selected.items() if not _is_dict(child) or child}

    return jax.tree.map(
        lambda node: select_in(node) if _is_dict(node) else node, tree, is_leaf=_is_dict
    )


def merge(parts: list[Any]) -> Any:
    """Merges the parts of a tree; leaves that belong to no parameter come from the last part."""

    def merge_nodes(*nodes: Any) -> Any:
        if not _is_dict(nodes[-1]):
            return nodes[-1]
        names = dict.fromkeys(name for node in nodes for name in node)
        return {
            name: merge_nodes(*(node[name] for node in nodes if name in node)) for name in names
        }

    return jax.tree.map(merge_nodes, *parts, is_leaf=_is_dict)


def bytes_of(tree: Any) -> int:
    """Bytes on one device of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _free(tree: Any) -> None:
    """Frees the tensors after the running programs have finished with them."""
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim:  # every group has the counts
            leaf.delete()


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)
