"""Conversion: the same bytes after both ways, what rwkv_jax.load makes of it, and error lines."""

import filecmp
import os
import resource
import runpy
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import rwkv_jax
from rwkv_jax import generate
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.convert import (
    describe,
    hf_to_pth,
    orbax_to_pth,
    pth_to_hf,
    pth_to_orbax,
    pth_to_st,
    st_to_pth,
    verify,
)
from rwkv_jax.errors import UserError

ROOT = Path(__file__).parents[2]
ORACLES = Path(__file__).parents[1] / "data" / "oracles"
NO_V0 = ORACLES / "tiny_v512_rand_bf16_nov0.pth"
FP32, BF16 = ORACLES / "tiny_v512_rand_fp32.pth", ORACLES / "tiny_v512_rand_bf16.pth"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert") / "new" / "checkpoint"
    pth_to_orbax.main([str(FP32), str(folder)])
    return folder


def same_tensors(one: dict, two: dict) -> bool:
    return list(one) == list(two) and all(
        (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
        for a, b in zip(one.values(), two.values(), strict=True)
    )


@pytest.fixture
def sources(tmp_path, checkpoint) -> dict:
    """What each converter reads."""
    pth_to_hf.main([str(FP32), str(tmp_path / "hf")])
    pth_to_st.main([str(FP32), str(tmp_path / "model.st")])
    return {
        pth_to_orbax: FP32,
        orbax_to_pth: checkpoint,
        pth_to_hf: FP32,
        hf_to_pth: tmp_path / "hf",
        pth_to_st: FP32,
        st_to_pth: tmp_path / "model.st",
    }


CONVERTERS = [pth_to_orbax, orbax_to_pth, pth_to_hf, hf_to_pth, pth_to_st, st_to_pth]


# Some of orbax's own threads may fail, too, and nobody asks those for their result.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("converter", CONVERTERS, ids=lambda module: module.__name__)
def test_a_full_disk_leaves_nothing_behind(converter, sources, tmp_path):
    before, target = sorted(tmp_path.iterdir()), tmp_path / "target.pth"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"^{target}: cannot (write|be written): "):
            converter.main([str(sources[converter]), str(target)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("source", "options"), [(FP32, ["--dtype", "float32"]), (BF16, [])])
def test_round_trip_is_exact(tmp_path, source, options):
    exported, folder, back = tmp_path / "a.pth", tmp_path / "folder", tmp_path / "b.pth"
    tensors = pth.read(source)
    weights.save_pth(exported, weights.load_pth(source)[1], tensors["emb.weight"].dtype)
    pth_to_orbax.main([str(exported), str(folder)])
    orbax_to_pth.main([str(folder), str(back), *options])
    assert back.read_bytes() == exported.read_bytes()
    assert same_tensors(pth.read(back), tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth", "folder"]


MEASURED = """
import sys, threading, time
import jax
from rwkv_jax.convert import orbax_to_pth, pth_to_orbax

def anonymous():  # what is neither of a file nor shared
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        seen.append(anonymous())
        time.sleep(0.002)

jax.devices()
seen = [anonymous()]
threading.Thread(target=watch, daemon=True).start()
pth_to_orbax.main(["a.pth", "checkpoint"])
orbax_to_pth.main(["checkpoint", "b.pth"])
print(max(seen) - seen[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """300 MB, which are 600 as a tree: what both ways take stays far below."""
    config = ModelConfig(n_layer=20, n_embd=768, vocab_size=8192)
    noise = np.random.default_rng(0).integers(0, 1 << 14, 4096 * 768, np.uint16)
    noise = noise.view(ml_dtypes.bfloat16)
    shapes = weights.official_shapes(config)
    pth.write(tmp_path / "a.pth", {name: np.resize(noise, shape) for name, shape in shapes.items()})
    size = (tmp_path / "a.pth").stat().st_size
    assert size > 300e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < size
    assert filecmp.cmp(tmp_path / "a.pth", tmp_path / "b.pth", shallow=False)


def test_load_takes_the_checkpoint(checkpoint):
    config, params = rwkv_jax.load_params(checkpoint)
    expected = weights.load_pth(FP32)
    assert config == expected[0]
    assert same_tensors(weights_of(params), weights_of(expected[1]))


def weights_of(params) -> dict[str, np.ndarray]:
    return {name: np.asarray(tensor) for name, tensor in weights.to_official(params).items()}


def test_a_bf16_file_is_rounded_to_nearest(checkpoint, tmp_path):
    orbax_to_pth.main([str(checkpoint), str(tmp_path / "x.pth")])
    head = pth.read(tmp_path / "x.pth")["head.weight"]
    expected = pth.read(FP32)["head.weight"].astype(ml_dtypes.bfloat16)
    assert head.dtype == expected.dtype and head.tobytes() == expected.tobytes()


def refusal(command, *arguments) -> str:
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        command.main([str(argument) for argument in arguments])
    return str(caught.value)


def test_error_lines(checkpoint, tmp_path):
    new, file = tmp_path / "new", tmp_path / "file"
    file.write_bytes(b"x")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "cannot be read" in refusal(pth_to_orbax, tmp_path / "no.pth", new)
    assert "exists already" in refusal(pth_to_orbax, FP32, checkpoint)
    assert "exists already" in refusal(pth_to_orbax, FP32, file)
    assert "file: cannot be written: it is not a folder" in refusal(pth_to_orbax, FP32, file / "x")
    assert "is not a folder" in refusal(orbax_to_pth, tmp_path / "no", new)
    assert "is not a folder" in refusal(orbax_to_pth, FP32, new)
    for folder in (tmp_path, tmp_path / "run", checkpoint.parent):
        assert "no checkpoints" in refusal(orbax_to_pth, folder, new)
    assert "exists already" in refusal(orbax_to_pth, checkpoint, file)
    assert "cannot be written" in refusal(orbax_to_pth, checkpoint, new / "x.pth")
    assert "cannot be read" in refusal(describe, tmp_path / "no.pth")
    assert file.read_bytes() == b"x" and sorted(tmp_path.iterdir()) == [file, tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-m", "convert.describe", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[str(BF16)], [str(BF16), str(BF16)]])
def test_output_that_does_not_fit_is_an_error_in_one_line(arguments):
    """Much of it, which is written at once, and a line that waits for the end."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "convert.describe", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_the_folder_hides_no_module_of_python():
    done = subprocess.run(
        [sys.executable, "-c", "import inspect; print(inspect.signature)"], cwd=ROOT / "convert",
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    hidden = {path.stem for path in (ROOT / "convert").glob("*.py")} & sys.stdlib_module_names
    assert not hidden


def test_the_former_name_of_describe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["inspect", str(BF16)])
    with pytest.raises(SystemExit):
        runpy.run_module("convert.inspect", run_name="__main__")
    assert capsys.readouterr().out.startswith("RWKV-7, 3 layers of width 128")


# ------------------------------------------------------------------------------------ safetensors


def test_a_st_is_what_web_rwkvs_own_converter_makes(tmp_path):
    """Its rules: all in float16, and w1, w2, …, v2 transposed; the order does not matter to it."""
    for source in (FP32, BF16):
        pth_to_st.main([str(source), str(tmp_path / f"{source.stem}.st")])
        ours = safetensors.numpy.load_file(tmp_path / f"{source.stem}.st")
        theirs = {}
        for name, tensor in pth.read(source).items():
            values = tensor.astype(np.float16)
            low_rank = any(mark in name for mark in "w1 w2 a1 a2 g1 g2 v1 v2".split())
            theirs[name] = values.swapaxes(-1, -2) if low_rank else values
        assert same_tensors(ours, {name: theirs[name] for name in ours}) and len(ours) == len(
            theirs
        )
        assert ours["blocks.1.att.w1"].shape == (32, 128)
        assert ours["blocks.1.att.x_r"].shape == (1, 1, 128)


@pytest.mark.parametrize(
    ("source", "dtype"),
    [(FP32, "float32"), (BF16, "bfloat16"), (NO_V0, "bfloat16"), (FP32, "float16")],
)
def test_the_way_by_a_st_is_exact(tmp_path, source, dtype):
    one, two = tmp_path / "a.pth", tmp_path / "b.pth"
    pth.write(one, pth.read(source), dtype)
    pth_to_st.main([str(one), str(tmp_path / "a.st"), "--dtype", dtype])
    st_to_pth.main([str(tmp_path / "a.st"), str(two)])
    assert one.read_bytes() == two.read_bytes()
    pth_to_st.main([str(two), str(tmp_path / "b.st"), "--dtype", dtype])
    assert (tmp_path / "a.st").read_bytes() == (tmp_path / "b.st").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.st", "b.pth", "b.st"]


def test_a_st_is_described_and_verified(tmp_path, capsys):
    pth_to_st.main([str(BF16), str(tmp_path / "model.st")])
    capsys.readouterr()
    describe.main([str(tmp_path / "model.st")])
    assert capsys.readouterr().out.startswith(
        "RWKV-7, 3 layers of width 128, inner width 512, voca"
    )
    verify.main([str(tmp_path / "model.st")])
    assert capsys.readouterr().out.split() == "web-rwkv, Ai00 yes".split()
    pth_to_st.main([str(BF16), str(tmp_path / "b.st"), "--dtype", "bfloat16"])
    assert verify.verify(tmp_path / "b.st") == {
        "web-rwkv, Ai00": "blocks.0.att.a0 is bfloat16; it loads only float16"
    }


def test_memory_of_a_st_is_that_of_a_few_tensors(tmp_path):
    config = ModelConfig(n_layer=20, n_embd=192, vocab_size=1024)
    shapes = weights.official_shapes(config)
    pth.write(tmp_path / "a.pth", {n: np.zeros(s, np.float32) for n, s in shapes.items()})
    size = (tmp_path / "a.pth").stat().st_size
    tracemalloc.start()
    try:
        pth_to_st.main([str(tmp_path / "a.pth"), str(tmp_path / "a.st"), "--dtype", "float32"])
        st_to_pth.main([str(tmp_path / "a.st"), str(tmp_path / "b.pth")])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size > 25e6 and peak < size / 8


def test_error_lines_of_a_st(tmp_path):
    new, model = tmp_path / "new", tmp_path / "model.st"
    pth_to_st.main([str(FP32), str(model)])
    assert "model.st: exists already" in refusal(pth_to_st, FP32, model)
    assert "exists already" in refusal(st_to_pth, model, FP32)
    assert "no.st: cannot read: No such file" in refusal(st_to_pth, tmp_path / "no.st", new)
    assert "is damaged or not a safetensors file" in refusal(st_to_pth, FP32, new)
    for command in (generate, pth_to_orbax, pth_to_st):
        arguments = ["--load_model", model] if command is generate else [model, new]
        assert (
            "model.st: is a safetensors file, not a .pth: convert it with rwkv-jax st-to-pth"
            in (refusal(command, *arguments))
        )
    large = dict(pth.read(FP32))
    large["head.weight"] = large["head.weight"] + 1e5
    pth.write(tmp_path / "large.pth", large)
    message = refusal(pth_to_st, tmp_path / "large.pth", new)
    assert "large.pth: head.weight: has values beyond the range of float16; use bfloat16" in message
    tensors = safetensors.numpy.load_file(model)
    for change, complaint in [
        ({"note": np.zeros(3, np.float16)}, "has tensors that RWKV-7 does not have: note;"),
        ({"blocks.0.att.key.lora.0": np.zeros((8, 128), np.float16)}, "is an unmerged LoRA"),
        ({"head.weight": np.zeros((512, 128), np.int8)}, "head.weight is I8, not floating point"),
        ({"blocks.1.att.w1": np.zeros((128, 32), np.float16)}, "w1 is [32, 128] and should be"),
    ]:
        safetensors.numpy.save_file(tensors | change, tmp_path / "changed.st")
        message = refusal(st_to_pth, tmp_path / "changed.st", new)
        assert "changed.st: " in message and complaint in message
    assert not new.exists()


# --------------------------------------------------------------------------------------- describe


def test_describe_describes(capsys, checkpoint):
    describe.main([str(BF16)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("RWKV-7, 3 layers of width 128, inner width 512, vocabulary 512")
    total = sum(tensor.size for tensor in pth.read(BF16).values())
    assert lines[1] == f"{total:,} parameters in 105 tensors, {2 * total / 1e6:,.1f} MB"
    rows = [line.split() for line in lines[4:]]
    assert ["blocks.0-2.att.w1", "128", "x", "32", "bfloat16"] in rows
    assert ["blocks.0.ln0.bias", "128", "bfloat16"] in rows
    describe.main([str(checkpoint)])
    assert "blocks.0-2.att.w1 " in capsys.readouterr().out


def test_describe_of_what_is_not_rwkv7_cannot_write_to_the_terminal(tmp_path, capsys):
    pth.write(tmp_path / "x.pth", {"blocks.0.\x1b[2J": np.ones((2, 3), np.float32)})
    describe.main([str(tmp_path / "x.pth")])
    out = capsys.readouterr().out
    assert "not RWKV-7" in out and r"blocks.0.\x1b[2J  2 x 3  float32" in out
    assert "\x1b" not in out


def test_describe_compares(tmp_path, capsys, checkpoint):
    tensors = dict(pth.read(FP32))
    changed = dict(tensors)
    changed["head.weight"] = tensors["head.weight"].copy()
    changed["head.weight"][3, 4] -= 0.25
    changed["blocks.1.att.r_k"] = tensors["blocks.1.att.r_k"].reshape(-1)
    changed["ln_out.bias"] = tensors["ln_out.bias"].astype(np.float16)
    changed["extra"] = changed.pop("emb.weight")
    pth.write(tmp_path / "x.pth", changed)
    describe.main([str(FP32), str(tmp_path / "x.pth")])
    out = capsys.readouterr().out
    rows = dict(line.split(None, 1) for line in out.splitlines() if line)
    assert rows["head.weight"] == "values by up to 0.25"
    assert rows["blocks.1.att.r_k"] == "shape 2 x 64, 128"
    assert rows["ln_out.bias"].startswith("dtype float32, float16; values by up to ")
    assert (rows["emb.weight"], rows["extra"]) == ("only in the first", "only in the second")
    assert rows["largest"].endswith(": 0.25") and len(rows) == 7
    describe.main([str(FP32), str(checkpoint)])
    assert capsys.readouterr().out == "the same names, shapes, dtypes and values\n"


def test_describe_compares_values_that_are_not_numbers():
    nan = np.array([np.nan, 1], np.float32)
    assert "same" in describe.compare({"x": nan}, {"x": nan.copy()})
    for order in ([nan, nan[1:]], [nan[1:], nan]):
        one = {name: value for name, value in zip("ab", order, strict=True)}
        two = {name: np.zeros_like(value) for name, value in one.items()}
        assert describe.compare(one, two).endswith("difference of values: nan")
