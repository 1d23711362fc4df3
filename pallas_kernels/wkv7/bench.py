"""Times WKV-7 on this machine's GPU: `python -m pallas_kernels.wkv7.bench [--output DIR]`.

Every implementation, forward and forward with backward, on the shapes of `arg_specs`, beside the
time that the card needs for the algorithm's own bytes at the bandwidth of a plain copy, measured
in the same run. Writes DIR/wkv7_<card>.json.
"""

import argparse
import functools
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.wkv7.api import wkv7
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec

# Bytes that any chunked kernel with nothing saved must move, in units of one [B,T,H,N] array:
# six in and one out; seven in (dy) and six out.
FLOOR_ARRAYS = {"forward": 7, "forward_backward": 7 + 13}
WARM_UP, RUNS, ROTATION = 3, 20, 3


def median_seconds(function: Callable, inputs: list[Any]) -> float:
    """Of single calls after a warm-up; inputs are rotated so that none is found in a cache."""
    for i in range(WARM_UP):
        jax.block_until_ready(function(*inputs[i % len(inputs)]))
    seconds = []
    for i in range(RUNS):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs[i % len(inputs)]))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def copy_bandwidth() -> float:
    """Bytes a second of reading and writing 512 MiB."""
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    inputs = [(jnp.zeros(2**28, jnp.bfloat16) + i,) for i in range(ROTATION)]
    return 2 * inputs[0][0].nbytes / median_seconds(copy, inputs)


def random_inputs(spec: ArgSpec) -> list[tuple[jax.Array, ...]]:
    """`ROTATION` sets of r, w, k, v, a, b as RWKV-7 has them: −a a unit vector, b along it."""

    @jax.jit
    def draw(key):
        r, w, k, v, kk, rate = (
            jax.random.normal(x, tuple(spec), jnp.float32) for x in jax.random.split(key, 6)
        )
        kk = kk / jnp.linalg.norm(kk, axis=-1, keepdims=True)
        arrays = (r, w - 4.0, k, v, -kk, kk * jax.nn.sigmoid(rate))
        return tuple(x.astype(jnp.bfloat16) for x in arrays)

    return [draw(jax.random.key(seed)) for seed in range(ROTATION)]


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
        inputs = random_inputs(spec)
        for implementation in implementations:
            for direction, function in passes(implementation).items():
                floor = FLOOR_ARRAYS[direction] * inputs[0][0].nbytes / bandwidth
                row = {
                    "shape": name,
                    **spec._asdict(),
                    "implementation": implementation,
                    "pass": direction,
                    "byte_floor_ms": 1e3 * floor,
                }
                try:
                    seconds = median_seconds(function, inputs)
                except jax.errors.JaxRuntimeError as error:  # the XLA form may not fit
                    rows.append(row | {"error": str(error).splitlines()[0]})
                    print(f"{name} {implementation} {direction}: {rows[-1]['error']}")
                    continue
                rows.append(row | {"ms": 1e3 * seconds, "of_byte_floor": floor / seconds})
                print(
                    f"{name} {implementation} {direction}: {1e3 * seconds:.3f} ms, "
                    f"{100 * floor / seconds:.0f} % of the byte floor"
                )
    return {
        "card": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_gb_s": bandwidth / 1e9,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--implementations", nargs="+", default=["pallas_triton", "xla"])
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
