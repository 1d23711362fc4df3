"""Compares designs of the WKV-7 kernels by lower bounds and by predicted time.

    JAX_PLATFORMS=cpu python -m benchmarks.wkv7_designs \\
        --output benchmarks/results/wkv7_designs.json docs/wkv7-kernel.md docs/log.md

At B8 T4096 H12 N64 in 16 bits, for an H100 and an RTX 4090:
- bytes: what a kernel's blocks are, by its block specs, over the card's bandwidth;
- path: chunks times the longest chain of dependent operations in a chunk, from the traced kernel:
  products (an mma for 16 tokens or channels that are summed, in turn), right operands and
  transposed ones through shared memory (store, barrier, load), special functions, sums across
  lanes, four cycles for each other operation; for as many rounds as programs fit on the cores;
- stream: the same chunks by the machine code, replayed by `wkv7_sass_estimate`, for designs that
  the kernels can be tuned to.
What the kernels cannot be tuned to is put together from the parts of those that can: `DERIVED`.

Prints the tables. A test holds the record and the tables in the docs to what can be computed
without a compiler. Needs what `wkv7_sass_estimate` needs.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks import command, machine
from benchmarks.wkv7_compiled import DOCS, KERNELS, Row, compiled, replace
from benchmarks.wkv7_sass_estimate import (
    CLOCK_GHZ,
    Costs,
    costs_of,
    in_rounds,
    loops,
    replays,
    resident,
)
from pallas_kernels.gpu_targets import GPU_TARGETS
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.wkv7.triton import call
from rwkv_jax.errors import run_command

CARDS = ("h100", "rtx4090")
SPEC = ARG_SPECS["0.1b_micro_batch_8"]
RESULTS = Path(__file__).parent / "results" / "wkv7_designs.json"
CHOSEN = "as they are"
TUNED: dict[str, dict[str, Any]] = {
    CHOSEN: {},
    "chunks of 32": {"chunk_length": 32},
    "chunks of 64": {"chunk_length": 64},
    "gradients: one chunk a program, plain loads": {"chunks": 1, "stages": 1},
    "tiles loaded again, as at N = 128": {"reload_sequential": True, "reload_gradients": True},
    "eight warps in place of four": {"warps": 8},
}
FORWARD, ENDS, CHUNKS = KERNELS


class Kernel(NamedTuple):
    """One kernel of a design on a card."""

    bytes: float  # a token of one head
    flops: float  # of its products, a token of one head
    programs: int
    chunks: int  # that a program goes through, one after another
    products: int  # dependent on each other, of one chunk
    carried_products: int  # those between the state that a chunk gets and the one it leaves
    path: float  # cycles
    carried_path: float


# What the kernels are, traced.


@contextlib.contextmanager
def tuned(changes: dict[str, Any]) -> Iterator[None]:
    """The kernels with another tuning; clears what was traced and compiled."""
    tuning_for = call.tuning_for
    try:
        call.tuning_for = lambda *key: dataclasses.replace(tuning_for(*key), **changes)
        compiled.cache_clear()
        jax.clear_caches()
        yield
    finally:
        call.tuning_for = tuning_for
        compiled.cache_clear()
        jax.clear_caches()


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All of a program's, those of functions and loops in it included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from equations(inner)


def _inner(eqn) -> list[Jaxpr]:
    values = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))
    )
    return [
        x.jaxpr if isinstance(x, ClosedJaxpr) else x
        for x in values
        if isinstance(x, (ClosedJaxpr, Jaxpr))
    ]


def block_bytes(pallas_call) -> float:
    """A kernel's traffic a token of one head: all its programs' blocks, once each."""
    mapping = pallas_call.params["grid_mapping"]
    total = 0
    for block in mapping.block_mappings:
        sides = [getattr(x, "block_size", x) for x in block.block_shape]
        elements = math.prod(x for x in sides if isinstance(x, int))
        total += elements * block.array_aval.dtype.itemsize
    return math.prod(mapping.grid) * total / _token_heads()


def _token_heads() -> int:
    return SPEC.batch * SPEC.time * SPEC.head


def product_flops(body: Jaxpr) -> float:
    """Of one pass of a loop, on the tensor cores."""
    total = 0
    for eqn in equations(body):
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            summed = eqn.invars[0].aval.shape[left[0]]
            total += 2 * summed * math.prod(eqn.outvars[0].aval.shape)
    return total


def longest(jaxpr: Jaxpr, starts: list[float], cost: Callable) -> tuple[list[float], float]:
    """When outputs are there if inputs are at `starts`, and when all that it stores is.

    `cost(eqn)` gives (cycles before it for each operand, cycles it takes).
    """
    at: dict[Any, float] = dict(zip(jaxpr.invars, starts, strict=True))
    end = -math.inf

    def when(x) -> float:
        return -math.inf if isinstance(x, Literal) else at.get(x, -math.inf)

    for eqn in jaxpr.eqns:
        times = [when(x) for x in eqn.invars]
        inner = _inner(eqn)
        if eqn.primitive.name in ("scan", "jit", "pjit", "custom_jvp_call", "while") and inner:
            outs, last = longest(inner[-1], times[-len(inner[-1].invars) :], cost)
            end = max(end, last)
            outs = (outs + outs)[-len(eqn.outvars) :] if eqn.outvars else []
        else:
            before, takes = cost(eqn)
            done = max((x + y for x, y in zip(times, before, strict=True)), default=-math.inf)
            outs = [done + takes] * len(eqn.outvars)
            if eqn.primitive.name == "swap":
                end = max(end, done)
        at.update(zip(eqn.outvars, outs, strict=True))
    outs = [when(x) for x in jaxpr.outvars]
    return outs, max([end, *outs])


def count_products(eqn) -> tuple[list[float], float]:
    return [0.0] * len(eqn.invars), float(eqn.primitive.name == "dot_general")


def cycles_of(costs: Costs, in_place: bool = True) -> Callable:
    """The cost of an equation; without `in_place`, no accumulator is the next left operand."""
    exchange = costs.shared + costs.barrier + costs.matrix

    def cost(eqn) -> tuple[list[float], float]:
        before = [0.0] * len(eqn.invars)
        match eqn.primitive.name:
            case "dot_general":
                (left, _), _ = eqn.params["dimension_numbers"]
                summed = eqn.invars[0].aval.shape[left[0]]
                before = [exchange if left[0] == 0 or not in_place else 0.0, exchange]
                return before, costs.matrix * summed / 16
            case "elementwise_inline_asm" | "elementwise_inline_asm_p":  # the name before jax 0.11
                return before, costs.special
            case "reduce_sum":
                return before, 2 * costs.shuffle  # over the four lanes of an accumulator's row
            case "get" | "swap" | "broadcast_in_dim" | "reshape" | "squeeze" | "transpose" | "iota":
                return before, 0.0
        return before, 4.0

    return cost


def trace(card: str, changes: dict[str, Any], in_place: bool = True) -> dict[str, Kernel]:
    """The kernels as they are called on a card, and what one pass of their main loop is."""
    target = GPU_TARGETS[card]
    device = AbstractDevice(
        device_kind=target.device_kind, num_cores=target.core_count, platform="gpu"
    )
    inputs = [jax.ShapeDtypeStruct(tuple(SPEC), jnp.bfloat16)] * 6

    def forward_and_backward(*inputs):
        y, vjp = jax.vjp(functools.partial(wkv7, implementation="pallas_triton"), *inputs)
        return vjp(y)

    mesh = AbstractMesh((1,), ("data",), abstract_device=device)
    with tuned(changes), jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(forward_and_backward)(*inputs).jaxpr
    found = {}
    for equation in equations(program):
        if equation.primitive.name != "pallas_call":
            continue
        [loop] = [x for x in equation.params["jaxpr"].eqns if x.primitive.name in ("scan", "while")]
        body = _inner(loop)[-1]
        states = [x.aval.ndim == 2 and not hasattr(x.aval, "inner_aval") for x in body.invars]
        carried = [0.0 if x else -math.inf for x in states]
        figures = []
        for cost in (count_products, cycles_of(costs_of(card), in_place)):
            _, whole = longest(body, [0.0] * len(body.invars), cost)
            outs, _ = longest(body, carried, cost)
            figures.append((whole, max(outs, default=0.0)))
        (products, carried_products), (path, carried_path) = figures
        programs = math.prod(equation.params["grid_mapping"].grid)
        found[equation.params["name"]] = Kernel(
            block_bytes(equation),
            product_flops(body) * programs * loop.params["length"] / _token_heads(),
            programs,
            int(loop.params["length"]),
            int(products),
            max(0, int(carried_products)) if any(states) else 0,
            path,
            max(0.0, carried_path) if any(states) else 0.0,
        )
    return found


# What they cannot be tuned to. Each takes the traced kernels and changes what the design changes.


def _change(kernel: Kernel, programs: float = 1, chunks: float = 1, **values: float) -> Kernel:
    return kernel._replace(
        programs=int(kernel.programs * programs), chunks=int(kernel.chunks * chunks), **values
    )


VECTOR, MATRIX = 2 * SPEC.size, 2 * 16  # bytes a token: of an [N] vector, of a 16×16 matrix a chunk


def side_by_side(base: dict[str, Kernel]) -> dict[str, Kernel]:
    """The second chunk's own work beside the first's; states every 32 tokens."""
    saved = SPEC.size * VECTOR / 32
    return {
        name: _change(
            kernel,
            chunks=0.5,
            bytes=kernel.bytes - (2 if name == CHUNKS else 1) * saved,
            path=kernel.path + base[FORWARD].carried_path,
        )
        for name, kernel in base.items()
    }


def value_slices(base: dict[str, Kernel]) -> dict[str, Kernel]:
    """Half of the state's rows a program: r, w, k, a, b (D: r, w, a, b) are read by both."""
    forward, ends = base[FORWARD], base[ENDS]
    return base | {
        FORWARD: _change(forward, programs=2, bytes=forward.bytes + 5 * VECTOR),
        ENDS: _change(ends, programs=2, bytes=ends.bytes + 4 * VECTOR),
    }


def local_parts_before(base: dict[str, Kernel]) -> dict[str, Kernel]:
    """A kernel parallel over chunks reads r, w, k, a, b, writes four matrices a chunk for forward.

    D and the gradients read two and all of them again, and no longer make them.
    """
    forward, ends, chunks = base[FORWARD], base[ENDS], base[CHUNKS]
    local = forward.path - forward.carried_path
    return {
        "local": chunks._replace(bytes=5 * VECTOR + 4 * MATRIX, path=local, products=8),
        FORWARD: forward._replace(
            bytes=forward.bytes + 4 * MATRIX, path=forward.carried_path, products=3
        ),
        ENDS: ends._replace(bytes=ends.bytes + 2 * MATRIX, path=ends.carried_path, products=3),
        CHUNKS: chunks._replace(
            bytes=chunks.bytes + 4 * MATRIX, path=chunks.path - local, products=5
        ),
    }


def fused_backward(base: dict[str, Kernel]) -> dict[str, Kernel]:
    """D stays in registers, and everything is in its loop."""
    ends, chunks = base[ENDS], base[CHUNKS]
    moved = 13 * VECTOR + SPEC.size * VECTOR / 16
    return {
        FORWARD: base[FORWARD],
        CHUNKS: chunks._replace(bytes=moved, programs=ends.programs, chunks=ends.chunks),
    }


DERIVED: dict[str, Callable[[dict[str, Kernel]], dict[str, Kernel]]] = {
    "two chunks of 16 side by side": side_by_side,
    "value rows over two programs": value_slices,
    "local parts in a parallel kernel before": local_parts_before,
    "one fused backward kernel": fused_backward,
}
SCANS = "tiles tokens by channels, sums by a scan"


def kernels_of(design: str, card: str) -> dict[str, Kernel]:
    if design == SCANS:
        # A scan of four shuffles for the first product, and nothing stays in place.
        costs = costs_of(card)
        saved = costs.shared + costs.barrier + 2 * costs.matrix - 4 * costs.shuffle
        traced = trace(card, {}, in_place=False)
        return {
            name: x._replace(path=x.path - saved, products=x.products - 1)
            for name, x in traced.items()
        }
    if design in DERIVED:
        return DERIVED[design](trace(card, {}))
    return trace(card, TUNED[design])


# Floors and tables.


def clock_mhz(card: str) -> float:
    return 1e3 * CLOCK_GHZ.get(card, GPU_TARGETS[card].clock_ghz)


def fit_of(replayed: dict, card: str, design: str, name: str) -> int:
    """Programs of a kernel on a core at a time; of one that was not compiled, as the chosen's."""
    compiled_here = replayed.get(design, {}).get(card, {})
    of = compiled_here if name in compiled_here else replayed[CHOSEN][card]
    kernel = of.get(name, of[CHUNKS])
    return resident(kernel["registers"], 8 if "eight" in design else 4)


def floors(replayed: dict, design: str, card: str) -> dict[str, dict[str, Any]]:
    """By kernel: its figures and, in µs, both floors and what the machine code takes."""
    target, clock = GPU_TARGETS[card], clock_mhz(card)
    found = {}
    for name, kernel in kernels_of(design, card).items():
        fit = fit_of(replayed, card, design, name)
        rounds = math.ceil(kernel.programs / (target.core_count * fit))
        found[name] = kernel._asdict() | {
            "rounds": rounds,
            "bytes_us": round(_token_heads() * kernel.bytes / target.bandwidth_gb_s / 1e3, 1),
            "path_us": round(rounds * kernel.chunks * kernel.path / clock, 1),
        }
        replay = replayed.get(design, {}).get(card, {}).get(name)
        if replay:
            turn = in_rounds(kernel.programs, target.core_count, fit, replay["cycles"])
            found[name]["stream_us"] = round(kernel.chunks * turn / clock, 1)
    return found


def prediction_ms(replays_of: dict, card: str, spec: ArgSpec, kernels: dict[str, Kernel]) -> float:
    """Forward and backward at another batch and head count: the larger of bytes and stream each."""
    target, total = GPU_TARGETS[card], 0.0
    scale = spec.batch * spec.head / (SPEC.batch * SPEC.head)
    for name, kernel in kernels.items():
        replay = replays_of[name]
        programs, fit = round(kernel.programs * scale), resident(replay["registers"])
        turn = in_rounds(programs, target.core_count, fit, replay["cycles"])
        moved = spec.batch * spec.time * spec.head * kernel.bytes / target.bandwidth_gb_s / 1e6
        total += max(moved, kernel.chunks * turn / clock_mhz(card) / 1e3)
    return total


def designs_table(results: dict) -> str:
    heads = " | ".join(f"{card}: bytes / path / stream, µs" for card in CARDS)
    lines = [f"| design | B a token-head | programs | products | {heads} |", "|---" * 6 + "|"]
    for design, cards in results["designs"].items():
        first = cards[CARDS[0]].values()
        cells = [
            " + ".join(f"{x['bytes']:.0f}" for x in first),
            " + ".join(f"{x['programs']}" for x in first),
            " + ".join(f"{x['products']}" for x in first),
        ]
        for card in CARDS:
            rows = cards[card].values()
            sums = [sum(row[key] for row in rows) for key in ("bytes_us", "path_us")]
            cell = " / ".join(f"{x:.0f}" for x in sums)
            if all("stream_us" in row for row in rows):
                spill = max(x["spill"] for x in results["replays"][design][card].values())
                total = sum(max(row["bytes_us"], row["stream_us"]) for row in rows)
                cell += f" / {total:.0f}" + (f" ({spill} B spilt)" if spill > 32 else "")
            else:
                cell += " / –"
            cells.append(cell)
        lines.append(f"| {design} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kernels_table(results: dict) -> str:
    lines = [
        "| kernel | card | programs, rounds | path (on the state) | stream: 1, 2, 3 a core "
        "| bytes / path / stream, µs |",
        "|---" * 6 + "|",
    ]
    for card, name in itertools.product(CARDS, KERNELS):
        row = results["designs"][CHOSEN][card][name]
        counts = ", ".join(map(str, results["replays"][CHOSEN][card][name]["cycles"][:3]))
        times = " / ".join(f"{row[key]:.0f}" for key in ("bytes_us", "path_us", "stream_us"))
        path = f"{row['path']:.0f} ({row['carried_path']:.0f})"
        programs = f"{row['programs']}, {row['rounds']}"
        lines.append(f"| {name} | {card} | {programs} | {path} | {counts} | {times} |")
    return "\n".join(lines)


def sensitivity_table(results: dict) -> str:
    lines = ["| figure | cycles | at half | at double |", "|---" * 4 + "|"]
    for name, row in results["sensitivity"]["figures"].items():
        lines.append(f"| {name} | {row['cycles']} | {row['half']:.2f} | {row['double']:.2f} |")
    return "\n".join(lines)


LOG = DOCS.with_name("log.md")
# Where each is: the kernels as they are in their page, what was weighed in the log.
TABLES = {
    "floors": (DOCS, kernels_table),
    "designs": (LOG, designs_table),
    "sensitivity": (LOG, sensitivity_table),
}


# With the compiler.


def machine_code(card: str, changes: dict[str, Any]) -> tuple[dict, dict]:
    """By kernel: registers and bytes of spill, and the main loop's instructions."""
    with tuned(changes):
        made = compiled(Row(card, SPEC.size, False))
    code = {}
    for ptx in made.ptx:
        code |= loops(GPU_TARGETS[card], ptx)
    kernels = {
        name: {"registers": x.registers, "spill": x.spill_bytes}
        for name, x in made.kernels.items()
        if name in KERNELS
    }
    return kernels, {name: code[name] for name in kernels}


def replayed_with(kernels: dict, code: dict, costs: Costs) -> dict[str, dict[str, Any]]:
    return {name: x | {"cycles": replays(code[name], costs)} for name, x in kernels.items()}


def main() -> None:
    outputs = command.tables_parser(__doc__).parse_args().output
    replayed: dict[str, dict] = {}
    chosen = {}
    for design, changes in TUNED.items():
        replayed[design] = {}
        for card in CARDS:
            print(f"{design}, {card}", flush=True)
            try:
                kernels, code = machine_code(card, changes)
            except jax.errors.JaxRuntimeError as error:
                print(str(error).splitlines()[0])
                continue
            replayed[design][card] = replayed_with(kernels, code, costs_of(card))
            if design == CHOSEN:
                chosen[card] = kernels, code
    names = [*TUNED, SCANS, *DERIVED]
    results = {
        "shape": SPEC._asdict(),
        "jax": jax.__version__,
        "designs": {x: {card: floors(replayed, x, card) for card in CARDS} for x in names},
    }
    card, spec = "h100", ARG_SPECS["7.2b_micro_batch_8"]
    traced, costs, figures = trace(card, {}), costs_of(card), {}
    for name, value in costs._asdict().items():
        low, high = costs._replace(**{name: value // 2}), costs._replace(**{name: value * 2})
        half, double = (
            prediction_ms(replayed_with(*chosen[card], x), card, spec, traced) for x in (low, high)
        )
        figures[name] = {"cycles": value, "half": round(half, 2), "double": round(double, 2)}
    predicted = prediction_ms(replayed[CHOSEN][card], card, spec, traced)
    results["sensitivity"] = {
        "card": card,
        "shape": spec._asdict(),
        "ms": round(predicted, 2),
        "figures": figures,
    }
    results["replays"] = replayed
    for name, (page, table) in TABLES.items():
        print(table(results))
        for path in outputs:
            if path.name == page.name:
                replace(path, name, table(results))
    for path in outputs:
        if path.suffix != ".md":
            machine.write(path, results)
    print(f"{results['sensitivity']['ms']} ms at {results['sensitivity']['shape']}")


if __name__ == "__main__":
    run_command(main)
