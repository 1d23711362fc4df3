"""Measures the cost of a checkpoint every 50 steps.

    python -m benchmarks.checkpoint_overhead [--size 0.1b] [--output PATH]

In one process: some steps; a checkpoint is begun, which holds the training up while the arrays are
copied; more steps while it is written and hashed in the background. The cost is the time held up,
plus what those steps take beyond the median of the steps before; it is given as a part of 50 of
these.
"""

import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks import command, machine
from rwkv_jax.checkpoints.store import Checkpoints, Metadata
from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import run_command
from rwkv_jax.model.rwkv7 import abstract_params
from rwkv_jax.parallel.sharding import batch_sharding, make_mesh
from rwkv_jax.training.build import build_step, resolve_config
from rwkv_jax.training.optimizer import make_optimizer
from rwkv_jax.training.step import TrainState, abstract_state

EVERY = 50


def main() -> None:
    parser = command.record_parser(__doc__)
    parser.add_argument("--size", default="0.1b", help="of the model (0.1b)")
    parser.add_argument("--ctx_len", type=int, default=512, help="tokens of a sequence (512)")
    parser.add_argument("--steps", type=int, default=4, help="timed before the checkpoint (4)")
    options = parser.parse_args()
    mesh = make_mesh(1)
    config = resolve_config(TrainConfig(size=options.size, devices=1), on_gpu=False)
    model = config.model_config()
    optimizer = make_optimizer(config, lambda count: 1e-4)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(mesh, model, optimizer))
    # The numbers do not matter to the time.
    params = jax.tree.map(lambda p: np.full(p.shape, 0.01, p.dtype), abstract_params(model))
    params = jax.device_put(params, shardings.params)
    state = TrainState(params, jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, 1, options.ctx_len + 1))
    batch = jax.device_put(tokens.astype(np.int32), batch_sharding(mesh))
    run_step = build_step(config, model, mesh, optimizer)

    def step() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = run_step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    step()  # compiles
    alone = [step() for _ in range(options.steps)]
    median = statistics.median(alone)
    with tempfile.TemporaryDirectory() as name:
        checkpoints = Checkpoints(Path(name))
        begin = time.perf_counter()
        checkpoints.save(1, state, Metadata(model))
        blocked = time.perf_counter() - begin
        during = []
        while checkpoints.busy():
            during.append(step())
        checkpoints.close()
        size = sum(path.stat().st_size for path in Path(name).rglob("*") if path.is_file())
    slowed = sum(seconds - median for seconds in during)
    print(machine.cpu_name())
    print(f"{options.size}, ctx_len {options.ctx_len}: a checkpoint of {size / 1e6:,.0f} MB")
    print(f"step alone       {median:.2f} s  ({', '.join(f'{t:.2f}' for t in alone)})")
    print(f"held up          {blocked:.2f} s")
    print(f"steps meanwhile  {', '.join(f'{t:.2f}' for t in during)}: {slowed:+.2f} s in all")
    cost = (blocked + slowed) / (EVERY * median)
    print(f"every {EVERY} steps: {100 * cost:.2f} % of the run's time")
    if options.output:
        record = machine.record("checkpoint_overhead") | {
            "size": options.size,
            "ctx_len": options.ctx_len,
            "bytes": size,
            "step_alone_s": alone,
            "held_up_s": blocked,
            "step_meanwhile_s": during,
            f"share_every_{EVERY}_steps": cost,
        }
        machine.write(options.output, record)


if __name__ == "__main__":
    run_command(main)
