"""What is offloaded comes in parts that make the whole, and the planner counts each."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.checkpoints import weights
from rwkv_jax.checkpoints.store import Checkpoints, Metadata
from rwkv_jax.config import SIZES, ModelConfig, TrainConfig
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.model.rwkv7 import abstract_params
from rwkv_jax.parallel import distributed, offload, sharding
from rwkv_jax.training import step
from rwkv_jax.training.optimizer import make_optimizer

MODEL = ModelConfig(n_layer=2, n_embd=32, vocab_size=48, head_size=16)
ADAM = make_optimizer(TrainConfig(), lambda count: 1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_no_group_is_larger_than_the_largest_tensor(size):
    params = abstract_params(ModelConfig(*SIZES[size]))
    groups = offload.group_parameters(params)
    assert sum(map(len, groups)) == len(frozenset().union(*groups)) == len(jax.tree.leaves(params))
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    for group in groups:
        leaves = jax.tree.leaves(offload.select(params, group))
        assert len(leaves) == len(group) and sum(leaf.size for leaf in leaves) <= largest
    assert len(groups) <= 5


def test_the_parts_of_a_state_make_the_state():
    params = abstract_params(MODEL)
    state = step.TrainState(params, jax.eval_shape(ADAM.init, params))
    groups = offload.group_parameters(params)
    parts = [offload.select(state, group) for group in groups]
    for part, group in zip(parts, groups, strict=True):
        tensors = [leaf for leaf in jax.tree.leaves(part) if leaf.ndim]
        assert len(tensors) == 3 * len(group)
        assert jax.tree.structure(part.opt_state) == jax.tree.structure(
            jax.eval_shape(ADAM.init, part.params)
        )
    merged = offload.merge(parts)
    assert jax.tree.structure(merged) == jax.tree.structure(state)
    assert jax.tree.leaves(merged) == jax.tree.leaves(state)


def state_on_the_host(mesh) -> step.TrainState:
    abstract = step.abstract_state(mesh, MODEL, ADAM, offloaded=True)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    params = distributed.device_put_global(init_params(MODEL, 0), where.params)
    state = step.TrainState(params, step.fresh_moments(ADAM, abstract))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)} == {"pinned_host"}
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == where
    return state


def test_a_state_on_the_host_is_saved_and_exported(tmp_path):
    state = state_on_the_host(sharding.make_mesh(4))
    expected = jax.tree.map(np.array, state)
    weights.save_pth(tmp_path / "ours.pth", distributed.gather_to_first(state.params))
    weights.save_pth(tmp_path / "theirs.pth", init_params(MODEL, 0))
    assert (tmp_path / "ours.pth").read_bytes() == (tmp_path / "theirs.pth").read_bytes()
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, state, Metadata(MODEL))
        for leaf in jax.tree.leaves(state):  # as the next step does
            leaf.delete()
        checkpoints.close()
        abstract = step.abstract_state(sharding.make_mesh(2), MODEL, ADAM, offloaded=True)
        back = checkpoints.restore(1, abstract)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(back)} == {"pinned_host"}
    for ours, theirs in zip(*map(jax.tree.leaves, (back, expected)), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


@pytest.mark.slow
def test_one_part_at_a_time_is_on_the_devices(monkeypatch):
    mesh = sharding.make_mesh(2)
    seen, fetch = [], offload.OffloadedStep._fetch

    def there() -> int:
        """Float32 tensors on the devices; what the passes read is bf16."""
        live = [leaf for leaf in jax.live_arrays() if leaf.ndim and leaf.dtype == jnp.float32]
        return sum(leaf.sharding.memory_kind == "device" for leaf in live)

    def noting(self, tree):
        seen.append(there())
        return fetch(self, tree)

    with jax.numpy_dtype_promotion("standard"):
        run = step.make_step(
            MODEL, ADAM, mesh, sharding.STRATEGIES["fsdp_offload"], jnp.bfloat16, remat=False
        )
        state = state_on_the_host(mesh)
        tokens = np.arange(2 * 9, dtype=np.int32).reshape(1, 2, 9)
        batch = jax.device_put(tokens, sharding.batch_sharding(mesh))
        state, _ = run(state, batch)
        monkeypatch.setattr(offload.OffloadedStep, "_fetch", noting)
        before = there()
        run(state, batch)
    assert len(seen) == len(offload.group_parameters(state.params)) and set(seen) == {before}


@pytest.mark.parametrize("strategy, parts", [("zero2_offload", 1), ("fsdp_offload", 4)])
def test_what_a_device_holds_while_a_part_is_updated(strategy, parts):
    """bf16 of all that is read, the gradients still to be used, and one part's masters, moments."""
    mesh, dtype = sharding.make_mesh(4), jnp.bfloat16
    state = step.abstract_state(mesh, MODEL, ADAM)
    batch = jax.ShapeDtypeStruct((1, 4, 17), jnp.int32, sharding=sharding.batch_sharding(mesh))
    with jax.numpy_dtype_promotion("standard"):
        run = step.make_step(MODEL, ADAM, mesh, sharding.STRATEGIES[strategy], dtype, remat=False)
        passes, *updates = step.programs(run, state, batch)
    N = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert offload.bytes_of(passes.arguments[0]) == 2 * N // parts and passes.other_bytes == 0
    waiting = 2 * N // 4
    for update, group in zip(updates, offload.group_parameters(state.params), strict=True):
        visitor, gradients, _ = update.arguments
        n = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(visitor.params))
        assert n == sum(leaf.size for leaf in jax.tree.leaves(offload.select(state.params, group)))
        assert offload.bytes_of(gradients) == 2 * n // 4
        tensors = offload.bytes_of([leaf for leaf in jax.tree.leaves(visitor) if leaf.ndim])
        assert tensors == 12 * n // 4
        waiting -= 2 * n // 4
        assert update.other_bytes == waiting + 2 * (N - n) // parts
        assert update.moved == 2 * offload.bytes_of(visitor)
    assert waiting == 0
