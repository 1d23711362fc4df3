"""Times WKV-7 on this machine's GPU: `python -m pallas_kernels.wkv7.bench [--output DIR]`.

Every implementation, forward and forward with backward, on the shapes of `arg_specs`, beside the
time that the card needs for the algorithm's own bytes at the bandwidth of a plain copy, measured
in the same run. Writes DIR/wkv7_<card>.json.
"""

import argparse
import functools
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.wkv7.api import IMPLEMENTATIONS, wkv7
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec

# Bytes that any chunked kernel with nothing saved must move, in units of one [B,T,H,N] array:
# six in and one out; seven in (dy) and six out.
FLOOR_ARRAYS = {"forward": 7, "forward_backward": 7 + 13}
WARM_UP, RUNS = 3, 20
RUN_SECONDS = 5e-3  # a run is as many calls as this takes: to launch one is not free
COPY_BYTES = 2**29
ROTATED_BYTES = 2**28  # of inputs at the least: twice the largest cache, a PRO 6000's


def median_seconds(function: Callable, inputs: list[Any]) -> float:
    """Of a call, over runs after a warm-up; inputs are rotated so that none is found in a cache."""

    def run(calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            result = function(*inputs[i % len(inputs)])  # what a call before it made may go
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    single = min(run(1) for _ in range(1 + WARM_UP))
    calls = max(1, round(RUN_SECONDS / single))
    return statistics.median(run(calls) for _ in range(RUNS))


def copy_bandwidth() -> float:
    """Bytes a second of reading and writing `COPY_BYTES`, larger than any cache."""
    copy = jax.jit(lambda x: x + 1)
    inputs = [(jnp.full(COPY_BYTES // 4, i, jnp.float32),) for i in range(2)]
    return 2 * COPY_BYTES / median_seconds(copy, inputs)


def random_inputs(spec: ArgSpec) -> list[tuple[jax.Array, ...]]:
    """Sets of r, w, k, v, a, b as RWKV-7 has them, −a a unit vector, b along it; two or more."""

    @jax.jit
    def draw(key):
        r, w, k, v, kk, rate = (
            jax.random.normal(x, tuple(spec), jnp.float32) for x in jax.random.split(key, 6)
        )
        kk = kk / jnp.linalg.norm(kk, axis=-1, keepdims=True)
        arrays = (r, w - 4.0, k, v, -kk, kk * jax.nn.sigmoid(rate))
        return tuple(x.astype(jnp.bfloat16) for x in arrays)

    sets = max(2, math.ceil(ROTATED_BYTES / (6 * 2 * math.prod(spec))))
    return [draw(jax.random.key(seed)) for seed in range(sets)]


def passes(implementation: str) -> dict[str, Callable]:
    op = functools.partial(wkv7, implementation=implementation)

    def forward_backward(*inputs):
        y, vjp = jax.vjp(op, *inputs)
        return y, vjp(y)

    return {"forward": jax.jit(op), "forward_backward": jax.jit(forward_backward)}


def measure(implementations: list[str]) -> dict[str, Any]:
    bandwidth = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for name, spec in ARG_SPECS.items():
        for implementation in implementations:
            for direction, function in passes(implementation).items():
                array_bytes = 2 * math.prod(spec)
                floor = FLOOR_ARRAYS[direction] * array_bytes / bandwidth
                row = {
                    "shape": name,
                    **spec._asdict(),
                    "implementation": implementation,
                    "pass": direction,
                    "byte_floor_ms": 1e3 * floor,
                }
                try:
                    seconds = median_seconds(function, random_inputs(spec))
                except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
                    # This card cannot run it, or it does not fit; the others are timed.
                    row["error"] = str(error).splitlines()[0]
                    outcome = row["error"]
                else:
                    row |= {"ms": 1e3 * seconds, "of_byte_floor": floor / seconds}
                    outcome = f"{row['ms']:.3f} ms, {row['of_byte_floor']:.0%} of the byte floor"
                print(f"{name} {implementation} {direction}: {outcome}", flush=True)
                rows.append(row)
    return {
        "card": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_gb_s": bandwidth / 1e9,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        default=["pallas_triton", "xla"],
    )
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("there is no GPU here: this benchmark times GPU kernels")
    results = measure(arguments.implementations)
    card = re.sub(r"\W+", "_", results["card"]).strip("_").lower()
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"wkv7_{card}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(partial, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
