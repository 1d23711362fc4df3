"""What is saved comes back to the bit; what cannot be used is refused in one line."""

import contextlib
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import rwkv_jax
from rwkv_jax import checkpoint, sharding, step
from rwkv_jax.checkpoint import Checkpoints
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.metrics import MiniepochLoss

MODEL = ModelConfig(n_layer=1, n_embd=32, vocab_size=20, head_size=16, dim_v=8)
ADAM = optax.scale_by_adam()


def abstract(devices: int = 4) -> step.TrainState:
    return step.abstract_state(sharding.make_mesh(devices), MODEL, ADAM)


def random_state(seed: int) -> step.TrainState:
    """Any bits at all in the moments and masters, NaN and denormal numbers among them."""
    rng = np.random.default_rng(seed)

    def leaf(like):
        bits = rng.integers(0, 256, (*like.shape, like.dtype.itemsize), np.uint8)
        return jax.device_put(bits.view(like.dtype)[..., 0], like.sharding)

    return jax.tree.map(leaf, abstract())


def running(step: int) -> MiniepochLoss:
    return MiniepochLoss(total=0.1 * step, steps=step)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder after checkpoints at the steps 3, 10 and 200, of states of these seeds."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        assert checkpoints.latest() is None
        for number in (3, 10, 200):
            checkpoints.save(number, MODEL, random_state(number), running(number))
    return folder


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


@pytest.mark.parametrize("devices", [4, 1])
def test_restore_is_exact_on_any_number_of_devices(run, devices):
    with contextlib.closing(Checkpoints(run / "checkpoints")) as checkpoints:
        assert checkpoints.latest() == 200
        assert checkpoints.model_config(200) == MODEL
        for number in (10, 200):
            state, loss = checkpoints.restore(number, abstract(devices))
            assert_same_bits(state, random_state(number))
            assert loss == running(number)
            where = jax.tree.map(lambda leaf: leaf.sharding, abstract(devices))
            assert jax.tree.map(lambda leaf: leaf.sharding, state) == where


def test_the_newest_two_are_kept(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "200"]


@pytest.mark.parametrize("below, number", [("", 200), ("checkpoints/10", 10)])
def test_load_newest_takes_a_run_or_a_checkpoint(run, below, number):
    model, params = checkpoint.load_newest(run / below)
    assert model == MODEL
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same_bits(params, random_state(number).params)
    assert_same_bits(rwkv_jax.load_params(run / below)[1], params)


def test_a_model_alone_is_a_checkpoint_too(tmp_path):
    params = random_state(0).params
    checkpoint.save_model(tmp_path / "new" / "model", MODEL, params)
    model, loaded = checkpoint.load_newest(tmp_path / "new" / "model")
    assert model == MODEL
    assert_same_bits(loaded, params)
    with pytest.raises(UserError, match="model: exists already; give a new folder"):
        checkpoint.save_model(tmp_path / "new" / "model", MODEL, params)


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_a_folder_without_checkpoints(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    with pytest.raises(UserError, match=f"{tmp_path}: no checkpoints; give a .pth"):
        rwkv_jax.load_params(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [inside] * bool(inside)


def test_a_checkpoint_of_another_program(tmp_path):
    from orbax.checkpoint import v1 as ocp

    ocp.save_checkpointables(tmp_path / "other", {"params": {"w": np.zeros(3, np.float32)}})
    with pytest.raises(UserError, match="other: an orbax checkpoint, but not one of rwkv-jax"):
        rwkv_jax.load_params(tmp_path / "other")
