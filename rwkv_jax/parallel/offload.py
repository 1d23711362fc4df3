"""A step whose masters and moments are in the host's memory, and visit the device in parts.

A device keeps what the passes read and its gradient, both in the precision of the passes. The
masters and the moments, 12 bytes a parameter, come over for their update and go back, a group of
tensors at a time. They are copied between programs, not by one: what is on a device at any moment
is decided here, whatever XLA schedules, and the planner can add it up.
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
    """One of the programs that a step runs one after the other."""

    function: Any  # of `jax.jit`
    arguments: tuple
    beside: int = 0  # bytes that a device holds meanwhile and that are no argument
    moved: int = 0  # bytes that a device gets from the host's memory before, and puts there after


class OffloadedStep:
    """(state, batch [A, B, T + 1]) → (state, metrics), the state in the host's memory.

    The state that is passed in is consumed.

    Args:
        differentiate: (what the passes read, batch, loss scale) → (gradients, metrics).
        update: (state, gradients, metrics) → state, where the trees may have any part of their
            tensors.
        loss_scale: optimizer's state → the scale of the next step's loss.
    """

    def __init__(
        self, layout: Layout, differentiate: Callable, update: Callable, loss_scale: Callable
    ):
        mesh = layout.mesh

        def visit(state: Any, gradients: Params, metrics: Any) -> tuple[Any, Params]:
            new = update(state, gradients, metrics)
            new = jax.lax.with_sharding_constraint(new, sharding.cut(mesh, new))
            return new, layout.working_copy(new.params)

        self._mesh, self._weights = mesh, layout.weights
        self._groups, self._loss_scale = groups(self._weights), loss_scale
        self._differentiate, self._read = jax.jit(differentiate), jax.jit(layout.working_copy)
        self._visit = jax.jit(visit, donate_argnums=0)
        self._last: tuple[Any, Params] = None, {}  # the state returned last, and what is read of it

    def __call__(self, state: Any, batch: jax.Array) -> tuple[Any, Any]:
        last, weights = self._last
        if state is not last:
            weights = merge([self._read_part(part(state.params, group)) for group in self._groups])
        scale = self._loss_scale(state.opt_state)
        scale = self._fetch(scale) if sharding.in_host_memory(scale) else scale
        gradients, metrics = self._differentiate(weights, batch, scale)
        states, read = [], []
        for group in self._groups:
            _free(part(weights, group))
            old, own = part(state, group), part(gradients, group)
            visitor, read_of_it = self._visit(self._fetch(old), own, metrics)
            _free([old, own])
            states.append(self._store(visitor))
            read.append(read_of_it)
            del visitor  # or it would be there still while the next one comes
        self._last = merge(states), merge(read)
        return self._last[0], metrics

    def programs(self, state: Any, batch: Any) -> list[Program]:
        """What a step runs, for the planner; state and batch as shapes with shardings."""
        scale = jax.eval_shape(self._loss_scale, state.opt_state)
        gradients, metrics = jax.eval_shape(self._differentiate, self._weights, batch, scale)
        gradients = _placed(gradients, sharding.cut(self._mesh, gradients))
        programs = [Program(self._differentiate, (self._weights, batch, scale))]
        waiting = bytes_of(gradients)
        for group in self._groups:
            visitor, own = part(state, group), part(gradients, group)
            visitor = _placed(visitor, sharding.cut(self._mesh, visitor))
            waiting -= bytes_of(own)
            beside = waiting + bytes_of(self._weights) - bytes_of(part(self._weights, group))
            arguments = visitor, own, metrics
            programs.append(Program(self._visit, arguments, beside, 2 * bytes_of(visitor)))
        return programs

    def _read_part(self, masters: Params) -> Params:
        return jax.block_until_ready(self._read(self._fetch(masters)))

    def _fetch(self, tree: Any) -> Any:
        """To the devices' memory."""
        return jax.device_put(tree, sharding.cut(self._mesh, tree))

    def _store(self, tree: Any) -> Any:
        """To the host's memory; waits, so that the next to come finds room."""
        where = sharding.cut(self._mesh, tree, offload=True)
        return jax.block_until_ready(jax.device_put(tree, where))


def groups(params: Params) -> list[frozenset[Name]]:
    """The tensors' paths, in groups none of which is larger than the largest tensor."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    sizes = {tuple(entry.key for entry in path): leaf.size for path, leaf in paths}
    found: list[list[Name]] = [[]]
    room = most = max(sizes.values())
    for path in sorted(sizes, key=lambda path: sizes[path]):
        if sizes[path] > room:
            found.append([])
            room = most
        found[-1].append(path)
        room -= sizes[path]
    return [frozenset(group) for group in found]


def part(tree: Any, group: frozenset[Name]) -> Any:
    """Of a tree whose dicts are trees of parameters, or of moments, these alone."""

    def only(node: Params, at: Name = ()) -> Params:
        kept = {
            name: only(below, (*at, name)) if _is_dict(below) else below
            for name, below in node.items()
            if _is_dict(below) or (*at, name) in group
        }
        return {name: below for name, below in kept.items() if not (_is_dict(below) and not below)}

    return jax.tree.map(lambda node: only(node) if _is_dict(node) else node, tree, is_leaf=_is_dict)


def merge(parts: list[Any]) -> Any:
    """The tree of which these are all the parts; what is no parameter's is the last one's."""

    def joined(*nodes: Any) -> Any:
        if not _is_dict(nodes[-1]):
            return nodes[-1]
        names = dict.fromkeys(name for node in nodes for name in node)
        return {name: joined(*(node[name] for node in nodes if name in node)) for name in names}

    return jax.tree.map(joined, *parts, is_leaf=_is_dict)


def bytes_of(tree: Any) -> int:
    """What a device holds of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings,
    )


def _free(tree: Any) -> None:
    """Gives the tensors' memory back once the programs that have been started are done with it."""
    for leaf in jax.tree.leaves(tree):
        if leaf.ndim:  # the counts are in every part
            leaf.delete()


def _is_dict(node: Any) -> bool:
    return isinstance(node, dict)
