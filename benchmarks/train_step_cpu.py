"""Compares the 0.1b training step on a CPU with torch and with its own matrix products.

    python -m benchmarks.train_step_cpu [--repeats 5] [--torch-repeats 2] [--output PATH]

B 1, T 512, V 65536, fp32, no recomputation (grad_cp 0), everything from the batch to the updated
weights: forward, backward, clipping, Adam. Three processes, each with one contender in a memory of
its own, take turns, so that other load affects all of them equally:

- `ours`: the step that `python -m rwkv_jax.train` runs;
- `torch`: tests/support/torch_rwkv7.py, autograd and torch.optim.AdamW, WKV token by token;
- `products`: y = x Wᵀ, dx = dy W and dW = dyᵀ x of each linear layer, low-rank ones and head
  included, as plain jitted `jnp.dot` calls on the same XLA backend. That is what the mathematics
  of the step needs and no more: WKV's own products, recomputed ones and the value residual of
  layer 0, which is not used, are not among them.

Other programs on the machine stretch wall time, and not all three alike; CPU seconds, of both cores
together, are the steadier figure, so both are given.

Prints the row of the table.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import command, machine
from rwkv_jax.checkpoints import weights
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.model.rwkv7 import abstract_params
from rwkv_jax.parallel import sharding
from rwkv_jax.training.optimizer import learning_rate, make_optimizer
from rwkv_jax.training.step import TrainState, make_step

T = 512
WARM_UP = 2  # turns that are not counted: compiling, and memory that is new to the process
MODEL = TrainConfig(size="0.1b").model_config()
TRAIN = TrainConfig()


def random_params(seed: int = 0) -> dict:
    """Of ordinary size in every tensor: no zeros that would spare someone work."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        one = path[-2:][0].key.startswith("ln") and path[-1].key == "weight"
        return 0.02 * rng.standard_normal(leaf.shape, np.float32) + np.float32(one)

    return jax.tree.map_with_path(draw, abstract_params(MODEL))


def ours(params: dict, tokens: np.ndarray) -> Callable[[], float]:
    adam = make_optimizer(TRAIN, learning_rate(TRAIN, MODEL.n_embd, 0, 1000.0))
    mesh = sharding.make_mesh(1)
    run = make_step(
        MODEL, adam, mesh, sharding.STRATEGIES["deepspeed_stage_2"], jnp.float32, remat=False
    )
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(params, jax.jit(adam.init)(params))
    batch = jax.device_put(tokens[None], sharding.batch_sharding(mesh))

    def step() -> float:
        nonlocal state
        state, metrics = run(state, batch)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return step


def torchs(params: dict, tokens: np.ndarray) -> Callable[[], float]:
    import torch

    from tests.support import torch_rwkv7

    official = weights.to_official(params)
    theirs = {
        name: torch.from_numpy(np.array(tensor)).requires_grad_()
        for name, tensor in official.items()
    }
    adamw = torch_rwkv7.adamw(theirs, TRAIN.weight_decay)
    batch = torch.from_numpy(tokens).long()
    first_rate = float(learning_rate(TRAIN, MODEL.n_embd, 0, 1000.0)(jnp.int32(0)))

    def step() -> float:
        loss, _ = torch_rwkv7.train_step(theirs, adamw, batch[:, :-1], batch[:, 1:], lr=first_rate)
        return loss

    return step


def linear_layers(config: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of each product with a weight in the model's forward pass."""
    C, F = config.n_embd, config.dim_ffn
    low_rank = {"w": config.dim_w, "a": config.dim_a, "v": config.dim_v, "g": config.dim_g}
    layers = []
    for layer in range(config.n_layer):
        layers += 4 * [(C, C)] + [(C, F), (F, C)]
        for name, width in low_rank.items():
            if layer > 0 or name != "v":
                layers += [(C, width), (width, C)]
    return layers + [(C, config.vocab_size)]


def products(config: ModelConfig) -> Callable[[], float]:
    forward = jax.jit(lambda x, w: jnp.dot(x, w.T))
    d_input = jax.jit(jnp.dot)
    d_weight = jax.jit(lambda dy, x: jnp.dot(dy.T, x))
    rng = np.random.default_rng(0)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    layers = linear_layers(config)
    tall = {width: matrix(T, width) for layer in layers for width in layer}
    matrices = [matrix(out, inner) for inner, out in layers]

    def step() -> float:
        for w in matrices:
            dy, x = tall[w.shape[0]], tall[w.shape[1]]
            # Waiting keeps one product at a time on the cores, and lets its result go.
            jax.block_until_ready(forward(x, w))
            jax.block_until_ready(d_input(dy, w))
            jax.block_until_ready(d_weight(dy, x))
        return 0.0

    return step


def contender(name: str, pipe: Connection) -> None:
    """In a process of its own: a turn when told to, answered with seconds, CPU seconds, loss."""
    if name == "products":
        run = products(MODEL)
    else:
        tokens = np.random.default_rng(1).integers(0, MODEL.vocab_size, (1, T + 1), np.int32)
        run = {"ours": ours, "torch": torchs}[name](random_params(), tokens)
    while pipe.recv():
        run()  # the step before the timed one is of the same program, as it is in training
        began, began_cpu = time.perf_counter(), time.process_time()
        loss = run()
        pipe.send((time.perf_counter() - began, time.process_time() - began_cpu, loss))


def main() -> None:
    parser = command.record_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (5)")
    parser.add_argument("--torch-repeats", type=int, default=2, help="those of torch (2); 0: none")
    options = parser.parse_args()

    names = ["products", "ours"] + (["torch"] if options.torch_repeats else [])
    spawn = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=contender, args=(name, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in names}
    losses = {}
    for repeat in range(-WARM_UP, options.repeats):
        for name in names:
            if name == "torch" and not -1 <= repeat < options.torch_repeats:
                continue
            pipes[name].send(True)
            took, cpu, loss = pipes[name].recv()
            turn = "warm-up" if repeat < 0 else repeat
            print(f"{name:>8} {turn}: {took:.2f} s, {cpu:.2f} CPU s", flush=True)
            losses.setdefault(name, loss)
            if repeat >= 0:
                seconds[name].append(took)
                cpu_seconds[name].append(cpu)
    for pipe in pipes.values():
        pipe.send(False)
    if "torch" in losses and abs(losses["ours"] - losses["torch"]) > 1e-3:
        raise UserError(f"the two steps are not the same: losses {losses}")

    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = sum(3 * 2 * T * inner * out for inner, out in linear_layers(MODEL))
    median_cpu = {name: statistics.median(values) for name, values in cpu_seconds.items()}
    ratios = {
        "ours / products": median["ours"] / median["products"],
        "ours / products, CPU seconds": median_cpu["ours"] / median_cpu["products"],
    }
    if "torch" in median:
        ratios["torch / ours"] = median["torch"] / median["ours"]
    result = machine.record("train_step_cpu") | {
        "what": "0.1b training step, B 1, T 512, V 65536, fp32, grad_cp 0, seconds",
        "seconds": seconds,
        "median": median,
        "cpu_seconds": cpu_seconds,
        "median_cpu": median_cpu,
        "ratios": ratios,
        "product_gflop": flops / 1e9,
        "product_gflop_per_second": flops / 1e9 / median["products"],
    }
    if options.output:
        machine.write(options.output, result)
    print(
        "| CPU | ours | torch | matrix products alone | torch / ours | ours / products "
        "| the same in CPU seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    described = result["machine"]
    print(
        f"| {described['cpu']}, {described['cores']} cores | {median['ours']:.2f} s "
        f"| {median.get('torch', float('nan')):.2f} s | {median['products']:.2f} s "
        f"| {ratios.get('torch / ours', float('nan')):.2f} | {ratios['ours / products']:.2f} "
        f"| {ratios['ours / products, CPU seconds']:.2f} |"
    )


if __name__ == "__main__":
    run_command(main)
