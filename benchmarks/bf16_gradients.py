"""Error of bf16 gradients relative to float32 gradients, per parameter.

    JAX_PLATFORMS=cpu python -m benchmarks.bf16_gradients [--output PATH]

Prints a line for each tensor of a block. A block is differentiated alone and in the middle of a
text, from a random state: at a text's first tokens the group norm magnifies the rounding of its own
input, whatever else is rounded. The error of a gradient is ‖bf16 − float32‖ / ‖float32‖, both at
weights and inputs that bf16 holds exactly; the median of some seeds' is reported.
"""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import command, machine
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import run_command
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.model.rwkv7 import Block, Params

WIDTH, BATCH, TIME, SEEDS = 128, 2, 128, 9

# What the program says is rounded is, on any backend: XLA may otherwise leave a rounding out.
OPTIONS: Any = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}


def median_errors(width: int, batch: int, time: int, seeds: int) -> dict[str, float]:
    """‖bf16 − float32‖ / ‖float32‖ of the gradient of each of a block's tensors, by its name."""
    config = ModelConfig(n_layer=2, n_embd=width, vocab_size=32)
    graphdef = nnx.split(nnx.eval_shape(lambda: Block(config)))[0]
    H, N = config.n_head, config.head_size

    def gradients(params: Params, x: jax.Array, v_first: jax.Array, dy: jax.Array, wkv: jax.Array):
        def product(params: Params) -> jax.Array:
            block, before = nnx.merge(graphdef, params), jnp.zeros_like(x[:, 0])
            y, _ = block.att(block.ln1(x), before, wkv, v_first, jnp.array(False))
            y = y + block.ffn(block.ln2(x + y), before)
            return jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32))

        return jax.grad(product)(params)

    def arguments(seed: int) -> list[Any]:
        rng = np.random.default_rng(seed)

        def normal(*shape: int, dtype=jnp.bfloat16) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape), dtype)

        params = jax.tree.map(  # the second layer's, but for the zeros that a fresh model has
            lambda leaf: jnp.asarray(leaf[1] + 0.05 * rng.standard_normal(leaf[1].shape)).astype(
                jnp.bfloat16
            ),
            init_params(config, seed)["blocks"],
        )
        tokens = [normal(batch, time, width) for _ in range(3)]
        return [params, *tokens, normal(batch, H, N, N, dtype=jnp.float32)]

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def compiled(of: list[Any]) -> Any:
        return jax.jit(gradients).lower(*of).compile(OPTIONS)

    first = arguments(0)
    rounded, exact = compiled(first), compiled(wide(first))
    errors: dict[str, list[float]] = {}
    for seed in range(seeds):
        of = arguments(seed)
        ours, expected = rounded(*of), exact(*wide(of))
        for (path, a), b in zip(
            jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True
        ):
            error = np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b))
            errors.setdefault(".".join(key.key for key in path), []).append(float(error))
    return {name: statistics.median(of) for name, of in errors.items()}


def main() -> None:
    options = command.record_parser(__doc__).parse_args()
    medians = median_errors(WIDTH, BATCH, TIME, SEEDS)
    for name, error in medians.items():
        print(f"{name:24} {error:.2%}")
    shape = {"width": WIDTH, "batch": BATCH, "time": TIME, "seeds": SEEDS}
    errors = {name: round(error, 5) for name, error in medians.items()}
    if options.output:
        record = machine.record("bf16_gradients") | shape | {"median error": errors}
        machine.write(options.output, record)


if __name__ == "__main__":
    run_command(main)
