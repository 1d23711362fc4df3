"""How far bf16 gradients are from float32's: the same weights, the same batch, per parameter.

    JAX_PLATFORMS=cpu python -m benchmarks.bf16_gradients

Prints a line for each tensor and writes benchmarks/results/bf16_gradients.json. The error of a
gradient is ‖bf16 − float32‖ / ‖float32‖ over all layers, both at the same weights (which bf16 holds
exactly); the median of some seeds' is reported. Blocks are recomputed, as in a run on a GPU.
"""

import functools
import json
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import describe
from rwkv_jax.config import ModelConfig
from rwkv_jax.initialisation import init_params
from rwkv_jax.loss import head_loss
from rwkv_jax.model import Params, bind

RESULT = Path(__file__).parent / "results" / "bf16_gradients.json"
MODEL = ModelConfig(n_layer=4, n_embd=128, vocab_size=512)
BATCH, TIME = 4, 256
SEEDS = 3


def weights(model: ModelConfig, seed: int) -> Params:
    """bf16 weights at which every tensor matters; a fresh model has zeros among them."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.05 * rng.standard_normal(leaf.shape), jnp.bfloat16),
        init_params(model, seed),
    )


@functools.partial(jax.jit, static_argnums=0)
def gradients(model: ModelConfig, params: Params, tokens: jax.Array) -> Params:
    """Of the loss of predicting tokens[:, 1:], in the parameters' dtype."""

    def loss(params: Params) -> jax.Array:
        bound = bind(model, params)
        hidden, _ = bound.hidden(tokens[:, :-1], remat=1)
        return head_loss(hidden, bound.head.weight[...], tokens[:, 1:])

    return jax.grad(loss)(params)


def errors(model: ModelConfig, batch: int, time: int, seed: int) -> dict[str, float]:
    """‖bf16 − float32‖ / ‖float32‖ of each tensor's gradient, by its name."""
    params = weights(model, seed)
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, model.vocab_size, (batch, time + 1)), jnp.int32)
    with jax.default_matmul_precision("highest"):
        exact = gradients(model, jax.tree.map(lambda p: p.astype(jnp.float32), params), tokens)
    rounded = gradients(model, params, tokens)

    def error(ours: jax.Array, exact: jax.Array) -> float:
        difference = np.float64(ours) - np.float64(exact)
        return float(np.linalg.norm(difference) / np.linalg.norm(np.float64(exact)))

    found = jax.tree.map_with_path(
        lambda path, a, b: (".".join(key.key for key in path), error(a, b)), rounded, exact
    )
    return dict(jax.tree.leaves(found, is_leaf=lambda x: isinstance(x, tuple)))


def main() -> None:
    runs = [errors(MODEL, BATCH, TIME, seed) for seed in range(SEEDS)]
    medians = {name: round(statistics.median(run[name] for run in runs), 5) for name in runs[0]}
    for name, error in medians.items():
        print(f"{name:32} {error:.2%}")
    shape = {"layers": MODEL.n_layer, "width": MODEL.n_embd, "batch": BATCH, "time": TIME}
    record = {"machine": describe(), **shape, "seeds": SEEDS, "median error": medians}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
