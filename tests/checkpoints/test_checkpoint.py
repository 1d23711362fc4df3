"""What is saved comes back to the bit; what cannot be used is refused in one line."""

import contextlib
import dataclasses
import errno
import io
import itertools
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import tensorstore as ts

import rwkv_jax
from rwkv_jax import train
from rwkv_jax.checkpoints import arrays, store, weights
from rwkv_jax.checkpoints.store import MANIFEST, Checkpoints, Metadata, Unreadable
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.convert import orbax_to_pth
from rwkv_jax.errors import UserError
from rwkv_jax.parallel import sharding
from rwkv_jax.tracking.train_log import MiniepochLoss
from rwkv_jax.training import step

MODEL = ModelConfig(n_layer=1, n_embd=32, vocab_size=20, head_size=16, dim_v=8)
ADAM = optax.scale_by_adam()


def abstract(devices: int = 4) -> step.TrainState:
    return step.abstract_state(sharding.make_mesh(devices), MODEL, ADAM)


def random_state(seed: int) -> step.TrainState:
    """Any bits at all in the moments, NaN among them; in the masters, those of finite numbers."""
    rng = np.random.default_rng(seed)

    def leaf(like):
        bits = rng.integers(0, 256, (*like.shape, like.dtype.itemsize), np.uint8)
        return jax.device_put(bits.view(like.dtype)[..., 0], like.sharding)

    def finite(like):
        bits = rng.integers(0, 256, (*like.shape, 4), np.uint8)
        bits[..., 3] &= 0xBF  # of the exponent's bits, the highest: below 2, or denormal
        return jax.device_put(bits.view(np.float32)[..., 0], like.sharding)

    state = abstract()
    return step.TrainState(jax.tree.map(finite, state.params), jax.tree.map(leaf, state.opt_state))


def metadata(step: int) -> Metadata:
    return Metadata(
        MODEL, MiniepochLoss(total=0.1 * step, steps=step), {"ctx_len": 16, "data": "x"}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder after checkpoints at the steps 3, 10 and 200, of states of these seeds."""
    folder = tmp_path_factory.mktemp("run")
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        assert checkpoints.steps() == []
        for number in (3, 10, 200):
            checkpoints.save(number, random_state(number), metadata(number))
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
        assert checkpoints.verify(number) == metadata(number)
        state = checkpoints.restore(number, abstract(devices))
        assert_same_bits(state, random_state(number))
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract(devices))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == where


def test_the_arrays_may_be_overwritten_while_they_are_written(tmp_path):
    """As the next step does, which takes its state's memory."""
    state, expected = random_state(1), random_state(1)
    overwrite = jax.jit(lambda tree: jax.tree.map(jax.numpy.zeros_like, tree), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, metadata(1))
    jax.block_until_ready(overwrite(state))
    checkpoints.close()
    assert_same_bits(checkpoints.restore(1, abstract()), expected)


def test_the_newest_two_are_kept(run):
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "200"]


@pytest.mark.parametrize("below, number", [("", 200), ("checkpoints/10", 10)])
def test_load_newest_takes_a_run_or_a_checkpoint(run, below, number):
    model, params = store.load_newest(run / below)
    assert model == MODEL
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same_bits(params, random_state(number).params)
    assert_same_bits(rwkv_jax.load_params(run / below)[1], params)


@pytest.mark.parametrize("devices", [4, 1])
def test_a_run_can_be_read_tensor_by_tensor(tmp_path, devices, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "MODEL", dataclasses.replace(MODEL, n_layer=3))
    if devices == 1:
        monkeypatch.setattr(arrays, "PIECE", 1 << 10)
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        state = jax.device_put(
            random_state(1), jax.tree.map(lambda x: x.sharding, abstract(devices))
        )
        checkpoints.save(1, state, metadata(1))
    with pytest.MonkeyPatch.context() as patch:  # a layer is read without the others
        patch.setattr(arrays, "_Tensor", lambda array, *_: array.chunk_layout.read_chunk.shape)
        chunks = store.open_newest(tmp_path, lambda _, tensors: tensors)
    assert math.prod(chunks["blocks.1.ffn.key.weight"]) <= 4 * MODEL.n_embd**2
    expected = weights.to_official(random_state(1).params)
    model, tensors = store.open_newest(tmp_path, read_all)
    assert model == MODEL
    assert list(tensors) == list(expected)
    assert_same_bits(tensors, {name: np.asarray(tensor) for name, tensor in expected.items()})


def read_all(model, tensors) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    return model, {name: np.asarray(tensor) for name, tensor in tensors.items()}


def test_what_is_lost_while_it_is_read_is_said(tmp_path):
    folder = tmp_path / "model"
    store.save_model(folder, MODEL, weights.to_official(random_state(0).params))

    def lose(model, tensors):
        shutil.rmtree(folder / "params")
        read_all(model, tensors)

    with pytest.raises(UserError, match="model.params: damaged: "):
        store.open_newest(folder, lose)


def test_larger_pieces_than_the_array_are_refused(tmp_path, monkeypatch):
    """Reading a kilobyte that is said to be in a piece of gigabytes would take those."""
    metadata = arrays._metadata

    def larger(leaf, shape):
        made = metadata(leaf, shape)
        made["chunk_grid"]["configuration"]["chunk_shape"] = tuple(2 * size for size in shape)
        return made

    folder = tmp_path / "model"
    monkeypatch.setattr(arrays, "_metadata", larger)
    store.save_model(folder, MODEL, weights.to_official(random_state(0).params))
    with pytest.raises(UserError, match="is stored in pieces of"):
        store.open_newest(folder, read_all)


@pytest.mark.parametrize("piece", [arrays.PIECE, 1 << 10])
def test_a_model_alone_is_a_checkpoint_too(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(arrays, "PIECE", piece)
    params = random_state(0).params
    tensors = weights.to_official(params)
    store.save_model(tmp_path / "new" / "model", MODEL, tensors)
    model, loaded = store.load_newest(tmp_path / "new" / "model")
    assert model == MODEL
    assert_same_bits(loaded, params)
    with pytest.raises(UserError, match="model: exists already; give a new folder"):
        store.save_model(tmp_path / "new" / "model", MODEL, tensors)


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
    before = store.load_newest(tmp_path / "run")[1]
    for name in files_of(folder):
        if name == "orbax.checkpoint" and damage != Path.unlink:
            continue  # empty: neither can be done to it
        content = (folder / name).read_bytes()
        damage(folder / name)
        with pytest.raises(UserError, match=rf"200.*({MANIFEST}|{re.escape(name)})"):
            checkpoints.verify(200)
        params = store.load_newest(tmp_path / "run")[1]
        of_optimizer = name.startswith("opt_state/")  # which a reader of the model does not need
        assert_same_bits(params, before if of_optimizer else random_state(10).params)
        (folder / name).write_bytes(content)
    checkpoints.verify(200)


# What orbax or tensorstore takes for a pattern, a separator or a URL, or cannot encode; and what
# bothers other programs.
HOSTILE = [
    "[ab]",
    "run[0-9]",
    "a?b",
    "**",
    "a\\b",
    "gs:",
    os.fsdecode(b"caf\xe9"),
    "{a,b} #1 100% ~ $HOME 'x\"",
    " a\tb\nc. ",
    "\u8f93\u51fa:\u202e",
    "x" * 255,
]


@pytest.fixture(scope="module")
def state() -> step.TrainState:
    return random_state(3)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_folder_may_have_any_name(run, state, tmp_path, name):
    """Saved, restored, loaded and converted, and nothing is written elsewhere."""
    tmp_path /= "run"
    # What `a?b` as a pattern stands for holds the arrays of another run.
    other = tmp_path / "axb" / "checkpoints" / "3.partial.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "200", other)
    folder = tmp_path / name / "out"
    folder.mkdir(parents=True)
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        checkpoints.save(3, state, metadata(3))
    assert checkpoints.verify(3) == metadata(3)
    assert_same_bits(checkpoints.restore(3, abstract()), state)
    assert_same_bits(store.load_newest(folder)[1], state.params)
    with contextlib.redirect_stdout(io.StringIO()):  # which can take what is not UTF-8
        orbax_to_pth.main([str(folder), str(folder / "x.pth"), "--dtype", "float32"])
    assert_same_bits(rwkv_jax.load_params(folder / "x.pth")[1], state.params)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({name, "axb"})
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "x.pth"]


def test_a_path_may_lead_up(state, tmp_path):
    """By `..`, which of a link is the folder above its target, and which tensorstore rejects."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    folder = tmp_path / "link" / ".." / "out"
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        checkpoints.check_writable()
        checkpoints.save(3, state, metadata(3))
    assert_same_bits(checkpoints.restore(3, abstract()), state)
    assert_same_bits(store.load_newest(folder)[1], state.params)
    store.save_model(folder / ".." / "model", MODEL, weights.to_official(state.params))
    assert_same_bits(store.load_newest(tmp_path / "a" / "model")[1], state.params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link"]


def test_a_model_alone_may_have_any_name(state, tmp_path):
    folder = tmp_path / "[ab]" / ("x" * 255)
    store.save_model(folder, MODEL, weights.to_official(state.params))
    assert_same_bits(store.load_newest(folder)[1], state.params)
    assert list((tmp_path / "[ab]").iterdir()) == [folder]


def test_a_name_that_needs_a_link_needs_a_folder_for_it(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "[ab]")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"\[ab\]: .* needs a link .*: No such file .*; set TMPDIR"):
        checkpoints.check_writable()
    (tmp_path / "[tmp]").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "[tmp]"))
    with pytest.raises(UserError, match=r"TMPDIR .*\[tmp\]: set it to"):
        checkpoints.check_writable()
    assert not list((tmp_path / "[ab]").iterdir())
    assert not list((tmp_path / "[tmp]").iterdir())


@contextlib.contextmanager
def as_it_is(folder):
    yield folder


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_cannot_be_read_back_replaces_nothing(run, tmp_path, monkeypatch):
    """Orbax saves as if all were well where a pattern is in the path, without the arrays."""
    shutil.copytree(run / "checkpoints" / "200", tmp_path / "[ab]" / "200")
    monkeypatch.setattr(arrays, "literal", as_it_is)
    checkpoints = Checkpoints(tmp_path / "[ab]", keep=1)
    with pytest.raises(UserError, match=r"0.partial: cannot be written: "):
        checkpoints.check_writable()
    checkpoints.save(201, random_state(1), metadata(201))
    with pytest.raises(UserError, match="201.partial: cannot be written: "):
        checkpoints.close()
    assert names_but_of_late_writers(tmp_path / "[ab]") == ["200"]
    checkpoints.verify(200)
    monkeypatch.setattr(arrays, "write", lambda *_: None)
    with pytest.raises(UserError, match="model: cannot be written: .* cannot be read back"):
        store.save_model(tmp_path / "model", MODEL, {})
    assert [path.name for path in tmp_path.iterdir()] == ["[ab]"]


@pytest.mark.parametrize(
    "key, reason",
    [
        ("mu.emb.weight/c/3/0", "a piece of mu.emb.weight cannot be read back"),
        (
            "mu.emb.weight/zarr.json",
            r"4 arrays \[20, 32\] of float32 cannot be read back: 3 exist",
        ),
        ("count/c", "a piece of count cannot be read back"),
    ],
)
def test_every_piece_is_looked_for(run, tmp_path, key, reason):
    """Orbax would read zeros where a process's part is missing, and say nothing."""
    shutil.copytree(run / "checkpoints" / "200", tmp_path / "200")
    leaves = jax.tree.leaves(abstract().opt_state)
    arrays.check(tmp_path / "200" / "opt_state", leaves)
    database = ts.KvStore.open(arrays._database(tmp_path / "200" / "opt_state")).result()
    database.delete_range(ts.KvStore.KeyRange(key, key + "\0")).result()
    with pytest.raises(ValueError, match=reason):
        arrays.check(tmp_path / "200" / "opt_state", leaves)


@pytest.fixture
def linked(run, tmp_path) -> Path:
    """A run every file of which is a link to one elsewhere, as model hubs and git-annex have it."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "blobs").mkdir()
    for number, name in enumerate(files_of(tmp_path / "run")):
        blob = (tmp_path / "run" / name).rename(tmp_path / "blobs" / str(number))
        (tmp_path / "run" / name).symlink_to(blob)
    return tmp_path / "run"


def test_links_to_files_elsewhere_are_read(linked):
    checkpoints = Checkpoints(linked / "checkpoints")
    assert checkpoints.verify(200) == metadata(200)
    assert_same_bits(checkpoints.restore(200, abstract()), random_state(200))
    assert_same_bits(store.load_newest(linked)[1], random_state(200).params)


@pytest.mark.parametrize("name", ["params/_METADATA", MANIFEST])
@pytest.mark.parametrize("pointer", [b"", b"version https://git-lfs.github.com/spec/v1\noid"])
def test_a_file_that_was_not_fetched_is_no_damage(linked, name, pointer, capsys):
    link = linked / "checkpoints" / "200" / name
    link.resolve().unlink()
    if pointer:
        link.resolve().write_bytes(pointer)
    with pytest.raises(Unreadable, match=f"{name}: is a .* to .* which has not been fetched"):
        Checkpoints(link.parents[len(Path(name).parts)]).verify(200)
    assert_same_bits(store.load_newest(linked)[1], random_state(10).params)
    assert "has not been fetched; using the previous one" in capsys.readouterr().err


def test_a_link_to_a_checkpoint_can_be_removed(run, tmp_path):
    """And what it leads to stays."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "10").symlink_to(run / "checkpoints" / "10")
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=1)) as checkpoints:
        assert checkpoints.steps() == [10]
        checkpoints.save(11, random_state(1), metadata(11))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["11"]
    assert Checkpoints(run / "checkpoints").verify(10) == metadata(10)


@pytest.mark.parametrize("moment", ["opening", "reading"])
def test_a_trainer_may_remove_what_is_being_read(run, tmp_path, monkeypatch, moment, capsys):
    """Then the newest of then is read, and nothing is called damaged."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    folders = iter(["200", "10"])

    def go_on():  # a trainer that keeps one checkpoint
        if gone := next(folders, None):
            (tmp_path / "checkpoints" / gone).rename(tmp_path / "checkpoints" / "0.partial")
            shutil.rmtree(tmp_path / "checkpoints" / "0.partial")
            shutil.copytree(run / "checkpoints" / "200", tmp_path / "checkpoints" / f"30{gone}")

    def use(model, tensors):
        if moment == "reading":
            go_on()
        return read_all(model, tensors)

    if moment == "opening":
        verify = store._verify
        monkeypatch.setattr(store, "_verify", lambda *a, **k: (go_on(), verify(*a, **k))[1])
    _, tensors = store.open_newest(tmp_path, use)
    assert not next(folders, None)
    expected = weights.to_official(random_state(200).params)
    assert_same_bits(tensors, {name: np.asarray(value) for name, value in expected.items()})
    assert capsys.readouterr().err == ""


def test_what_was_set_aside_stays(run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path, dirs_exist_ok=True)
    names = []
    for _ in range(3):
        names.append(Checkpoints(tmp_path).set_aside(10).name)
        shutil.copytree(run / "checkpoints" / "10", tmp_path / "10")
    assert names == ["10.aside", "10.aside.2", "10.aside.3"]
    assert all((tmp_path / name / MANIFEST).exists() for name in names)


def names_but_of_late_writers(folder):
    """Without what a part of a failed save may write after the rest of it has been removed."""
    return [path.name for path in folder.iterdir() if not store._UNFINISHED.fullmatch(path.name)]


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
@pytest.mark.slow
def test_a_save_that_fails_harms_no_other(tmp_path, small_files):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, random_state(1), metadata(1))
    checkpoints.close()
    with small_files():
        checkpoints.save(2, random_state(2), metadata(2))
        with pytest.raises(UserError, match="2.partial: cannot be written: "):
            checkpoints.close()
    assert names_but_of_late_writers(tmp_path) == ["1"]
    assert_same_bits(checkpoints.restore(1, abstract()), random_state(1))
    checkpoints.save(3, random_state(3), metadata(3))
    checkpoints.close()
    assert names_but_of_late_writers(tmp_path) == ["3"]


def save_to(folder: Path) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(2, random_state(2), metadata(2))
    checkpoints.close()


SAVES = {
    "a run": save_to,
    "the trial before a run": lambda folder: Checkpoints(folder).check_writable(),
    "a model": lambda folder: store.save_model(
        folder / "model", MODEL, weights.to_official(random_state(0).params)
    ),
}


@pytest.mark.parametrize("last", [1, 3, 4])
@pytest.mark.parametrize("what", SAVES)
def test_a_failed_save_is_removed_while_parts_of_it_still_write(tmp_path, monkeypatch, what, last):
    """The parts that did not fail make their folders anew, up to five looks after the last time."""
    looks, written = itertools.count(1), []

    def write_late(_):
        if next(looks) in (last, last + 5):
            (written[0].with_name(f"{written[0].name}.orbax-checkpoint-tmp") / "params").mkdir(
                parents=True
            )

    def fail(folder, _):
        written.append(folder)
        (folder / "params").mkdir(parents=True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        store, "_start_writing", lambda *a: SimpleNamespace(result=lambda: fail(*a))
    )
    monkeypatch.setattr(store.time, "sleep", write_late)
    (tmp_path / "1").mkdir()
    with pytest.raises(UserError, match="cannot be written: No space left"):
        SAVES[what](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert next(looks) > last + 5


def test_a_save_that_fails_is_one_line(tmp_path):
    """Of orbax, asyncio and tensorstore, each of which has much to say, nothing."""
    program = f"""
import resource
import numpy as np
from pathlib import Path
from types import SimpleNamespace
from rwkv_jax.checkpoints import store
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.errors import run_command
from rwkv_jax.training.step import TrainState
checkpoints = store.Checkpoints(Path({str(tmp_path)!r}))
state = TrainState({{str(i): np.ones(100_000, np.float32) for i in range(40)}}, {{}})
def save():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    checkpoints.save(1, state, store.Metadata(ModelConfig(n_layer=1, n_embd=64)))
    checkpoints.close()
run_command(save)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+1.partial: cannot be written: .*\n", done.stderr)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_can_never_be_saved_is_known_before_the_first_step(tmp_path, small_files):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be written: it is not a folder"):
        Checkpoints(tmp_path / "file").check_writable()
    resource_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, resource_limit[1]))
        with pytest.raises(UserError, match="0.partial: cannot be written: "):
            Checkpoints(tmp_path / "full").check_writable()
    assert not names_but_of_late_writers(tmp_path / "full")


def test_space_is_looked_for_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="a checkpoint takes 1 MB, but only 0 MB are free"):
        Checkpoints(tmp_path).save(1, random_state(1), metadata(1))
    assert not list(tmp_path.iterdir())


def test_what_a_kill_leaves_behind_is_no_checkpoint(tmp_path):
    for name in ("5.partial", "5.partial.orbax-checkpoint-tmp-1", "4.aside", "my.partial copy"):
        (tmp_path / name / "params").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == []
    checkpoints.save(6, random_state(1), metadata(6))
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4.aside", "6", "my.partial copy"]


def test_a_step_below_the_others_is_kept(tmp_path):
    """A run that goes on with larger steps has fewer of them: its first save is not the oldest."""
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", keep=1)) as checkpoints:
        checkpoints.save(10, random_state(0), metadata(10))
        checkpoints.save(5, random_state(1), metadata(5))
    assert checkpoints.steps() == [10, 5]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    (tmp_path / "007").mkdir()  # nor is what has no number as we write it a checkpoint
    assert Checkpoints(tmp_path).steps() == Checkpoints(tmp_path / "none").steps() == []

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        Checkpoints(tmp_path).steps()


def test_an_older_orbax_is_refused_by_name(monkeypatch, tmp_path):
    """With 0.11 every save failed, and with it every restore: it has no such options."""
    for version in ("0.11.33", "0.5.0"):
        monkeypatch.setattr(store.importlib.metadata, "version", lambda name, v=version: v)
        with pytest.raises(UserError, match=f"^orbax-checkpoint {version} is installed.*>=0.12'$"):
            store.require_orbax()
    with pytest.raises(UserError, match="^orbax-checkpoint 0.5.0 is installed"):
        train.train(TrainConfig(proj_dir=str(tmp_path / "out"), data_file="none.jsonl"))
    assert not (tmp_path / "out").exists()
    for version in ("0.12rc1", "0.12.8", "1.0"):
        monkeypatch.setattr(store.importlib.metadata, "version", lambda name, v=version: v)
        store.require_orbax()


def test_the_oldest_orbax_is_pyproject_s():
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    oldest = ".".join(map(str, store.OLDEST_ORBAX))
    assert any(line.startswith(f"orbax-checkpoint>={oldest},") for line in wanted)
