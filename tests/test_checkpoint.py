"""What is saved comes back to the bit; what cannot be used is refused in one line."""

import contextlib
import dataclasses
import math
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import rwkv_jax
from rwkv_jax import checkpoint, sharding, step, stored, weights
from rwkv_jax.checkpoint import MANIFEST, About, Checkpoints
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


def about(step: int) -> About:
    return About(MODEL, MiniepochLoss(total=0.1 * step, steps=step), {"ctx_len": 16, "data": "x"})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder after checkpoints at the steps 3, 10 and 200, of states of these seeds."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        assert checkpoints.steps() == []
        for number in (3, 10, 200):
            checkpoints.save(number, random_state(number), about(number))
    return folder


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


@pytest.mark.parametrize("devices", [4, 1])
def test_restore_is_exact_on_any_number_of_devices(run, devices):
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.steps() == [200, 10]
    for number in (10, 200):
        assert checkpoints.about(number) == about(number)
        state = checkpoints.restore(number, abstract(devices))
        assert_same_bits(state, random_state(number))
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract(devices))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == where


def test_the_arrays_may_be_overwritten_while_they_are_written(tmp_path):
    """As the next step does, which takes its state's memory."""
    state, expected = random_state(1), random_state(1)
    overwrite = jax.jit(lambda tree: jax.tree.map(jax.numpy.zeros_like, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, about(1))
    jax.block_until_ready(overwrite(state))
    checkpoints.close()
    assert_same_bits(checkpoints.restore(1, abstract()), expected)


def test_the_newest_two_are_kept(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "200"]


@pytest.mark.parametrize("below, number", [("", 200), ("checkpoints/10", 10)])
def test_load_newest_takes_a_run_or_a_checkpoint(run, below, number):
    model, params = checkpoint.load_newest(run / below)
    assert model == MODEL
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same_bits(params, random_state(number).params)
    assert_same_bits(rwkv_jax.load_params(run / below)[1], params)


@pytest.mark.parametrize("devices", [4, 1])
def test_a_run_can_be_read_tensor_by_tensor(tmp_path, devices, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MODEL", dataclasses.replace(MODEL, n_layer=3))
    if devices == 1:
        monkeypatch.setattr(stored, "PIECE", 1 << 10)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        state = jax.device_put(
            random_state(1), jax.tree.map(lambda x: x.sharding, abstract(devices))
        )
        checkpoints.save(1, state, about(1))
    model, tensors = checkpoint.open_newest(tmp_path)
    assert model == MODEL
    with pytest.MonkeyPatch.context() as patch:  # a layer is read without the others
        patch.setattr(stored, "_Tensor", lambda array, *_: array.chunk_layout.read_chunk.shape)
        chunks = checkpoint.open_newest(tmp_path)[1]
    assert math.prod(chunks["blocks.1.ffn.key.weight"]) <= 4 * MODEL.n_embd**2
    expected = weights.to_official(random_state(1).params)
    assert list(tensors) == list(expected)
    assert_same_bits(
        {name: np.asarray(tensor) for name, tensor in tensors.items()},
        {name: np.asarray(tensor) for name, tensor in expected.items()},
    )


def test_what_is_lost_while_it_is_read_is_said(tmp_path):
    folder = tmp_path / "model"
    checkpoint.save_model(folder, MODEL, weights.to_official(random_state(0).params))
    _, tensors = checkpoint.open_newest(folder)
    shutil.rmtree(folder / "params")
    with pytest.raises(UserError, match="model.params: damaged: "):
        np.asarray(tensors["head.weight"])


def test_larger_pieces_than_the_array_are_refused(tmp_path, monkeypatch):
    """Reading a kilobyte that is said to be in a piece of gigabytes would take those."""
    metadata = stored._metadata

    def larger(leaf, shape):
        made = metadata(leaf, shape)
        made["chunk_grid"]["configuration"]["chunk_shape"] = tuple(2 * size for size in shape)
        return made

    folder = tmp_path / "model"
    monkeypatch.setattr(stored, "_metadata", larger)
    checkpoint.save_model(folder, MODEL, weights.to_official(random_state(0).params))
    with pytest.raises(UserError, match="is stored in pieces of"):
        checkpoint.open_newest(folder)


@pytest.mark.parametrize("piece", [stored.PIECE, 1 << 10])
def test_a_model_alone_is_a_checkpoint_too(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(stored, "PIECE", piece)
    params = random_state(0).params
    tensors = weights.to_official(params)
    checkpoint.save_model(tmp_path / "new" / "model", MODEL, tensors)
    model, loaded = checkpoint.load_newest(tmp_path / "new" / "model")
    assert model == MODEL
    assert_same_bits(loaded, params)
    with pytest.raises(UserError, match="model: exists already; give a new folder"):
        checkpoint.save_model(tmp_path / "new" / "model", MODEL, tensors)


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


def files_of(checkpoint: Path) -> list[str]:
    return [
        path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()
    ]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_no_damaged_file_is_read(run, tmp_path, damage):
    """Each file in turn: the checkpoint is refused, and the model is that of the one before."""
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "200"
    checkpoints = Checkpoints(folder.parent)
    before = checkpoint.load_newest(tmp_path / "run")[1]
    for name in files_of(folder):
        if name == "orbax.checkpoint" and damage != Path.unlink:
            continue  # empty: neither can be done to it
        content = (folder / name).read_bytes()
        damage(folder / name)
        with pytest.raises(UserError, match=rf"200.*({MANIFEST}|{re.escape(name)})"):
            checkpoints.about(200)
        params = checkpoint.load_newest(tmp_path / "run")[1]
        of_optimizer = name.startswith("opt_state/")  # which a reader of the model does not need
        assert_same_bits(params, before if of_optimizer else random_state(10).params)
        (folder / name).write_bytes(content)
    checkpoints.about(200)


def test_links_out_of_a_checkpoint_are_not_followed(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "200", tmp_path / "200")
    array_file = next(tmp_path.glob("200/params/ocdbt*/d/*"))
    array_file.rename(tmp_path / "elsewhere")
    array_file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is missing"):
        rwkv_jax.load_params(tmp_path / "200")


@pytest.fixture
def small_files():
    """Within it, nothing in this process can write a file of more than 4 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


# Some of orbax's own threads may fail, too, and nobody asks those for their result.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_that_fails_harms_no_other(tmp_path, small_files):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, random_state(1), about(1))
    checkpoints.close()
    with small_files():
        checkpoints.save(2, random_state(2), about(2))
        with pytest.raises(UserError, match="2.partial: cannot be written: "):
            checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert_same_bits(checkpoints.restore(1, abstract()), random_state(1))
    checkpoints.save(3, random_state(3), about(3))
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_save_that_fails_is_one_line(tmp_path):
    """Of orbax, asyncio and tensorstore, each of which has much to say, nothing."""
    program = f"""
import resource
import numpy as np
from pathlib import Path
from rwkv_jax import checkpoint
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import run_command
from rwkv_jax.step import TrainState
checkpoints = checkpoint.Checkpoints(Path({str(tmp_path)!r}))
state = TrainState({{str(i): np.ones(100_000, np.float32) for i in range(40)}}, {{}})
def save():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    checkpoints.save(1, state, checkpoint.About(ModelConfig(n_layer=1, n_embd=64)))
    checkpoints.close()
run_command(save)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+1.partial: cannot be written: .*\n", done.stderr)


def test_space_is_looked_for_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="a checkpoint takes 1 MB, but 0 are free"):
        Checkpoints(tmp_path).save(1, random_state(1), about(1))
    assert not list(tmp_path.iterdir())


def test_what_a_kill_leaves_behind_is_no_checkpoint(tmp_path):
    for name in ("5.partial", "5.partial.orbax-checkpoint-tmp-1", "4.aside"):
        (tmp_path / name / "params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == []
    checkpoints.save(6, random_state(1), about(6))
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4.aside", "6"]


def test_a_step_below_the_others_is_kept(tmp_path):
    """A run that goes on with larger steps has fewer of them: its first save is not the oldest."""
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=1)) as checkpoints:
        checkpoints.save(10, random_state(0), about(10))
        checkpoints.save(5, random_state(1), about(5))
    assert checkpoints.steps() == [10, 5]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "007").mkdir()  # nor is what has no number as we write it a checkpoint
    assert Checkpoints(tmp_path).steps() == Checkpoints(tmp_path / "none").steps() == []

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        Checkpoints(tmp_path).steps()
