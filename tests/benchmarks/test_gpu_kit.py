"""`make gpu-report` and its stages, rehearsed on a CPU, and what they leave when one goes wrong."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
from jax.profiler import ProfileData
from packaging.requirements import Requirement

from benchmarks import gpu_report, machine, profile_gpu, train_step_gpu
from rwkv_jax.config import TrainConfig
from rwkv_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = ["--n_layer", "1", "--n_embd", "64", "--ctx_len", "32"]


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [number for item in tree for number in numbers(item)]
    return [tree] if isinstance(tree, float) else []


def load(folder: Path, name: str) -> dict[str, Any]:
    record = json.loads((folder / f"{name}.json").read_text("utf-8"))
    found = numbers(record)
    assert all(map(math.isfinite, found)), name
    return record


@pytest.fixture
def clone(tmp_path) -> Path:
    """What git knows of this checkout; of a copy that git does not know, the copy."""
    folder = tmp_path / "clone"
    if (ROOT / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    else:
        ignored = shutil.ignore_patterns(".*", "out", "build", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.mark.slow
def test_everything_that_a_gpu_is_asked_is_rehearsed(clone, tmp_path):
    """From a clean clone, with nothing in the environment, no network and no set-up."""
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    # So much time that no stage is cut, whatever else the machine does.
    arguments = "ARGS=--rehearse --limit 3000"
    target = ["gpu-report", "SETUP=0", f"PYTHON={sys.executable}", f"OUT={out}", arguments]
    variables = {"HOME": str(home), "PATH": os.environ["PATH"], "PIP_NO_INDEX": "1"}
    done = subprocess.run(["make", *target], cwd=clone, env=variables, capture_output=True)
    said = done.stdout.decode() + done.stderr.decode()
    logs = [path.read_text("utf-8", "replace") for path in out.glob("log.txt")]
    assert done.returncode == 0, "\n".join([said, *logs])
    assert {path.name for path in out.iterdir()} == {
        "log.txt",
        "summary.json",
        "gpu.md",
        "wkv7_cpu.json",
        "train_step_cpu.json",
        "profile_cpu.json",
        "trace.xplane.pb.gz",
    }
    assert not (clone / ".venv").exists()

    summary = load(out, "summary")
    assert [row["stage"] for row in summary["stages"]] == [
        stage.name for stage in gpu_report.STAGES if stage.name != "rivals"
    ]
    assert {row["status"] for row in summary["stages"]} == {"passed"}
    assert all(row["seconds"] <= row["limit"] for row in summary["stages"])
    assert summary["rehearsal"] is True and summary["device_kind"] == "cpu"
    tests = summary["suite"]
    assert tests["passed"] == tests["all"] > 4 and not tests["failures"]
    log = (out / "log.txt").read_text("utf-8")
    for row in summary["stages"]:
        assert f"===== {row['stage']}\n" in log and row["stage"] in said

    step = load(out, "train_step_cpu")
    [row], command = step["rows"], step["command"]
    assert (row["micro_bsz"], row["grad_cp"], row["from_disk"]) == (1, 1, True)
    for each in (row, command):
        assert each["tokens_per_s"] * each["ms"] / 1e3 == pytest.approx(32)
        assert 0 < each["loss"] < 12 and each["steps"] >= 3

    profile = load(out, "profile_cpu")
    kernels, parts = profile["kernels"], profile["parts"]
    assert sum(row["share"] for row in kernels) == pytest.approx(1)
    assert 0 < profile["busy_share"] <= 1 and profile["steps"] == 5
    for name, ms in parts.items():
        of_part = [row["ms"] for row in kernels if row["part"] == name]
        assert ms == pytest.approx(sum(of_part))
        assert (ms > 0) == (name not in ("collectives",)), name

    timed = [row["pass"] for row in load(out, "wkv7_cpu")["rows"] if "ms" in row]
    assert timed == ["forward", "forward_backward"]


# A kit of quick stages in the place of the real ones.
DRIVER = """
import json, sys
from benchmarks import gpu_report
from benchmarks.gpu_report import Stage

def python(code):
    return lambda kit: [sys.executable, "-c", code]

def found(platform):
    described = json.dumps({"device_kind": "Some GPU", "platform": platform})
    write = "import sys; open(sys.argv[1] + '/machine.json', 'w').write(sys.argv[2])"
    return lambda kit: [sys.executable, "-c", write, str(kit.scratch), described]

SLOW = "print('begun', flush=True); import time; time.sleep(600)"
# A child that an interrupt does not end, as its parent.
FAMILY = "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN); "
FAMILY += "print(subprocess.Popen(['sleep', '600']).pid); " + SLOW
gpu_report.GRACE = 0.2
gpu_report.LEAST = 0.5
gpu_report.STAGES = [Stage("machine", found("gpu"), 20), STAGES]
gpu_report.run_command(gpu_report.main)
"""


def begin(tmp_path: Path, stages: str, *arguments: str, code: str = DRIVER) -> subprocess.Popen:
    code = code.replace("STAGES]", f"{stages}]")
    command = [sys.executable, "-c", code, "--output", str(tmp_path / "out"), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)


def statuses(tmp_path: Path) -> dict[str, str]:
    rows = load(tmp_path / "out", "summary")["stages"]
    return {row["stage"]: row["status"] for row in rows}


def ends(pid: int) -> bool:
    """Whether a process is gone, or will be at once: it has got its signal."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_a_stage_that_overruns_is_ended_with_all_that_it_started(tmp_path):
    stages = 'Stage("slow", python(FAMILY), 1.5), Stage("next", python("print(1)"), 20)'
    process = begin(tmp_path, stages, "--limit", "41")
    said, complaint = process.communicate()
    assert process.returncode == 2 and complaint == "error: not all stages passed\n"
    assert statuses(tmp_path) == {
        "machine": "passed",
        "slow": "stopped by its limit",
        "next": "passed",
    }
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "begun" in log and "stopped by its limit" in said
    assert ends(int(re.findall(r"^\d+$", log, re.M)[0]))


def test_a_stage_that_fails_does_not_stop_the_others(tmp_path):
    """Nor does a record of an earlier report pass for one of this."""
    (tmp_path / "out").mkdir()
    for name in ("wkv7_nvidia_h100.json", "notes.json"):
        (tmp_path / "out" / name).touch()
    stages = 'Stage("bad", python("print(7); exit(3)"), 20), Stage("next", python("print(1)"), 20)'
    process = begin(tmp_path, stages)
    said, _ = process.communicate()
    assert process.returncode == 2
    assert statuses(tmp_path) == {
        "machine": "passed",
        "bad": "failed with status 3",
        "next": "passed",
    }
    assert re.search(r"bad: failed with status 3 after \d+ s\n    7\n", said)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"notes.json", "log.txt", "summary.json"}


def test_a_very_long_log_keeps_its_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "LOG_END", 20)
    report = gpu_report.Report(gpu_report.Kit(tmp_path, tmp_path, {}, False), [], 1)
    for text, kept in (
        ("a" * 40, "a" * 40),
        ("a" * 30 + "b" * 30, f"{'a' * 20}\n[...]\n{'b' * 20}"),
    ):
        report.log.write_text(text)
        report.close()
        assert report.log.read_text() == kept


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_found_is_there_after_a_signal(tmp_path, number):
    stages = (
        'Stage("good", python("print(1)"), 20), Stage("beside", python(SLOW), 20, beside=True), '
        'Stage("slow", python(FAMILY), 20), Stage("next", python("print(1)"), 20)'
    )
    process = begin(tmp_path, stages)
    log = tmp_path / "out" / "log.txt"
    while "begun" not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    said, _ = process.communicate()
    assert process.returncode == 128 + number
    assert statuses(tmp_path) == {
        "machine": "passed",
        "good": "passed",
        "beside": "interrupted",
        "slow": "interrupted",
        "next": "not begun",
    }
    assert re.search(r"slow +interrupted\n +next +not begun", said)
    assert ends(int(re.findall(r"^\d+$", log.read_text().split("== slow")[1], re.M)[0]))


SIGNALLED = """
import os, signal, subprocess
real = subprocess.Popen.__init__
def popen(process, command, **options):
    real(process, command, **options)
    if "600" in command[-1]:
        os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen.__init__ = popen
"""


def test_a_stage_that_is_just_beginning_is_ended_by_a_signal(tmp_path):
    """The signal comes when the process is there, and nobody has noted it yet."""
    process = begin(tmp_path, 'Stage("slow", python(SLOW), 20)', code=SIGNALLED + DRIVER)
    _, complaint = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, complaint
    assert statuses(tmp_path)["slow"] == "interrupted"


@pytest.mark.parametrize("names", [["suite", "wkv7"], None])
@pytest.mark.parametrize("grace_taken", [False, True])
def test_the_whole_ends_in_its_limit(monkeypatch, tmp_path, names, grace_taken):
    """With each stage, but the first, as long as it may take: the later ones get what they need."""
    now, allowed = 0.0, {}

    class Endless:
        def __init__(self, stage, kit, limit, log):
            self.stage, self.limit, self.began = stage, limit, now
            self.status, self.overran, self.seconds = 2, True, limit
            allowed[stage.name] = limit

        def finish(self):
            nonlocal now
            if self.stage.name == "machine":
                now, self.status, self.overran = 20.0, 0, False
                return
            now = max(now, self.began + self.limit + (gpu_report.GRACE if grace_taken else 0))

        def text(self):
            return ""

    monkeypatch.setattr(gpu_report, "Running", Endless)
    monkeypatch.setattr(gpu_report, "time", types.SimpleNamespace(monotonic=lambda: now))
    described = {"device_kind": "Some GPU", "platform": "gpu"}
    (tmp_path / "machine.json").write_text(json.dumps(described))
    kit = gpu_report.Kit(tmp_path, tmp_path, {}, False)
    stages = gpu_report.choose(names or [s.name for s in gpu_report.STAGES if s.name != "rivals"])
    limit = 480 if names else gpu_report.LIMIT
    assert gpu_report.Report(kit, stages, limit).run() is False
    assert now <= limit and not {stage.name for stage in stages} - set(allowed)
    for stage in stages:
        assert allowed[stage.name] >= min(stage.needs, stage.limit) - gpu_report.GRACE
    if names:  # what the other stages would take is theirs
        assert allowed["suite"] > 200


def test_without_a_gpu_says_so_in_a_line(tmp_path):
    code = DRIVER.replace('found("gpu")', 'found("cpu")')
    process = begin(tmp_path, 'Stage("next", python("print(1)"), 20)', code=code)
    _, complaint = process.communicate()
    assert process.returncode == 2 and statuses(tmp_path)["next"] == "not begun"
    assert complaint == (
        "error: there is no GPU here; --rehearse runs everything in tiny sizes on a CPU\n"
    )


def test_without_a_machine_that_works_nothing_is_begun(tmp_path):
    code = DRIVER.replace('found("gpu")', "python(\"exit('error: no driver')\")")
    process = begin(tmp_path, 'Stage("next", python("print(1)"), 20)', code=code)
    said, complaint = process.communicate()
    log = tmp_path / "out" / "log.txt"
    failed = "failed with status 1"
    assert process.returncode == 2
    assert complaint == f"error: {log}: the machine's check is {failed}: no driver\n"
    assert statuses(tmp_path) == {"machine": failed, "next": "not begun"}
    assert "next  not begun" in said


def test_gpu_test_is_the_suite_and_its_benchmark():
    """Under eight minutes, with the Python that is given, without set-up."""
    command = ["make", "--dry-run", "gpu-test", "SETUP=0", "PYTHON=some-python", "OUT=there"]
    alone = {"PATH": os.environ["PATH"]}  # not below the make that may run this test
    done = subprocess.run(command, cwd=ROOT, env=alone, text=True, capture_output=True, check=True)
    [line] = done.stdout.splitlines()
    assert (
        line.split()
        == (
            "some-python -m benchmarks.gpu_report --stages suite wkv7 --limit 480 --output there"
        ).split()
    )
    names = [stage.name for stage in gpu_report.choose(["suite", "wkv7"])]
    assert names == ["machine", "suite", "wkv7"]
    with pytest.raises(UserError, match="--stages speed: there are machine, "):
        gpu_report.choose(["speed"])


def test_packages_that_are_missing_come_from_wheels(tmp_path, monkeypatch, capsys):
    wheels = tmp_path / "wheels" / "more"
    wheels.mkdir(parents=True)
    info = "some_thing-1.5.dist-info"
    with zipfile.ZipFile(wheels / "some_thing-1.5-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_thing.py", "answer = 42\n")
        head = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-thing\nVersion: 1.5\n"
        )
        wheel.writestr(f"{info}/WHEEL", head)
        wheel.writestr(f"{info}/RECORD", "")
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    needed = [Requirement(name) for name in ("broken", "Some.Thing>=1", "missing>=2")]
    monkeypatch.setattr(gpu_report, "unsatisfied", lambda: needed)
    gpu_report.install(tmp_path / "wheels", tmp_path / "site")
    assert (tmp_path / "site" / "some_thing.py").read_text() == "answer = 42\n"
    said = capsys.readouterr().out
    assert "took some_thing-1.5" in said and "missing>=2 is not satisfied" in said
    assert "broken is not satisfied: " in said


def test_the_newest_fitting_wheel_is_taken(tmp_path, monkeypatch):
    for version in ("1.2", "1.9", "1.10", "1.3", "2.0"):
        (tmp_path / f"thing-{version}-py3-none-any.whl").touch()
    monkeypatch.setattr(gpu_report, "unsatisfied", lambda: [Requirement("thing>=1,<2")])
    taken = []
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: taken.append(command[-1]) or done)
    gpu_report.install(tmp_path, tmp_path / "site")
    assert taken == [str(tmp_path / "thing-1.10-py3-none-any.whl")]


def test_what_stages_take_from_the_environment(tmp_path, monkeypatch):
    """Flags of XLA may say where CUDA is; a share of memory or a cache would change results."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_cuda_data_dir=/cuda")
    for name in ("XLA_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR", "PYTEST_ADDOPTS"):
        monkeypatch.setenv(name, "1")
    variables = gpu_report.environment(tmp_path, rehearse=False)
    assert not {"XLA_CLIENT_MEM_FRACTION", "JAX_COMPILATION_CACHE_DIR", "PYTEST_ADDOPTS"} & set(
        variables
    )
    # What was tuned beside the suite reaches no other program.
    assert variables["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] == "none"
    kit = gpu_report.Kit(tmp_path, tmp_path, variables, False)
    flags = {stage.name: kit.xla_flags(stage) for stage in gpu_report.STAGES}
    given = "--xla_gpu_cuda_data_dir=/cuda"
    assert flags.pop("suite") == f"{given} --xla_gpu_autotune_level=0"
    assert set(flags.values()) == {given}
    words = " ".join(gpu_report.suite(kit))
    assert "-W default" in words  # an image's warnings are not errors


def test_what_is_too_old_is_unsatisfied(monkeypatch):
    versions = {"jax": "0.9.0", "numpy": None}
    monkeypatch.setattr(machine, "installed", lambda name: versions.get(name, "999"))
    found = {requirement.name for requirement in gpu_report.unsatisfied()}
    assert {"jax", "numpy"} <= found and "scipy" not in found


SUITE_STOPPED = """\
created: 10/10 workers
10 workers [174 items]

[gw0] [  1%] PASSED tests/kernels/test_wkv7.py::TestXla::test_one
[gw1] [  1%] FAILED tests/kernels/test_wkv7.py::TestXla::test_two[a-b]
[gw1] [  2%] SKIPPED tests/kernels/test_wkv7.py::test_three
FAILED tests/kernels/test_wkv7.py::TestXla::test_two[a-b] - CUDA_ERROR_ILLEGAL_ADDRESS
!!!!!!!!!!!!!!! KeyboardInterrupt !!!!!!!!!!!!!!!
=========== 1 failed, 1 passed, 1 skipped in 2.00s ===========
"""


def test_tests_are_counted_where_the_suite_was_stopped():
    assert gpu_report.count_tests(SUITE_STOPPED) == {
        "all": 174,
        "passed": 1,
        "failed": 1,
        "failures": ["tests/kernels/test_wkv7.py::TestXla::test_two[a-b]"],
        "cuda_errors": 1,
        "closing_line": "1 failed, 1 passed, 1 skipped in 2.00s",
    }
    assert gpu_report.count_tests("")["all"] == 0


def test_clocks_are_those_of_a_busy_gpu(nvidia_smi, tmp_path):
    nvidia_smi("345, 0, 70.5, 30\n1980, 100, 650.0, 60\n1755, 97, 690.2, 65\n1900, [N/A], 1, 1\n1")
    summary: dict[str, Any] = {}
    with gpu_report.watching_clocks(tmp_path, summary):
        while "[N/A]" not in (tmp_path / "clocks.csv").read_text():
            time.sleep(0.02)
    assert summary["clocks"] == {
        "busy_seconds": 2,
        "sm_mhz": [1755, 1867.5, 1980],
        "most_watts": 690.2,
        "most_celsius": 65,
    }


def test_a_machine_with_a_gpu_is_described(nvidia_smi):
    nvidia_smi("NVIDIA H100 80GB HBM3, 580.159.04, 81559, 4, 9.0")
    assert machine.record("x")["machine"]["gpu"] == {
        "name": "NVIDIA H100 80GB HBM3",
        "count": 1,
        "driver": "580.159.04",
        "memory_mib": 81559,
    }
    assert machine.card("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"


# ------------------------------------------------------------------------------- training steps


def test_mfu_is_that_of_the_models_arithmetic():
    """191 M parameters, of which the embedding's 50 M are looked up: 6 FLOPs a token and entry."""
    config = TrainConfig(size="0.1b", ctx_len=4096, micro_bsz=8, precision="bf16")
    model = config.model_config()
    found = train_step_gpu.speed(config, model, "NVIDIA H100 80GB HBM3", 0.0655)
    assert found["ms"] == 65.5 and found["tokens_per_s"] == pytest.approx(500_275, rel=1e-5)
    flops = 6 * (191e6 - 65536 * 768) + 24 * 12 * 768 * 64
    assert found["mfu"] == pytest.approx(500_275 * flops / 989e12, rel=0.01)
    assert train_step_gpu.speed(config, model, "cpu", 1.0)["mfu"] is None


def fake(run: list[str], *_: Any) -> dict[str, Any]:
    if run[run.index("--micro_bsz") + 1] == "16":
        return {"error": "RESOURCE_EXHAUSTED: Out of memory"}
    return {"ms": 2.0, "tokens_per_s": 16.0, "device_kind": "cpu"}


def test_a_configuration_that_does_not_fit_is_a_row(monkeypatch, tmp_path, capsys):
    path = tmp_path / "t.json"
    monkeypatch.setattr(train_step_gpu, "in_its_own_process", fake)
    runs = ["--runs", "8/1", "16/1", "8/0", "--load_model", "x.pth", "--output", str(path)]
    monkeypatch.setattr("sys.argv", ["x", *TINY, *runs])
    train_step_gpu.main()
    rows = json.loads(path.read_text())["rows"]
    assert ["error" in row for row in rows] == [False, True, False]
    assert [(row["micro_bsz"], row["grad_cp"]) for row in rows] == [(8, 1), (16, 1), (8, 0)]
    assert "micro_bsz 16 grad_cp 1: RESOURCE_EXHAUSTED" in capsys.readouterr().out

    monkeypatch.setattr("sys.argv", ["x", *TINY, "--runs", "16/1", "--load_model", "x.pth"])
    with pytest.raises(UserError, match="none of --runs"):
        train_step_gpu.main()


def test_the_command_is_timed_after_the_first_run(monkeypatch):
    """A stage that overruns loses the last runs, not the command."""
    order = []
    monkeypatch.setattr(train_step_gpu, "in_its_own_process", lambda *_: order.append("run") or {})
    command = {"command": "train", "error": "none", "micro_bsz": 1, "grad_cp": 1}
    monkeypatch.setattr(
        train_step_gpu, "run_the_command", lambda *_: order.append("command") or command
    )
    monkeypatch.setattr(train_step_gpu, "outcome", str)
    runs = ["--runs", "8/1", "8/0", "--command", "--load_model", "x.pth"]
    monkeypatch.setattr("sys.argv", ["x", *TINY, *runs])
    train_step_gpu.main()
    assert order == ["run", "command", "run"]


def test_deterministic_reaches_the_timed_step(monkeypatch):
    asked, sent = [], []
    monkeypatch.setattr(train_step_gpu, "prepare_jax", asked.append)
    monkeypatch.setattr(train_step_gpu, "measure", lambda *_: {})
    pipe = types.SimpleNamespace(send=sent.append)
    for arguments in ([*TINY, "--deterministic"], TINY):
        train_step_gpu.in_this_process(pipe, arguments, 1, False)
    assert asked == [True, False] and all("error" not in row for row in sent)


def test_refuses_a_step_of_several_batches():
    with pytest.raises(UserError, match="--accumulate_grad_batches"):
        train_step_gpu.prepare([*TINY, "--accumulate_grad_batches", "2"])


def die(*_: Any) -> None:
    os._exit(7)


def test_a_process_that_dies_is_a_row(monkeypatch):
    monkeypatch.setattr(train_step_gpu, "in_this_process", die)
    assert train_step_gpu.in_its_own_process([], 1, False) == {
        "error": "the process ended with status 7"
    }


def test_a_command_that_ends_early_is_a_row(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    row = train_step_gpu.run_the_command([*TINY, "--micro_bsz", "1"], 3, tmp_path / "run")
    assert row["error"] == "it printed nothing" and row["micro_bsz"] == 1


def test_refuses_a_step_that_is_several_programs():
    strategy = ["--strategy", "deepspeed_stage_2_offload", "--my_exit_tokens", "1e9"]
    with pytest.raises(UserError, match="--strategy deepspeed_stage_2_offload"):
        train_step_gpu.prepare([*TINY, *strategy, "--micro_bsz", "1", "--grad_cp", "0"])


@pytest.mark.parametrize("run", ["8", "8/x", "/1"])
def test_refuses_runs_that_are_none(run):
    with pytest.raises(UserError, match="micro_bsz/grad_cp"):
        train_step_gpu.options_for([], run)


# -------------------------------------------------------------------------------------- profiles

HLO = """\
ENTRY %main {
  %loop_fusion.3 = f32[8]{0} fusion(%x), metadata={op_name="jit(step)/optimizer/mul"}
  %cublas.1 = f32[8,8]{1,0} custom-call(%x), metadata={op_name="jit(step)/jvp()/dot_general"}
  %cublas.2 = f32[8,8]{1,0} custom-call(%x), metadata={op_name="jit(step)/jvp(head_loss)/dot"}
  ROOT %add_fusion = f32[8]{0} fusion(%x), metadata={op_name="jit(step)/jvp()/add" id=3}
}
"""
# Name, instruction, start and length in microseconds, of each stream. The second overlaps.
STREAMS = {
    "Stream #13(Compute)": [
        ("nvjet_tst_128x256", "cublas.1", 0, 10),
        ("nvjet_tst_128x256", "cublas.2", 10, 20),
        ("loop_fusion_3", "", 30, 5),  # in a CUDA graph: without its instruction
        ("wkv7_forward", "custom-call.9", 40, 40),
        ("add_fusion", "add_fusion", 80, 15),
    ],
    "Stream #14(MemcpyD2D)": [("MemcpyD2D", "", 90, 10)],
    "XLA Ops": [("wkv7_forward", "", 0, 1000)],  # made from the streams
}


def trace_of(streams: dict[str, list[tuple[str, str, int, int]]]) -> ProfileData:
    names = sorted({event[0] for events in streams.values() for event in events})
    text = ""
    for number, name in enumerate(names, 1):
        text += f'event_metadata {{ key: {number} value {{ id: {number} name: "{name}" }} }}\n'
    text += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }\n'
    for line, events in streams.items():
        text += f'lines {{ name: "{line}"\n'
        for name, hlo_op, start, length in events:
            stat = f'stats {{ metadata_id: 1 str_value: "{hlo_op}" }}' if hlo_op else ""
            text += f"events {{ metadata_id: {names.index(name) + 1} offset_ps: {start}000000 "
            text += f"duration_ps: {length}000000 {stat} }}\n"
        text += "}\n"
    space = ProfileData.text_proto_to_serialized_xspace(
        f'planes {{ name: "/device:GPU:0"\n{text}}}\nplanes {{ name: "/host:CPU" }}'
    )
    return ProfileData.from_serialized_xspace(space)


# Of jaxlib's types.
@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_the_part_of_a_gpus_kernel_is_what_it_computes():
    found = profile_gpu.summarise(trace_of(STREAMS), profile_gpu.scopes(HLO), 5, on_gpu=True)
    assert {name: pytest.approx(1e3 * 5 * ms) for name, ms in found["parts"].items()} == {
        "wkv7": 40,
        "loss_and_head": 20,
        "optimizer": 5,
        "collectives": 0,
        "matrix_products": 10,
        "copies": 10,
        "elementwise": 15,
    }
    assert found["busy_share"] == pytest.approx(0.95)  # of 100 µs, 35 to 40 are idle
    assert found["scoped_share"] == pytest.approx(0.5)  # not of wkv7_forward and the copy
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    longest = found["kernels"][0]
    assert longest["name"] == "wkv7_forward" and longest["calls"] == 1 / 5
    assert [row["part"] for row in found["kernels"] if row["name"].startswith("nvjet")] == [
        "loss_and_head",
        "matrix_products",
    ]


@pytest.mark.parametrize(
    ("name", "scope", "part"),
    [
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "", "collectives"),
        ("sm90_xmma_gemm_bf16", "", "matrix_products"),
        ("gemm_fusion_dot_12", "jit(step)/jvp()/dot_general", "matrix_products"),
        ("triton_softmax_4", "jit(step)/jvp(head_loss)/reduce_max", "loss_and_head"),
        ("input_reduce_fusion_2", "jit(step)/jvp()/reduce_sum", "elementwise"),
        ("loop_fusion_2", "jit(step)/jvp()/while/body/dot_general", "matrix_products"),
        ("loop_fusion_2", "jit(step)/transpose(jvp())/while/body/wkv7/mul", "wkv7"),
        ("wrapped_copy_1", "", "copies"),
        ("Memset", "", "copies"),
    ],
)
def test_the_part_of_a_kernel(name, scope, part):
    assert profile_gpu.part_of(name, scope) == part


def test_a_loop_has_not_the_time_of_what_is_in_it():
    def event(name: str, start: float, end: float) -> profile_gpu.Event:
        return profile_gpu.Event(name, "", start, end)

    line = [event("while", 0, 100), event("a", 10, 40), event("b", 20, 30), event("c", 50, 60)]
    own = {each.name: time for each, time in profile_gpu.own_times([*line, event("d", 100, 105)])}
    assert own == {"while": 60, "a": 20, "b": 10, "c": 10, "d": 5}


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_no_trace_is_said_in_a_line(tmp_path):
    with pytest.raises(UserError, match="left no trace"):
        profile_gpu.read(tmp_path)
    with pytest.raises(UserError, match="no device ran anything"):
        profile_gpu.summarise(trace_of({"XLA Ops": [("a", "", 0, 1)]}), {}, 5, on_gpu=True)
