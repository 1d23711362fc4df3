"""`benchmarks/rivals_gpu.py` on a CPU, with doubles in the place of the rivals.

The doubles compute the recurrence in torch, one token after the other, under the names and with
the arguments of flash-linear-attention's function and of RWKV-LM's src/model.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_inputs, rivals_gpu
from benchmarks.rivals_gpu import StepOptions, judged, rows_of
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec
from rwkv_jax.errors import UserError

ROOT = Path(__file__).parents[2]
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is absent")

FLA = """
import torch
import torch_rwkv7

def chunk_rwkv7(r, w, k, v, a, b, scale, safe_gate, lower_bound, chunk_size):
    if r.shape[1] == 24:  # one shape that it gets wrong
        w = w / 2
    if r.shape[1] == 16:  # and one that it refuses
        raise RuntimeError("a longer sequence, please\\nand a traceback")
    B, T, H, N = r.shape
    r, w, k, v, a, b = (x.float() for x in (r, w, k, v, a, b))
    y, _ = torch_rwkv7.wkv(r, w.exp(), k, v, a, b, torch.zeros(B, H, N, N))
    return y.bfloat16(), None
"""

OFFICIAL = """
import importlib, os
import torch
import torch.nn as nn
import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from pytorch_lightning.strategies import DeepSpeedStrategy
if importlib.util.find_spec("deepspeed"):
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
import torch_rwkv7

assert os.path.exists("cuda") and os.environ["RWKV_HEAD_SIZE"] == "64"

class RWKV7_CLAMPW_CUDA_OP:
    def apply(r, w, k, v, a, b):
        B, T, H, N = r.shape
        r, w, k, v, a, b = (x.float() for x in (r, w, k, v, a, b))
        decay = torch.exp(-0.6065306597 * torch.sigmoid(w))
        return torch_rwkv7.wkv(r, decay, k, v, a, b, torch.zeros(B, H, N, N))[0].bfloat16()

class RWKV(pl.LightningModule):
    def __init__(self, args):
        super().__init__()
        self.args = args
        for name, shape in SHAPES.items():
            *path, leaf = name.split(".")
            inner = self
            for part in path:
                if part not in inner._modules:
                    inner.add_module(part, nn.Module())
                inner = inner._modules[part]
            inner.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))

    def configure_optimizers(self):
        assert not self.trainer.is_global_zero
        assert not isinstance(self.trainer.strategy, DeepSpeedStrategy)
        named = dict(self.named_parameters())
        rates = {name: 2.0 if "att.w0" in name else 1.0 for name in named}
        decayed = [n for n, p in named.items() if p.squeeze().ndim >= 2 and ".weight" in n]
        groups = [
            {"params": [named[n] for n in rates if n in decayed], "my_lr_scale": 1.0,
             "weight_decay": self.args.weight_decay},
            *({"params": [named[n] for n in rates if n not in decayed and rates[n] == rate],
               "my_lr_scale": rate, "weight_decay": 0.0} for rate in (1.0, 2.0)),
        ]
        return FusedAdam(groups, lr=self.args.lr_init, betas=self.args.betas,
                         eps=self.args.adam_eps, bias_correction=True, adam_w_mode=True,
                         amsgrad=False)

    def training_step(self, batch, index):
        tokens, targets = batch
        params = {name: p.float() for name, p in self.named_parameters()}
        logits = deepspeed.checkpointing.checkpoint(
            lambda emb: torch_rwkv7.forward({**params, "emb.weight": emb}, tokens)[0],
            params["emb.weight"],
        )
        loss = torch_rwkv7.cross_entropy(logits, targets)
        return loss + torch_rwkv7.l2wrap(logits)
"""

SHAPES = ["1,8,2,64", "1,24,1,64", "2,16,1,64"]  # right, wrong and refused in `FLA`
SIZES = ["--size", "tiny", "--ctx_len", "16", "--micro_bsz", "2"]


def run(arguments: list[str], *path: Path) -> subprocess.CompletedProcess:
    search = os.pathsep.join(map(str, (*path, ROOT, ROOT / "tests" / "support")))
    environment = {"PYTHONPATH": search, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.rivals_gpu", *arguments, *SIZES],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
@needs_torch
def test_doubles_are_timed_beside_ours_where_they_compute_the_same(tmp_path):
    (tmp_path / "fla" / "ops").mkdir(parents=True)
    (tmp_path / "fla" / "ops" / "rwkv7.py").write_text(FLA)
    sources = tmp_path / "RWKV-LM" / "RWKV-v7" / "train_temp"
    for folder in ("src", "cuda"):
        (sources / folder).mkdir(parents=True)
    model = StepOptions("tiny", 16, 2, 1).config().model_config()
    shapes = f"SHAPES = {rivals_gpu.weights.official_shapes(model)}\n"
    (sources / "src" / "model.py").write_text(shapes + OFFICIAL)
    specs = {text: ArgSpec(*map(int, text.split(","))) for text in SHAPES}
    path = tmp_path / "out" / "rivals.json"
    done = run(
        ["--output", str(path), "--shapes", *SHAPES, "--official", str(tmp_path / "RWKV-LM")],
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["benchmark"] == "rivals" and record["on_gpu"] is False
    assert "no GPU" in done.stdout and [x.name for x in path.parent.iterdir()] == [path.name]
    assert len(record["official_sha256"]) == 64

    rows = {(x["implementation"], x.get("shape"), x["pass"]): x for x in record["rows"]}
    assert len(rows) == len(record["rows"]) == 3 * 3 * 2 + 2
    for i, (shape, spec) in enumerate(specs.items()):
        digest = gpu_inputs.sha256(gpu_inputs.wkv7_inputs(spec, 0).values())
        for direction in ("forward", "forward_backward"):
            ours, fla, cuda = (
                rows[name, shape, direction] for name in ("ours", "fla", "official_cuda")
            )
            assert ours["ms"] > 0 and ours["kernel"] == "xla"
            for row in (ours, fla, cuda):
                assert row["inputs_sha256"] == digest
                assert {key: row[key] for key in spec._asdict()} == spec._asdict()
            for row in (cuda, fla) if i == 0 else (cuda,):
                assert row["ratio"] == pytest.approx(row["ms"] / ours["ms"])
                assert max(row["errors"].values()) < 0.01 and len(row["errors"]) == 7
            assert i == 0 or not {"ms", "ratio"} & fla.keys()
    assert "differs from ours by" in rows["fla", SHAPES[1], "forward"]["error"]
    assert rows["fla", SHAPES[2], "forward"]["error"] == "RuntimeError: a longer sequence, please"

    ours, theirs = (rows[name, None, "step"] for name in ("ours", "official_trainer"))
    assert theirs["ratio"] == pytest.approx(theirs["ms"] / ours["ms"])
    assert theirs["tokens_per_s"] == pytest.approx(1e3 * 2 * 16 / theirs["ms"])
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)
    assert len(theirs["errors"]) == 5 and 0 < max(theirs["errors"].values()) < 0.05
    assert theirs["grad_norms"] == pytest.approx(ours["grad_norms"], rel=5e-3)
    assert theirs["losses"][0] - theirs["losses"][2] > 0.1  # they learn, and the same
    assert theirs["batch_sha256"] == gpu_inputs.sha256([gpu_inputs.tokens(2, 16, 65536)])
    assert theirs["scripted"] is True
    assert theirs["optimizer"] == "torch.optim.AdamW(fused=True)"


@pytest.mark.slow
def test_what_is_not_there_has_a_line(tmp_path, monkeypatch, capsys):
    """The processes but flash-linear-attention's are left out: they report a row of ours."""

    def rows_of(function, *arguments):
        return [OURS] if function is rivals_gpu.ours_wkv7 else started(function, *arguments)

    started = rivals_gpu.rows_of
    monkeypatch.setattr(rivals_gpu, "rows_of", rows_of)
    path = tmp_path / "rivals.json"
    arguments = ["--output", str(path), "--shapes", SHAPES[0], *SIZES]
    monkeypatch.setattr("sys.argv", ["rivals_gpu", *arguments])
    rivals_gpu.main()
    reasons = {
        "fla": "ModuleNotFoundError: No module named 'fla'",
        "official_cuda": "--official names no checkout of RWKV-LM",
        "official_trainer": "--official names no checkout of RWKV-LM",
    }
    record = json.loads(path.read_text())
    assert record["on_gpu"] and record["device_kind"] == "H"
    rows = {row["implementation"]: row for row in record["rows"]}
    assert rows.pop("ours") == OURS | {"implementation": "ours"}
    assert {name: row["error"] for name, row in rows.items()} == reasons
    printed = capsys.readouterr().out
    assert "ours s forward: 2.000 ms" in printed
    for name, reason in reasons.items():
        assert f"{name}: {reason}" in printed


@pytest.mark.parametrize("failing", ["official_build", "ours_step"])
def test_what_cannot_be_compiled_or_compared_has_a_line(tmp_path, monkeypatch, failing):
    (tmp_path / "RWKV-v7" / "train_temp" / "src").mkdir(parents=True)
    (tmp_path / "RWKV-v7" / "train_temp" / "src" / "model.py").touch()
    called = []

    def rows_of(function, *_):
        called.append(function.__name__)
        return [{"error": "no memory"}] if function.__name__ == failing else []

    monkeypatch.setattr(rivals_gpu, "rows_of", rows_of)
    path = tmp_path / "rivals.json"
    arguments = ["--output", str(path), "--official", str(tmp_path), "--shapes", SHAPES[0], *SIZES]
    monkeypatch.setattr("sys.argv", ["rivals_gpu", *arguments])
    rivals_gpu.main()
    rows = json.loads(path.read_text())["rows"]
    errors = {row["implementation"]: row["error"] for row in rows}
    if failing == "official_build":
        assert errors == {"official_cuda": "no memory", "official_trainer": "no memory"}
    else:
        reason = "there is no time of ours beside it"
        assert errors == {"ours": "no memory", "official_trainer": reason}
    assert "official_trainer" not in called


OURS = {
    "what": "wkv7", "shape": "s", "batch": 1, "time": 16, "head": 1, "size": 64, "pass": "forward",
    "card": "H", "inputs_sha256": "0", "ms": 2.0,
}  # fmt: skip
STEP = {
    "what": "step", "size": "0.1b", "ctx_len": 16, "micro_bsz": 1, "grad_cp": 1, "pass": "step",
    "card": "H", "inputs_sha256": "0", "ms": 2.0, "losses": [11.0, 10.0, 9.0],
    "grad_norms": [3.0, 2.0, 1.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "changed", "words"),
    [
        (OURS, {"inputs_sha256": "1"}, "inputs_sha256 is 1; ours is 0"),
        (OURS, {"card": "cpu"}, "card is cpu; ours is H"),
        (OURS, {"time": 32}, "time is 32; ours is 16"),
        (OURS, {"pass": "forward_backward"}, "no time of ours"),
        (OURS, {"errors": {"y": 0.01, "w": 0.3}}, "the gradient of w differs from ours by 0.3 of"),
        (OURS, {"errors": {"y": float("nan")}}, "y differs from ours by nan"),
        (STEP, {"inputs_sha256": "1"}, "inputs_sha256 is 1"),
        (STEP, {"micro_bsz": 2}, "no time of ours"),
        (STEP, {"errors": {"emb.weight": 0.2}}, "the gradient of emb.weight differs from ours by"),
        (STEP, {"losses": [11.0, 10.0, 9.5]}, "the loss of step 3 is 9.5; ours is 9"),
        (STEP, {"grad_norms": [3.0, 2.5, 1.0]}, "gradient norm of step 2 is 2.5; ours is 2"),
        (STEP, {"grad_norms": [float("nan"), 2.0, 1.0]}, "the gradient norm of step 1 is nan"),
    ],
)
def test_what_is_not_comparable_has_no_time(ours, changed, words):
    same = judged({**ours, "ms": 3.0}, [ours])
    assert same["ratio"] == 1.5 and "error" not in same
    other = judged({**ours, "ms": 3.0, **changed}, [ours])
    assert words in other["error"] and "ms" not in other and "ratio" not in other


def test_an_error_of_ours_or_of_the_rival_leaves_no_ratio():
    without = {key: value for key, value in OURS.items() if key != "ms"} | {"error": "no memory"}
    assert judged(OURS | {"ms": 3.0}, [without])["error"] == "there is no time of ours beside it"
    assert judged(without, [OURS]) == without


def hangs(report, marker: Path) -> None:
    """What it starts, as compilers are, holds the marker's name for a minute."""
    report({"ms": 1.0})
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", str(marker)])


def dies(report) -> None:
    os._exit(9)


def fails(report) -> None:
    raise ValueError("of two\nlines")


def test_a_process_that_is_late_is_ended_with_what_it_started(tmp_path, monkeypatch):
    marker, reported = tmp_path / "marker", tmp_path / "hangs.jsonl"

    def living() -> list[str]:
        lines = (path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline"))
        return [line for line in lines if bytes(marker) in line]

    def until_all_has_begun(process, limit):
        while not (reported.exists() and reported.read_text() and living()):
            assert process.exitcode is None
            time.sleep(0.05)

    monkeypatch.setattr(rivals_gpu, "_wait", until_all_has_begun)
    rows = rows_of(hangs, (marker,), tmp_path, 3)
    assert rows == [{"ms": 1.0}, {"error": "it was ended after its limit of 3 s"}]

    end = time.monotonic() + 10
    while living() and time.monotonic() < end:
        time.sleep(0.05)
    assert not living()


@pytest.mark.slow
def test_how_a_process_ended_is_a_row(tmp_path):
    assert rows_of(dies, (), tmp_path, 60) == [{"error": "its process ended with status 9"}]
    assert rows_of(fails, (), tmp_path, 60) == [{"error": "ValueError: of two"}]


@needs_torch
def test_extensions_are_those_that_the_source_loads(tmp_path):
    import torch
    from torch.utils import cpp_extension

    sources = tmp_path / "RWKV-v7" / "train_temp"
    (sources / "src").mkdir(parents=True)
    (sources / "src" / "model.py").write_text(
        "import os, torch\n"
        "from torch.utils.cpp_extension import load\n"
        "load(name='one', sources=['cuda/1.cu'], extra_cuda_cflags=['-DN=' + "
        "os.environ['RWKV_HEAD_SIZE']])\n"
        "torch.library.register_autograd('one::forward', None)\n"
        "@torch.jit.script\n"
        "def op(x): return torch.ops.one.forward(x)\n"
        "two = load(name='two', sources=['cuda/2.cu'])\n"
    )
    before = cpp_extension.load, torch.library.register_autograd, torch.jit.script, list(sys.path)
    assert rivals_gpu.extensions(tmp_path) == [
        {"name": "one", "sources": ["cuda/1.cu"], "extra_cuda_cflags": ["-DN=64"]},
        {"name": "two", "sources": ["cuda/2.cu"]},
    ]
    after = cpp_extension.load, torch.library.register_autograd, torch.jit.script, list(sys.path)
    assert after == before and "RWKV_HEAD_SIZE" not in os.environ
    assert "deepspeed" not in sys.modules


@needs_torch
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method. is deprecated")
def test_a_model_that_torch_cannot_script_is_taken_as_it_is(tmp_path):
    sources = tmp_path / "RWKV-v7" / "train_temp"
    (sources / "src").mkdir(parents=True)
    (sources / "src" / "model.py").write_text(
        "import torch\n"
        "class TMix(torch.jit.ScriptModule):\n"
        "    @torch.jit.script_method\n"
        "    def forward(self, x):\n"
        "        return x\n"
        "class RWKV:\n"
        "    def __init__(self, args):\n"
        "        self.scripted = isinstance(TMix(), torch.jit.ScriptModule)\n"
        "        if self.scripted and args.new:\n"
        "            raise RuntimeError('not supported in Torchscript')\n"
    )
    for new in (False, True):
        model, scripted = rivals_gpu.official_rwkv(tmp_path, types.SimpleNamespace(new=new))
        assert model.scripted == scripted == (not new)


@needs_torch
def test_parts_together_try_every_form_of_a_kernel_once(monkeypatch):
    tried, chosen = [], []

    class Autotuner:
        configs = ["refused", "slow", "fast", "slower"]

        def _bench(self, *arguments, config, **meta):
            tried.append(config)
            times = {"slow": 2.0, "refused": float("inf"), "fast": 1.0, "slower": 3.0}
            return 3 * [times[config]]

        def run(self):
            return min(self.configs, key=lambda config: self._bench(1, config=config, BT=64))

    def chunk_rwkv7(*inputs, **_):
        chosen.append(Autotuner().run())
        return sum(inputs), None

    bench = Autotuner._bench
    for name, content in {
        "triton.runtime.autotuner": {"Autotuner": Autotuner},
        "fla.ops.rwkv7": {"chunk_rwkv7": chunk_rwkv7},
    }.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:i]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        module.__dict__.update(content)
    for part in range(4):
        rivals_gpu.try_forms(ArgSpec(1, 2, 1, 16), 4, part)
    assert sorted(tried) == sorted(Autotuner.configs)
    assert chosen == ["slow", "slow", "fast", "slower"]  # the first part's own one is refused
    assert Autotuner._bench is bench


def test_the_compiler_is_found_behind_a_script(tmp_path, monkeypatch):
    program = tmp_path / "nvcc"
    program.write_text(
        "#!/bin/sh\necho '#$ _HERE_=/opt/cuda-13.0/bin' >&2\necho '#$ _THERE_=/' >&2\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    found = rivals_gpu.compiler_environment(tmp_path)
    assert found["CUDA_HOME"] == "/opt/cuda-13.0"
    assert found["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "extensions")
    assert found["CPLUS_INCLUDE_PATH"].split(":")[0] == "/mine"
    monkeypatch.setenv("CUDA_HOME", "/own")
    assert "CUDA_HOME" not in rivals_gpu.compiler_environment(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CUDA_HOME")
    assert "CUDA_HOME" not in rivals_gpu.compiler_environment(tmp_path)


def test_inputs_are_the_same_bits_for_the_same_seed():
    spec = ArgSpec(1, 8, 2, 16)
    first, again, other = (gpu_inputs.wkv7_inputs(spec, seed) for seed in (0, 0, 1))
    digests = [gpu_inputs.sha256(x.values()) for x in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]
    norms = np.linalg.norm(first["a"].astype(np.float32), axis=-1)
    np.testing.assert_allclose(norms, 1, atol=0.02)
    along = (first["a"].astype(np.float32) * first["b"].astype(np.float32)).sum(-1)
    assert np.all(along < 0) and np.all(along > -1.02)
    zeros = np.zeros(4, np.int32)
    assert gpu_inputs.sha256([zeros]) != gpu_inputs.sha256([zeros.reshape(2, 2)])
    batch = gpu_inputs.tokens(2, 7, 50)
    assert batch.shape == (2, 8) and batch.dtype == np.int32 and batch.max() < 50


def test_shapes_are_names_or_four_numbers():
    assert gpu_inputs.shape("0.1b_short") == ("0.1b_short", ARG_SPECS["0.1b_short"])
    assert gpu_inputs.shape("1,2,3,64") == ("1,2,3,64", ArgSpec(1, 2, 3, 64))
    for wrong in ("1,2,3", "1,2,3,65", "0,2,3,64", "0.2b"):
        with pytest.raises(UserError, match=f"--shapes {wrong}: "):
            gpu_inputs.shape(wrong)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    done = run(["--output", str(tmp_path / "r.json"), "--official", str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr == f"error: --official {tmp_path}: has no RWKV-v7/train_temp/src/model.py\n"
