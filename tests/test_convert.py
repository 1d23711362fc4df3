"""Conversion: the same bytes after both ways, what rwkv_jax.load makes of it, and error lines."""

import filecmp
import os
import resource
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import rwkv_jax
from convert import hf_to_pth, inspect, orbax_to_pth, pth_to_hf, pth_to_orbax
from rwkv_jax import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError

ORACLES = Path(__file__).parent / "data" / "oracles"
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
    return {
        pth_to_orbax: FP32,
        orbax_to_pth: checkpoint,
        pth_to_hf: FP32,
        hf_to_pth: tmp_path / "hf",
    }


CONVERTERS = [pth_to_orbax, orbax_to_pth, pth_to_hf, hf_to_pth]


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
from convert import orbax_to_pth, pth_to_orbax

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
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "JAX_PLATFORMS": "cpu"},
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
    assert "cannot be read" in refusal(inspect, tmp_path / "no.pth")
    assert file.read_bytes() == b"x" and sorted(tmp_path.iterdir()) == [file, tmp_path / "run"]
    done = subprocess.run(
        [sys.executable, "-m", "convert.inspect", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[str(BF16)], [str(BF16), str(BF16)]])
def test_output_that_does_not_fit_is_an_error_in_one_line(arguments):
    """Much of it, which is written at once, and a line that waits for the end."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "convert.inspect", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


# ------------------------------------------------------------------------------------- inspect


def test_inspect_describes(capsys, checkpoint):
    inspect.main([str(BF16)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("RWKV-7, 3 layers of width 128, inner width 512, vocabulary 512")
    total = sum(tensor.size for tensor in pth.read(BF16).values())
    assert lines[1] == f"{total:,} parameters in 105 tensors, {2 * total / 1e6:,.1f} MB"
    rows = [line.split() for line in lines[4:]]
    assert ["blocks.0-2.att.w1", "128", "x", "32", "bfloat16"] in rows
    assert ["blocks.0.ln0.bias", "128", "bfloat16"] in rows
    inspect.main([str(checkpoint)])
    assert "blocks.0-2.att.w1 " in capsys.readouterr().out


def test_inspect_of_what_is_not_rwkv7_cannot_write_to_the_terminal(tmp_path, capsys):
    pth.write(tmp_path / "x.pth", {"blocks.0.\x1b[2J": np.ones((2, 3), np.float32)})
    inspect.main([str(tmp_path / "x.pth")])
    out = capsys.readouterr().out
    assert "not RWKV-7" in out and r"blocks.0.\x1b[2J  2 x 3  float32" in out
    assert "\x1b" not in out


def test_inspect_compares(tmp_path, capsys, checkpoint):
    tensors = dict(pth.read(FP32))
    changed = dict(tensors)
    changed["head.weight"] = tensors["head.weight"].copy()
    changed["head.weight"][3, 4] -= 0.25
    changed["blocks.1.att.r_k"] = tensors["blocks.1.att.r_k"].reshape(-1)
    changed["ln_out.bias"] = tensors["ln_out.bias"].astype(np.float16)
    changed["extra"] = changed.pop("emb.weight")
    pth.write(tmp_path / "x.pth", changed)
    inspect.main([str(FP32), str(tmp_path / "x.pth")])
    out = capsys.readouterr().out
    rows = dict(line.split(None, 1) for line in out.splitlines() if line)
    assert rows["head.weight"] == "values by up to 0.25"
    assert rows["blocks.1.att.r_k"] == "shape 2 x 64, 128"
    assert rows["ln_out.bias"].startswith("dtype float32, float16; values by up to ")
    assert (rows["emb.weight"], rows["extra"]) == ("only in the first", "only in the second")
    assert rows["largest"].endswith(": 0.25") and len(rows) == 7
    inspect.main([str(FP32), str(checkpoint)])
    assert capsys.readouterr().out == "the same names, shapes, dtypes and values\n"


def test_inspect_compares_values_that_are_not_numbers():
    nan = np.array([np.nan, 1], np.float32)
    assert "same" in inspect.compare({"x": nan}, {"x": nan.copy()})
    for order in ([nan, nan[1:]], [nan[1:], nan]):
        one = {name: value for name, value in zip("ab", order, strict=True)}
        two = {name: np.zeros_like(value) for name, value in one.items()}
        assert inspect.compare(one, two).endswith("difference of values: nan")
