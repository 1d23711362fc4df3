"""A small training with known losses."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_jax.diagnosis.facts import Trial
from rwkv_jax.errors import UserError
from rwkv_jax.text.binidx import BinIdxWriter

if TYPE_CHECKING:
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.model.rwkv7 import Params

# The options of the training.
SELF_TEST: dict[str, Any] = {
    "n_layer": 1, "n_embd": 64, "vocab_size": 512, "ctx_len": 32, "micro_bsz": 4, "devices": 1,
    "my_exit_tokens": 768, "warmup_steps": 0, "lr_init": 1e-3, "lr_final": 1e-3,
}  # fmt: skip
# The losses of its steps, computed in float64 by the independent
# implementation in tests/support/torch_rwkv7.py (tests/diagnosis/test_doctor.py checks them).
KNOWN_LOSSES = (6.342448, 6.051721, 5.352484, 4.812257, 4.352367, 4.044164)
TOLERANCE = {"fp32": 5e-4, "bf16": 5e-2, "fp16": 5e-2}


def write_self_test_data(prefix: Path) -> None:
    """Writes 2000 tokens with a pattern to learn: the squares modulo 61."""
    with BinIdxWriter(prefix) as writer:
        writer.append(np.arange(2000) ** 2 % 61 + 1, [2000])


def jax_facts() -> dict[str, Any]:
    """jax's devices, and the kernel for each dtype with the reason. Starts jax."""
    import jax

    from pallas_kernels.wkv7.api import choose
    from rwkv_jax.device import runtime
    from rwkv_jax.device.precision import device_precision

    runtime.prepare_jax()
    devices = jax.devices()
    shapes = [jax.ShapeDtypeStruct((1, 512, 1, 64), name) for name in ("bfloat16", "float32")]
    return {
        "platform": devices[0].platform,
        "kinds": [device.device_kind for device in devices],
        "kernels": {str(shape.dtype): choose(shape) for shape in shapes},
        "precisions": list(dict.fromkeys(["fp32", device_precision()])),
    }


def starting_params(model: "ModelConfig") -> "Params":
    """Fresh weights, with the zero-initialised matrices drawn at random as well.

    So every part of the model affects the loss from the first step on. Rounded to bf16, as in a
    file.
    """
    import jax
    import ml_dtypes

    from rwkv_jax.model.initialisation import init_params

    rng = np.random.default_rng(1)

    def begin(leaf: np.ndarray) -> np.ndarray:
        if leaf.ndim == 3 and not leaf.any():
            leaf = rng.standard_normal(leaf.shape, np.float32) / np.sqrt(leaf.shape[-1])
        return leaf.astype(ml_dtypes.bfloat16).astype(np.float32)

    return jax.tree.map(begin, init_params(model))


def losses_of_small_model(data: Path, precision: str) -> list[float]:
    """The losses of the steps of `SELF_TEST`, with the train step of `train` but without files."""
    import jax
    import jax.numpy as jnp

    from rwkv_jax.config import TrainConfig
    from rwkv_jax.parallel import sharding
    from rwkv_jax.parallel.distributed import device_put_global
    from rwkv_jax.text.dataset import open_dataset
    from rwkv_jax.training import build
    from rwkv_jax.training.optimizer import learning_rate, make_optimizer
    from rwkv_jax.training.schedule import make_schedule
    from rwkv_jax.training.step import TrainState, abstract_state

    mesh = sharding.make_mesh(1)
    on_gpu = mesh.devices.flat[0].platform != "cpu"
    config = build.resolve_config(TrainConfig(**SELF_TEST, precision=precision), on_gpu)
    model = config.model_config()
    squares = open_dataset(str(data), config.ctx_len, None, model.vocab_size)
    schedule = make_schedule(config, config.micro_bsz, len(squares.tokens))
    rate = learning_rate(config, model.n_embd, 0, schedule.exit_step)
    optimizer = make_optimizer(config, rate)
    params = starting_params(model)
    abstract = abstract_state(mesh, model, optimizer)
    moments = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract.opt_state)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = device_put_global(TrainState(params, moments), where)

    def batch(step: int) -> jax.Array:
        return jnp.asarray(squares.batch(step, 1, config.micro_bsz)[None])

    # Nearly all of the time is compilation; on a CPU it is halved without LLVM's optimisations.
    effort = None if on_gpu else {"xla_backend_optimization_level": 0}
    run_step: Any = build.build_step(config, model, mesh, optimizer)
    compiled = run_step.lower(state, batch(0)).compile(effort)
    losses = []
    for step in range(schedule.last_step):
        for _ in range(16):  # in fp16, steps are repeated while the loss scale is too large
            state, metrics = compiled(state, batch(step))
            if not metrics.skipped:
                break
        losses.append(float(metrics.loss))
    return losses


def check_losses(trial: Trial, precision: str) -> str:
    """Describes how the losses of the self-test compare with the known ones.

    Raises:
        UserError: they differ, or the training did not finish.
    """
    if precision not in trial.losses:
        raise UserError(f"self-test in {precision}: training fails: {trial.last_message}")
    losses = trial.losses[precision]
    apart = float(np.max(np.abs(np.array(losses) - np.array(KNOWN_LOSSES))))
    summary = f"{len(losses)} training steps, losses within {apart:.1g} of the known ones"
    if not apart <= TOLERANCE[precision]:
        raise UserError(
            f"self-test in {precision}: {summary}, more than {TOLERANCE[precision]}: this machine "
            "computes wrong results; please report it with all of the above"
        )
    return f"{precision}: {summary}"
