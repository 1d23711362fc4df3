"""Eight devices train as one does, each holding an eighth of the state."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import UserError
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.parallel import sharding
from rwkv_jax.training import optimizer, step

DEVICES, B, T, STEPS = 8, 8, 16, 20
MODEL = ModelConfig(n_layer=2, n_embd=32, vocab_size=48, head_size=16)
TRAIN = TrainConfig(lr_init=1e-3, lr_final=1e-4, warmup_steps=4)


def strict_but_for_optax() -> optax.GradientTransformationExtraArgs:
    adam = optimizer.make_optimizer(TRAIN, optimizer.learning_rate(TRAIN, MODEL.n_embd, 0, STEPS))

    def update(*args, **more):
        with jax.numpy_dtype_promotion("standard"):
            return adam.update(*args, **more)

    return optax.GradientTransformationExtraArgs(adam.init, update)


ADAM = strict_but_for_optax()


@pytest.fixture(scope="module")
def batches() -> np.ndarray:
    """[STEPS, B, T + 1] ids below 12, all of them in the first step.

    Adam's first update of an embedding is ±lr by the gradient's sign, rounding errors included.
    """
    return np.random.default_rng(0).integers(0, 12, (STEPS, B, T + 1), np.int32)


def placed(mesh: jax.sharding.Mesh, offload: bool = False) -> step.TrainState:
    """The same start each time, copied: a step consumes it."""
    params = jax.tree.map(jnp.asarray, init_params(MODEL, 0))
    abstract = step.abstract_state(mesh, MODEL, ADAM, offload)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.device_put(step.TrainState(params, ADAM.init(params)), where)


def train(batches: np.ndarray, devices: int, strategy: str, micro_batches: int = 1, data: int = 1):
    """Losses and gradient norms [STEPS, 2], the last state and the compiled programs' text."""
    mesh = sharding.mesh_from_devices(jax.devices()[:devices], data)
    chosen = sharding.STRATEGIES[strategy]
    run = step.make_step(MODEL, ADAM, mesh, chosen, jnp.float32, remat=False)
    batches = batches.reshape(STEPS, micro_batches, -1, T + 1)
    batches = [jax.device_put(batch, sharding.batch_sharding(mesh)) for batch in batches]
    state, history = placed(mesh, chosen.offload), []
    programs = step.programs(run, step.abstract_state(mesh, MODEL, ADAM), batches[0])
    compiled = [part.function.lower(*part.arguments).compile() for part in programs]
    for batch in batches:
        state, metrics = run(state, batch) if chosen.offload else compiled[0](state, batch)
        history.append([float(metrics.loss), float(metrics.grad_norm)])
    return np.array(history), state, "\n".join(one.as_text() for one in compiled)


@pytest.fixture(scope="module")
def alone(batches):
    """One device that takes the samples of a batch one by one."""
    return train(batches, 1, "deepspeed_stage_1", micro_batches=B)


@pytest.mark.slow
def test_the_run_learns(alone):
    losses = alone[0][:, 0]
    assert losses[0] > 3.8 and losses[-1] < losses[0] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy, micro_batches, data",
    [
        ("deepspeed_stage_1", 1, 1),
        ("deepspeed_stage_2", 1, 1),
        ("deepspeed_stage_3", 1, 1),
        ("deepspeed_stage_2_offload", 1, 1),
        ("fsdp_offload", 2, 2),
        ("fsdp", 2, 2),  # two pairs of devices, each of which holds the whole state
    ],
)
def test_devices_at_once_train_as_one_by_one(strategy, micro_batches, data, batches, alone):
    devices = DEVICES // micro_batches
    history, state, program = train(batches, devices, strategy, micro_batches, data)
    np.testing.assert_allclose(history[:, 0], alone[0][:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(history[:, 1], alone[0][:, 1], rtol=1e-4)
    for ours, expected in zip(*map(jax.tree.leaves, (state.params, alone[1].params)), strict=True):
        np.testing.assert_allclose(np.asarray(ours), np.asarray(expected), rtol=0, atol=5e-5)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state)}
    assert kinds == {"pinned_host" if "offload" in strategy else "device"}
    for leaf in jax.tree.leaves(state):  # out as it came in
        assert leaf.ndim == 0 or bytes_per_device(leaf) == leaf.nbytes // (devices // data)
    assert_only_parameters_travel(program, state.params)


def assert_only_parameters_travel(program: str, params: dict) -> None:
    """Gathered: whole tensors of the model, or of one layer; scattered: gradients of such."""
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    shapes |= {leaf.shape[1:] for leaf in jax.tree.leaves(params["blocks"])}
    sizes = {np.prod(shape) for shape in shapes}
    found = collections.defaultdict(list)
    for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"):
        for dims in re.findall(rf"= \w+\[([\d,]*)\]\S* {kind}\(", program):
            found[kind].append(np.prod([int(size) for size in dims.split(",") if size], dtype=int))
    assert sizes.issuperset(found["all-gather"]), found
    assert len(found["all-gather"]) >= len(jax.tree.leaves(params))
    assert len(found["reduce-scatter"]) >= len(jax.tree.leaves(params))
    assert not found["all-to-all"] and not found["collective-permute"]


def bytes_per_device(leaf: jax.Array) -> int:
    (size,) = {shard.data.nbytes for shard in leaf.addressable_shards}
    return size


def test_a_device_holds_an_eighth_of_masters_and_moments():
    state = placed(sharding.make_mesh(DEVICES))
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    tensors = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(tensors) == 3 * len(jax.tree.leaves(state.params)) and len(counts) == 2
    for leaf in tensors:
        assert len(leaf.addressable_shards) == DEVICES
        assert bytes_per_device(leaf) == leaf.nbytes // DEVICES
    for leaf in counts:
        assert bytes_per_device(leaf) == leaf.nbytes


def test_what_the_devices_do_not_divide_is_whole_and_layers_stay_together():
    mesh = sharding.make_mesh(DEVICES)
    cut = sharding.FSDP
    leaves = {
        "ln0": {"bias": np.empty(12), "weight": np.empty(16)},
        "head": {"weight": np.empty((20, 16))},  # not by its vocabulary
        "blocks": {
            "ln1": {"bias": np.empty((8, 12))},
            "att": {"w1": np.empty((8, 12, 16)), "output": {"weight": np.empty((2, 16, 16))}},
        },
    }
    specs = jax.tree.map(tuple, sharding.specs(mesh, leaves))
    assert specs["ln0"] == {"bias": (None,), "weight": (cut,)}
    assert specs["head"]["weight"] == (None, cut)
    assert specs["blocks"]["ln1"]["bias"] == (None, None)
    assert specs["blocks"]["att"]["w1"] == (None, None, cut)
    assert specs["blocks"]["att"]["output"]["weight"] == (None, cut, None)


def test_plain_names_are_the_known_strategies():
    known = {"zero1": "1", "zero2": "2", "zero2_offload": "2_offload"}
    known |= {"fsdp": "3", "fsdp_offload": "3_offload"}
    for name, stage in known.items():
        assert sharding.STRATEGIES[name] is sharding.STRATEGIES[f"deepspeed_stage_{stage}"]
    assert len({*sharding.STRATEGIES.values()}) == 5


def test_devices_that_are_not_there():
    assert sharding.make_mesh().size == DEVICES
    with pytest.raises(UserError, match=r"--devices 9: jax sees 8 \(cpu\)"):
        sharding.make_mesh(9)


def test_a_platform_that_is_not_there(monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'typo': not known\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(UserError, match=r"jax does not start \(Unable .* not known\); unset it"):
        sharding.make_mesh(1)
