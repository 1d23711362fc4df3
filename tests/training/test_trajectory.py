"""Fifty steps of our training beside the torch implementation: same file, same batches, fp32.

The setting is such that every part of a step shows: gradients of norm 8 to 1200 are clipped to 1,
weight decay is a hundred times the default, warmup and cosine are both crossed, and the loss falls
from 6.4 to 3. `test_each_treatment_shows` holds that: without any one of them the torch
run leaves the trajectory that the two share.
"""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from rwkv_jax.checkpoints import weights
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.parallel import sharding
from rwkv_jax.training import optimizer, step
from tests.support import torch_rwkv7

pytestmark = [pytest.mark.torch, pytest.mark.slow]

B, T, STEPS = 8, 32, 50
MODEL = ModelConfig(n_layer=2, n_embd=128, vocab_size=512)
TRAIN = TrainConfig(lr_init=4e-4, lr_final=4e-5, weight_decay=0.1)
EXIT_TOKENS = 45 * B * T  # the schedule ends before the steps do
TOLERANCE = 1e-5  # of the loss; the two fp32 runs differ by 1e-6, float64 from either as much
PARAMETER_TOLERANCE = 2e-5  # fifty steps move an entry by up to 1e-2; the runs differ by 7e-6


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """The operations are too small to share, and jax's threads want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def batches() -> np.ndarray:
    """[STEPS, B, T + 1] tokens: the low four bits of the demo text's bytes.

    Few different tokens, so that the first step already sees each of them. Adam's first update of
    an embedding is ±lr by the gradient's sign alone, rounding errors included: a token first seen
    at full learning rate makes any two fp32 runs part.
    """
    text = (Path(__file__).parents[1] / "data" / "demo_official.jsonl").read_bytes()
    tokens = np.frombuffer(text, np.uint8, STEPS * B * (T + 1)) % 16
    return tokens.astype(np.int32).reshape(STEPS, B, T + 1)


@pytest.fixture(scope="module")
def init_pth(tmp_path_factory) -> Path:
    """`rwkv-init.pth` as our trainer writes it, bf16."""
    path = tmp_path_factory.mktemp("trajectory") / "rwkv-init.pth"
    weights.save_pth(path, init_params(MODEL, 0))
    return path


def torch_parameters(path: Path) -> dict[str, torch.Tensor]:
    params = torch.load(path, weights_only=True)
    return {name: p.float().requires_grad_() for name, p in params.items()}


def torch_steps(
    params: dict[str, torch.Tensor], batches: np.ndarray, *, without: str = ""
) -> Iterator[tuple[float, float]]:
    """Trains `params` in place; yields loss and gradient norm after each step."""
    adamw = torch_rwkv7.adamw(params, 0.0 if without == "decay" else TRAIN.weight_decay)
    if without == "double rate":
        adamw.param_groups[-1]["lr_scale"] = 1.0
    for i, batch in enumerate(torch.from_numpy(batches).long()):
        lr = torch_rwkv7.learning_rate(
            i,
            lr_init=TRAIN.lr_init,
            lr_final=TRAIN.lr_init if without == "cosine" else TRAIN.lr_final,
            warmup_steps=0 if without == "warmup" else TRAIN.warmup_steps,
            tokens_per_step=B * T,
            exit_tokens=EXIT_TOKENS,
        )
        clip = float("inf") if without == "clipping" else TRAIN.grad_clip
        yield torch_rwkv7.train_step(params, adamw, batch[:, :-1], batch[:, 1:], lr, clip)


@pytest.fixture(scope="module")
def expected(init_pth, batches):
    """Losses [STEPS], gradient norms [STEPS] and the last parameters of the torch run."""
    params = torch_parameters(init_pth)
    losses, norms = np.array(list(torch_steps(params, batches))).T
    return losses, norms, {name: p.detach().numpy() for name, p in params.items()}


def tolerant_of_promotion(
    adam: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """optax itself promotes int32 counts to float32; our own code stays under the strict rule."""

    def update(*args, **more):
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(*args, **more)

    return optax.GradientTransformationExtraArgs(adam.init, update)


@pytest.mark.parametrize(
    "devices, strategy, micro_batches, remat, head_chunk",
    [(1, "deepspeed_stage_2", 1, False, 0), (4, "deepspeed_stage_3", 2, True, 7)],
    ids=["plain", "sharded, accumulated, recomputed, in chunks"],
)
def test_fifty_steps(
    devices, strategy, micro_batches, remat, head_chunk, init_pth, batches, expected
):
    schedule = optimizer.learning_rate(TRAIN, MODEL.n_embd, 0, EXIT_TOKENS / (B * T))
    adam = tolerant_of_promotion(optimizer.make_optimizer(TRAIN, schedule))
    mesh = sharding.make_mesh(devices)
    run = step.make_step(
        MODEL, adam, mesh, sharding.STRATEGIES[strategy], jnp.float32, remat, head_chunk
    )
    _, params = weights.load_pth(init_pth, MODEL)
    state = step.TrainState(jax.tree.map(jnp.asarray, params), adam.init(params))
    where = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state(mesh, MODEL, adam))
    state = jax.device_put(state, where)
    history = []
    for batch in batches.reshape(STEPS, micro_batches, -1, T + 1):
        state, metrics = run(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        history.append(metrics)
    losses, norms, last = expected

    np.testing.assert_allclose([float(m.loss) for m in history], losses, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose([float(m.grad_norm) for m in history], norms, rtol=1e-4)
    for name, ours in weights.to_official(state.params).items():
        np.testing.assert_allclose(
            np.asarray(ours), last[name], rtol=0, atol=PARAMETER_TOLERANCE, err_msg=name
        )


def test_the_loss_moves_and_the_clip_bites(expected):
    losses, norms, _ = expected
    assert losses[0] > 6.2 and losses[-5:].mean() < 3.1
    assert norms.max() > 500 and np.sum(norms > TRAIN.grad_clip) > 40


@pytest.mark.parametrize(
    "treatment", ["decay", "double rate", "l2wrap", "clipping", "warmup", "cosine"]
)
def test_each_treatment_shows(treatment, init_pth, batches, expected, monkeypatch):
    if treatment == "l2wrap":
        monkeypatch.setattr(torch_rwkv7, "l2wrap", lambda logits: 0.0)
    params = torch_parameters(init_pth)
    losses, _, last = expected
    for (loss, _), usual in zip(
        torch_steps(params, batches, without=treatment), losses, strict=True
    ):
        if abs(loss - usual) > 10 * TOLERANCE:
            return
    # The double rate of w0 alone hardly shows in the loss of so short a run, but in w0 itself.
    w0 = "blocks.1.att.w0"
    assert np.abs(params[w0].detach().numpy() - last[w0]).max() > 100 * PARAMETER_TOLERANCE
