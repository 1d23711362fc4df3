"""Compares WKV-7 forward and backward on a CPU with a torch loop.

    python -m benchmarks.wkv7_cpu [--output PATH]

Prints a row of a markdown table. The two are timed alternately, so that what else the machine does
hits both. The result is the ratio of the best times: on a busy machine the torch loop's many small
operations suffer most, and the ratio of the medians flatters us.
"""

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command, machine
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.arg_specs import ARG_SPECS
from rwkv_jax.errors import run_command

if TYPE_CHECKING:
    import torch

SPEC = ARG_SPECS["0.1b_short"]
REPEATS = 7


def inputs() -> list[np.ndarray]:
    """(r, w, k, v, a, b, dy) as a fresh model has them: unit removal keys, rates near one half."""
    rng = np.random.default_rng(0)
    r, w, k, v, kk, dy = (rng.standard_normal(SPEC, dtype=np.float32) for _ in range(6))
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    return [r, w, k, v, -kk, kk * np.float32(0.5), dy]


def ours(*arrays: jax.Array) -> list[jax.Array]:
    *tokens, dy = arrays
    y, vjp = jax.vjp(wkv7, *tokens)
    return [y, *vjp(dy)]


def torch_loop(*arrays: "torch.Tensor") -> "list[torch.Tensor]":
    import torch

    *tokens, dy = arrays
    tokens = [x.detach().requires_grad_() for x in tokens]
    r, w, k, v, a, b = tokens
    decay = torch.exp(-torch.exp(-torch.nn.functional.softplus(-w) - 0.5))
    state = torch.zeros(SPEC.batch, SPEC.head, SPEC.size, SPEC.size)
    outputs = []
    for t in range(SPEC.time):
        removed = state @ a[:, t, :, :, None]
        state = (
            state * decay[:, t, :, None]
            + removed @ b[:, t, :, None]
            + v[:, t, :, :, None] @ k[:, t, :, None]
        )
        outputs.append((state @ r[:, t, :, :, None])[..., 0])
    y = torch.stack(outputs, 1)
    y.backward(dy)
    return [y.detach(), *(x.grad for x in tokens)]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    options = command.record_parser(__doc__).parse_args()
    import torch

    arrays = inputs()
    jax_arrays, torch_arrays = map(jnp.asarray, arrays), map(torch.tensor, arrays)
    jax_arrays, torch_arrays = tuple(jax_arrays), tuple(torch_arrays)
    compiled = jax.jit(ours).lower(*jax_arrays).compile()
    for x, y in zip(compiled(*jax_arrays), torch_loop(*torch_arrays), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3)

    times: dict[str, list[float]] = {"xla": [], "torch": []}
    for _ in range(REPEATS):
        times["torch"].append(seconds(lambda: torch_loop(*torch_arrays)))
        times["xla"].append(seconds(lambda: jax.block_until_ready(compiled(*jax_arrays))))
    median = {name: statistics.median(values) for name, values in times.items()}
    best = {name: min(values) for name, values in times.items()}
    result = machine.record("wkv7_cpu") | {
        "shape": SPEC._asdict(),
        "dtype": "float32",
        "median_seconds": median,
        "best_seconds": best,
        "ratio_of_best": best["torch"] / best["xla"],
        "ratio_of_medians": median["torch"] / median["xla"],
    }
    if options.output:
        machine.write(options.output, result)
    print("| CPU | cores | chunked XLA | torch loop | ratio |\n|---|---|---|---|---|")
    print(
        f"| {result['machine']['cpu']} | {result['machine']['cores']} | {best['xla'] * 1e3:.0f} ms "
        f"| {best['torch'] * 1e3:.0f} ms | {result['ratio_of_best']:.1f} |"
    )


if __name__ == "__main__":
    run_command(main)
