"""Times the WKV-7 implementations on a GPU.

    python -m benchmarks.wkv7_gpu [--shapes 0.1b_micro_batch_8 8,4096,64,64] [--output PATH]

Every implementation, forward and forward with backward, beside the time that the card needs for the
algorithm's own bytes at the bandwidth of a plain copy, measured in the same run. Before each timing
matrices are multiplied until that gets no faster: an idle card's clocks are low.

The share of that floor (`of_byte_floor`) is given where it says something of the kernels: where a
call takes at least `DISPATCH_TIMES` as long as an empty program with as many arguments and results
(`dispatch_ms`, measured in the same run). Below, the host's work may be what is timed.

On a CPU everything runs in the same way; its times mean nothing.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command, gpu_inputs, machine, timing
from pallas_kernels.wkv7.api import IMPLEMENTATIONS, wkv7
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec
from rwkv_jax.device.runtime import prepare_jax
from rwkv_jax.errors import run_command

# Bytes that any chunked kernel with nothing saved must move, in units of one [B,T,H,N] array:
# six in and one out; seven in (dy) and six out.
FLOOR_ARRAYS = {"forward": 7, "forward_backward": 7 + 13}
DISPATCH_TIMES = 3
CLOCK_SECONDS = 2.0  # that clocks get to rise, at the most

Inputs = tuple[jax.Array, ...]


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def median_seconds(function: Callable, inputs: list[Any]) -> float:
    """Of a call; inputs are rotated so that none is found in a cache."""

    def call(i: int) -> Any:
        return function(*inputs[i % len(inputs)])

    return timing.median_seconds(call, jax.block_until_ready, raise_clocks)


def raise_clocks() -> None:
    """Multiplies matrices until that has not become faster for a while."""
    product, x = _product()
    best, slower, end = math.inf, 0, time.monotonic() + CLOCK_SECONDS
    while slower < 25 and time.monotonic() < end:
        start = time.perf_counter()
        for _ in range(8):
            y = product(x)
        jax.block_until_ready(y)
        took = time.perf_counter() - start
        slower = 0 if took < 0.99 * best else slower + 1
        best = min(best, took)


@functools.cache
def _product() -> tuple[Callable, jax.Array]:
    side = 8192 if on_gpu() else 64
    x = jnp.full((side, side), 1e-4, jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    return product, x


def copy_bandwidth() -> float:
    """Bytes a second of reading and writing an array that is larger than any cache."""
    size = 2 * timing.beyond_cache(on_gpu())
    copy = jax.jit(lambda x: x + 1)
    inputs = [(jnp.full(size // 4, i, jnp.float32),) for i in range(2)]
    return 2 * size / median_seconds(copy, inputs)


def dispatch_seconds() -> float:
    """Of a call that computes next to nothing, with the arguments and results of a forward and
    backward pass.
    """
    empty = jax.jit(lambda *x: (*x, *(y + 1 for y in x), x[0]))
    return median_seconds(empty, [tuple(jnp.full(1, i, jnp.float32) for i in range(6))])


@functools.partial(jax.jit, static_argnums=0)
def draw(spec: ArgSpec, seed: np.uint32) -> Inputs:
    """r, w, k, v, a, b as RWKV-7 has them, −a a unit vector, b along it."""
    r, w, k, v, kk, rate = (
        jax.random.normal(x, tuple(spec), jnp.float32)
        for x in jax.random.split(jax.random.key(seed), 6)
    )
    kk = kk / jnp.linalg.norm(kk, axis=-1, keepdims=True)
    arrays = (r, w - 4.0, k, v, -kk, kk * jax.nn.sigmoid(rate))
    return tuple(x.astype(jnp.bfloat16) for x in arrays)


def random_inputs(spec: ArgSpec) -> list[Inputs]:
    """Two sets of `draw`, or as many as no cache holds; all by one program."""
    sets = timing.copies(on_gpu(), 2 * math.prod(spec))
    return [draw(spec, np.uint32(seed)) for seed in range(sets)]


def passes(implementation: str) -> dict[str, Callable]:
    op = functools.partial(wkv7, implementation=implementation)

    def forward_backward(*inputs):
        y, vjp = jax.vjp(op, *inputs)
        return y, vjp(y)

    return {"forward": jax.jit(op), "forward_backward": jax.jit(forward_backward)}


def measure(shapes: dict[str, ArgSpec], implementations: list[str], path: Path | None) -> None:
    device = jax.devices()[0]
    bandwidth, dispatch = copy_bandwidth(), dispatch_seconds()
    print(f"{device.device_kind}: a copy moves {bandwidth / 1e9:.0f} GB/s", flush=True)
    print(f"an empty program takes {1e3 * dispatch:.3f} ms", flush=True)
    result = machine.record("wkv7") | {
        "device_kind": device.device_kind,
        "on_gpu": on_gpu(),
        "copy_gb_s": bandwidth / 1e9,
        "dispatch_ms": 1e3 * dispatch,
        "rows": [],
    }
    for implementation, (name, spec) in itertools.product(implementations, shapes.items()):
        for row in rows_of(spec, implementation, bandwidth, dispatch):
            print(f"{name} {implementation} {row['pass']}: {outcome(row)}", flush=True)
            result["rows"].append({"shape": name, **row})
            if path:
                machine.write(path, result)


def rows_of(
    spec: ArgSpec, implementation: str, bandwidth: float, dispatch: float
) -> Iterator[dict[str, Any]]:
    """A row for each pass on one shape's inputs."""
    inputs: list[Inputs] = []
    for direction, function in passes(implementation).items():
        floor = FLOOR_ARRAYS[direction] * 2 * math.prod(spec) / bandwidth
        row: dict[str, Any] = {
            **spec._asdict(),
            "implementation": implementation,
            "pass": direction,
            "byte_floor_ms": 1e3 * floor,
        }
        try:
            inputs = inputs or random_inputs(spec)
            seconds = median_seconds(function, inputs)
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            # This card cannot run it, or it does not fit; the others are timed.
            row["error"] = str(error).splitlines()[0]
        else:
            share = floor / seconds if seconds >= DISPATCH_TIMES * dispatch else None
            row |= {"ms": 1e3 * seconds, "of_byte_floor": share}
        yield row


def outcome(row: dict[str, Any]) -> str:
    if "error" in row:
        return row["error"]
    share = row["of_byte_floor"]
    bound = "bound by dispatch" if share is None else f"{share:.0%} of the byte floor"
    return f"{row['ms']:.3f} ms, {bound}"


def main() -> None:
    parser = command.record_parser(__doc__, "write the record (JSON) here, row by row")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=list(ARG_SPECS),
        metavar="SHAPE",
        help=f"B,T,H,N, or one of {', '.join(ARG_SPECS)} (default: all of these)",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        default=["pallas_triton", "xla"],
        help="default pallas_triton xla",
    )
    options = parser.parse_args()
    shapes = dict(map(gpu_inputs.shape, options.shapes))
    prepare_jax()
    if not on_gpu():
        print("no GPU: this rehearses the benchmark on a CPU, and its times mean nothing")
    measure(shapes, options.implementations, options.output)


if __name__ == "__main__":
    run_command(main)
