"""A step that would ruin the weights is not taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.model.loss import head_loss
from rwkv_jax.parallel import sharding
from rwkv_jax.training import step
from rwkv_jax.training.build import resolve_config
from rwkv_jax.training.optimizer import loss_scale, make_optimizer, unscale, with_updates

MODEL = ModelConfig(n_layer=1, n_embd=32, vocab_size=20, head_size=16, dim_v=8)
DEVICES, MICRO_BATCHES = 4, 2
GOOD, BAD_GRADIENT, BAD_LOSS = 0, 1, 2


def loss_by_target(hidden, head, targets, chunk, scale):
    """The loss, times what makes itself or the norm of its gradient infinite."""
    gain = jnp.array([1.0, 1e38, jnp.inf])[jnp.max(targets)]
    return head_loss(hidden, head, targets, chunk, scale) * gain


def first_state(mesh, adam, strategy: sharding.Strategy) -> step.TrainState:
    abstract = step.abstract_state(mesh, MODEL, adam, strategy.offload)
    where = jax.tree.map(lambda x: x.sharding, abstract)
    params = jax.tree.map(jnp.asarray, init_params(MODEL, 0))
    return jax.device_put(step.TrainState(params, adam.init(params)), where)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_2_offload"])
def test_a_step_that_is_not_finite_changes_nothing(strategy, monkeypatch):
    """Masters, moments and bias correction are as without it; the rate is that of the step."""
    monkeypatch.setattr(step, "head_loss", loss_by_target)
    mesh, stage = sharding.make_mesh(DEVICES), sharding.STRATEGIES[strategy]
    kinds = [BAD_GRADIENT, GOOD, BAD_LOSS, BAD_GRADIENT, GOOD]
    rates = jnp.array([9, 0.1, 9, 9, 0.2, 0.1, 0.2])
    adam = make_optimizer(TrainConfig(), lambda count: rates[count])
    one = step.make_step(MODEL, adam, mesh, stage, jnp.float32, remat=False)

    def run(kinds: list[int], first: int):
        state, skipped = first_state(mesh, adam, stage), []
        state = state._replace(opt_state=with_updates(state.opt_state, first))
        for kind in kinds:
            batch = np.full((MICRO_BATCHES, DEVICES, 9), GOOD, np.int32)
            batch[-1, -1, -1] = kind  # in the last sample of all
            state, metrics = one(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
            skipped.append(bool(metrics.skipped))
        return jax.tree.map(np.asarray, state), skipped

    with jax.numpy_dtype_promotion("standard"):
        disturbed, skipped = run(kinds, 0)
        alone, none = run([GOOD, GOOD], 5)
    assert skipped == [kind != GOOD for kind in kinds] and none == [False, False]
    counts = [
        [int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
        for state in (disturbed, alone)
    ]
    assert counts == [[2, 5], [2, 7]]  # Adam's and the schedule's
    for ours, expected in zip(*map(jax.tree.leaves, (disturbed, alone)), strict=True):
        if ours.ndim:
            assert np.isfinite(ours).all()
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
def test_without_recomputation_no_weights_are_kept_for_the_backward_pass():
    """A layer more costs the pass its gradient and its activations, not a copy of its weights."""
    mesh, adam = sharding.make_mesh(2), make_optimizer(TrainConfig(), lambda count: 0.1)

    def temporary(layers: int) -> int:
        model = dataclasses.replace(MODEL, n_embd=128, n_layer=layers)
        one = step.make_step(
            model, adam, mesh, sharding.STRATEGIES["fsdp"], jnp.float32, remat=False
        )
        state = step.abstract_state(mesh, model, adam)
        where = sharding.batch_sharding(mesh)
        with jax.numpy_dtype_promotion("standard"):
            batch = jax.ShapeDtypeStruct((1, 2, 2), jnp.int32, sharding=where)
            return one.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    part = 12 * 128 * 128 * 4 / 2  # bytes a device has of a layer: four square matrices, two of 4×
    assert temporary(9) - temporary(3) < 6 * 1.5 * part  # saved, the weights make it 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_offload"])
def test_float16_finds_its_scale_and_grows_it(strategy, monkeypatch):
    """Planted: gradients that overflow float16 above a scale of 4, though their norm is small."""
    mesh, seen = sharding.make_mesh(2), []

    def planted(hidden, head, targets, chunk, scale):
        loss = head_loss(hidden, head, targets, chunk, scale)
        return loss * jnp.where(scale * 2 > 4, jnp.inf, 1.0)  # 2 devices

    monkeypatch.setattr(step, "head_loss", planted)
    rates = optax.constant_schedule(1e-3)
    adam = optax.chain(unscale(32.0, patience=3), make_optimizer(TrainConfig(), rates))
    stage = sharding.STRATEGIES[strategy]
    state = first_state(mesh, adam, stage)
    with jax.numpy_dtype_promotion("standard"):
        one = step.make_step(MODEL, adam, mesh, stage, jnp.float16, remat=False)
        batch = jax.device_put(
            np.arange(2 * 9, dtype=np.int32).reshape(1, 2, 9), sharding.batch_sharding(mesh)
        )
        for _ in range(9):
            scale = float(loss_scale(state.opt_state))
            state, metrics = one(state, batch)
            seen.append((scale, bool(metrics.skipped)))
    halved = [(32.0, True), (16.0, True), (8.0, True)]
    assert seen == halved + [(4.0, False)] * 3 + [(8.0, True)] + [(4.0, False)] * 2
    assert 0.01 < float(metrics.grad_norm) < 100 and float(metrics.loss) < 3.0
    for leaf in jax.tree.leaves(state):
        assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.parametrize(
    "on_gpu, capability, expected",
    [(False, None, "fp32"), (True, (8, 0), "bf16"), (True, (7, 5), "fp16"), (True, None, "bf16")],
)
def test_precision_follows_the_device(on_gpu, capability, expected):
    before = jax.config.values["jax_default_matmul_precision"]
    assert resolve_config(TrainConfig(), on_gpu, capability).precision == expected
    assert resolve_config(TrainConfig(precision="tf32"), on_gpu, capability).precision == "tf32"
    jax.config.update("jax_default_matmul_precision", before)
