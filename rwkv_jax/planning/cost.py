"""The cost of a step: FLOPs of a jaxpr, and memory traffic of an HLO module."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

# Increment this when `flops` or `memory_traffic` count the same program differently: it is part of
# the key of cached plans.
COUNTED = 2


def flops(jaxpr: Jaxpr) -> int:
    """FLOPs of the matrix products in a program, two per multiply-add.

    Loops of known length and the programs of a Pallas kernel's grid count as often as they run; a
    `cond` counts its most expensive branch. Inside `jax.shard_map` shapes are per device, so the
    result is per device.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            left: Any = eqn.invars[0].aval
            out: Any = eqn.outvars[0].aval
            contracted = (left.shape[axis] for axis in eqn.params["dimension_numbers"][0][0])
            total += 2 * math.prod(out.shape) * math.prod(contracted)
            continue
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        if eqn.primitive.name == "pallas_call":
            times = math.prod(eqn.params["grid_mapping"].grid)
        inner = [flops(inside) for inside in _jaxprs(eqn.params)]
        total += times * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))):
        if isinstance(leaf, ClosedJaxpr):
            yield leaf.jaxpr
        elif isinstance(leaf, Jaxpr):
            yield leaf


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    text: str
    is_root: bool


Computation = dict[str, _Instruction]

_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "async-update",
}  # fmt: skip


def memory_traffic(hlo: str) -> int:
    """Bytes that an optimized program reads and writes in the device's memory.

    Each kernel (a fusion, a library call, a copy) reads its operands and writes its result once; if
    it reads or writes a slice of a buffer, only the slice counts. A loop counts as often as it
    runs. Caches are not modelled.
    """
    computations = _parse(hlo)
    entry = re.search(r"^ENTRY %([^\s(]+)", hlo, re.MULTILINE)
    assert entry is not None
    return _traffic(computations, entry[1])


def _parse(hlo: str) -> dict[str, Computation]:
    computations: dict[str, Computation] = {}
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line):
            computation = computations.setdefault(header[1], {})
        elif found := re.match(r"\s+(ROOT )?%(\S+) = ", line):
            rest = line[found.end() :]
            shape = rest[: _closing(rest)] if rest.startswith("(") else rest.split(" ", 1)[0]
            call = rest[len(shape) + 1 :]
            opcode, _, inside = call.partition("(")
            operands = re.findall(r"%([^\s,()]+)", inside[: _closing("(" + inside) - 1])
            computation[found[2]] = _Instruction(
                found[2], shape, opcode, operands, call, bool(found[1])
            )
    return computations


def _closing(text: str) -> int:
    """The index after the matching closing parenthesis."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def _bytes(shape: str) -> int:
    total = 0
    for dtype, sizes in re.findall(r"([a-z]+\d\w*|pred)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def _traffic(computations: dict[str, Computation], name: str) -> int:
    computation = computations[name]

    def inside(instruction: _Instruction, *attributes: str) -> list[str]:
        return [found[1] for a in attributes if (found := re.search(a, instruction.text))]

    total = 0
    for x in computation.values():
        if x.opcode in _NO_TRAFFIC or x.opcode.endswith("-start"):
            continue
        if x.opcode.endswith("-done"):  # the start has the operands; its result has more in it
            start = computation[x.operands[0]]
            while start.opcode == "async-update":
                start = computation[start.operands[0]]
            if not start.opcode.endswith("-start"):  # recv-done, send-done: already counted
                continue
            x = start._replace(opcode=start.opcode.removesuffix("-start"), shape=x.shape)
        called = inside(x, r"body=%([^\s,]+)", r"to_apply=%([^\s,]+)", r"calls=%([^\s,]+)")
        if x.opcode == "while":
            trips = inside(x, r'"known_trip_count":\{"n":"(\d+)"')
            total += int(trips[0] if trips else 1) * _traffic(computations, called[0])
        elif x.opcode in ("call", "async"):
            total += _traffic(computations, called[0])
        elif x.opcode == "conditional":
            branches = re.findall(r"computations?=\{?(%[^}\s]+(?:, %[^}\s]+)*)", x.text)
            names = [name.strip(" %,") for text in branches for name in text.split(",")]
            total += max(_traffic(computations, name) for name in names)
        elif x.opcode == "fusion":
            total += _fusion(computations[called[0]])
        else:
            total += _kernel(x, [computation[operand].shape for operand in x.operands])
    return total


def _kernel(x: _Instruction, operands: list[str]) -> int:
    if x.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * _bytes(x.shape)
    if x.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _bytes(operands[-1] if x.opcode == "scatter" else operands[1])
    return _bytes(x.shape) + sum(_bytes(shape) for shape in operands)


def _fusion(computation: Computation) -> int:
    """Bytes that a fusion reads and writes."""
    users: dict[str, list[_Instruction]] = {name: [] for name in computation}
    for x in computation.values():
        for operand in dict.fromkeys(x.operands):
            users[operand].append(x)

    def read(name: str) -> int:
        """Bytes of an operand that its users actually read."""
        whole, total = _bytes(computation[name].shape), 0
        for user in users[name]:
            if user.opcode == "bitcast":
                total += read(user.name)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
                total += _bytes(user.shape)
            elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                return whole
        return min(total, whole)

    def written(name: str) -> int:
        x = computation[name]
        if x.opcode == "tuple":
            return sum(written(operand) for operand in x.operands)
        if x.opcode == "bitcast":
            return written(x.operands[0])
        if x.opcode == "dynamic-update-slice":
            return _bytes(computation[x.operands[1]].shape)
        return _bytes(x.shape)

    parameters = [x.name for x in computation.values() if x.opcode == "parameter"]
    root = next(x.name for x in computation.values() if x.is_root)
    return written(root) + sum(read(name) for name in parameters)
