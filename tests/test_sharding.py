"""Four devices train as one does, each holding a quarter of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax import optimizer, sharding, step
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.initialisation import init_params

DEVICES, B, T, STEPS = 4, 4, 16, 8
MODEL = ModelConfig(n_layer=2, n_embd=32, vocab_size=50, head_size=16)
TRAIN = TrainConfig(lr_init=1e-3, lr_final=1e-4, warmup_steps=4)


def strict_but_for_optax() -> optax.GradientTransformation:
    adam = optimizer.make_optimizer(TRAIN, optimizer.learning_rate(TRAIN, MODEL.n_embd, 0, STEPS))

    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(*args)

    return optax.GradientTransformation(adam.init, update)


ADAM = strict_but_for_optax()


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
    """Four steps are compiled; without optimisation that takes a third of the time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def batches() -> np.ndarray:
    """[STEPS, B, T + 1] ids below 12, all of them in the first step.

    Adam's first update of an embedding is ±lr by the gradient's sign, rounding errors included.
    """
    return np.random.default_rng(0).integers(0, 12, (STEPS, B, T + 1), np.int32)


def placed(mesh: jax.sharding.Mesh) -> step.TrainState:
    """The same start each time, copied: a step consumes it."""
    params = jax.tree.map(jnp.asarray, init_params(MODEL, 0))
    where = jax.tree.map(lambda leaf: leaf.sharding, step.abstract_state(mesh, MODEL, ADAM))
    return jax.device_put(step.TrainState(params, ADAM.init(params)), where)


def train(batches: np.ndarray, devices: int, strategy: str, micro_batches: int = 1):
    """Losses and gradient norms [STEPS, 2], and the last state."""
    mesh = sharding.make_mesh(devices)
    chosen = sharding.STRATEGIES[strategy]
    run = step.make_step(MODEL, ADAM, mesh, chosen, jnp.float32, remat=False)
    state, history = placed(mesh), []
    for batch in batches.reshape(STEPS, micro_batches, -1, T + 1):
        state, metrics = run(state, jax.device_put(batch, sharding.batch_sharding(mesh)))
        history.append([float(metrics.loss), float(metrics.grad_norm)])
    return np.array(history), state


@pytest.fixture(scope="module")
def alone(batches):
    """One device that takes the samples of a batch one by one."""
    return train(batches, 1, "deepspeed_stage_1", micro_batches=B)


def test_the_run_learns(alone):
    losses = alone[0][:, 0]
    assert losses[0] > 3.8 and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("strategy", sharding.STRATEGIES)
def test_four_devices_at_once_train_as_one_by_one(strategy, batches, alone):
    history, state = train(batches, DEVICES, strategy)
    np.testing.assert_allclose(history[:, 0], alone[0][:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(history[:, 1], alone[0][:, 1], rtol=1e-4)
    for ours, expected in zip(*map(jax.tree.leaves, (state.params, alone[1].params)), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=0, atol=2e-5)
    for leaf in jax.tree.leaves(state):  # out as it came in
        assert leaf.ndim == 0 or bytes_per_device(leaf) == leaf.nbytes // DEVICES


def bytes_per_device(leaf: jax.Array) -> int:
    shards = leaf.addressable_shards
    assert len({shard.device for shard in shards}) == DEVICES
    (size,) = {shard.data.nbytes for shard in shards}
    return size


def test_a_device_holds_a_quarter_of_masters_and_moments():
    state = placed(sharding.make_mesh(DEVICES))
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    tensors = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(tensors) == 3 * len(jax.tree.leaves(state.params)) and len(counts) == 2
    for leaf in tensors:
        assert bytes_per_device(leaf) == leaf.nbytes // DEVICES
    for leaf in counts:
        assert bytes_per_device(leaf) == leaf.nbytes


def test_what_the_devices_do_not_divide_is_whole_and_layers_stay_together():
    mesh = sharding.make_mesh(DEVICES)
    leaves = {
        "odd": np.empty((3, 7)),
        "longest": np.empty((4, 8)),
        "blocks": {"layers alone fit": np.empty((8, 5)), "inner": np.empty((8, 2, 4))},
    }
    specs = jax.tree.map(lambda where: tuple(where.spec), sharding.cut(mesh, leaves))
    assert specs["odd"] == (None, None)
    assert specs["longest"] == (None, sharding.AXIS)
    assert specs["blocks"]["layers alone fit"] == (None, None)
    assert specs["blocks"]["inner"] == (None, None, sharding.AXIS)


def test_devices_that_are_not_there():
    assert sharding.make_mesh().size == DEVICES
    with pytest.raises(UserError, match=r"--devices 5: jax sees 4 \(cpu\)"):
        sharding.make_mesh(5)
