"""Tests and times everything on a GPU, and keeps the results even if a stage fails.

    make gpu-report [OUT=out/gpu] [ARGS=--rehearse]
    python -m benchmarks.gpu_report [--output out/gpu] [--stages suite wkv7] [--wheels DIR]

Runs the stages of `STAGES` one after the other, each under a limit of its own and all under
--limit, and needs no network. What a stage prints is appended to log.txt; records are
NAME_<card>.json, written row by row, and gpu.md shows them; summary.json and the summary on the
screen are there at every end: when a stage fails or overruns, and when the whole is interrupted.
Exits with 0 if all stages passed. At most eight files are left in --output.

Packages that pyproject.toml asks for, and that are missing or too old, are taken from wheels in
--wheels (default .whl), into a scratch folder.

--rehearse runs it all in tiny sizes on a CPU.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from benchmarks import command, machine
from rwkv_jax.errors import UserError, run_command, signals_raise
from rwkv_jax.files import reporting_os_errors

ROOT = Path(__file__).parents[1]
LIMIT = 540  # seconds, of the whole
GONE = 5.0  # for what is ended by force to be gone; where nothing reaps orphans, it never is
GRACE = 15.0  # from an interrupt to the end by force; xdist gives its workers ten seconds
LEAST = 3.0  # with less, a stage is not begun
LOG_END = 4 * 2**20  # bytes that are kept of each end of the log
RECORDS = ("wkv7", "train_step", "profile", "rivals")
LOG, SUMMARY, TRACE, PAGE = "log.txt", "summary.json", "trace.xplane.pb.gz", "gpu.md"

# Without recomputation micro_bsz 16 is planned at 81 GiB: more than an H100 has.
RUNS = ["8/1", "16/1", "8/0", "16/2"]
RUNS_WITH_100_GB = ["8/1", "16/1", "8/0", "16/0"]
SUITE = ["tests/kernels/test_wkv7_pallas.py", "tests/kernels/test_wkv7.py"]


@dataclasses.dataclass
class Kit:
    """What stages are made from."""

    output: Path
    scratch: Path
    environment: dict[str, str]
    rehearse: bool
    rivals: Path | None = None
    described: dict[str, Any] = dataclasses.field(default_factory=dict)  # by the stage `machine`

    def xla_flags(self, stage: "Stage") -> str:
        """Those of the environment, which may say where CUDA is, and the stage's."""
        return f"{self.environment.get('XLA_FLAGS', '')} {stage.xla_flags}".strip()

    def record(self, name: str) -> str:
        card = machine.card(self.described.get("device_kind", "unknown"))
        return str(self.output / f"{name}_{card}.json")

    @property
    def model(self) -> list[str]:
        if self.rehearse:
            return ["--n_layer", "1", "--n_embd", "64", "--ctx_len", "32"]
        return ["--size", "0.1b", "--ctx_len", "4096"]

    @property
    def runs(self) -> list[str]:
        if self.rehearse:
            return ["1/1"]
        memory = self.described.get("gpu", {}).get("memory_mib", 0)
        return RUNS_WITH_100_GB if memory > 100_000 else RUNS

    @property
    def weights(self) -> list[str]:
        path = self.scratch / "init" / "rwkv-init.pth"
        return ["--load_model", str(path)] if path.exists() else []


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def check_machine(kit: Kit) -> list[str]:
    return module("benchmarks.machine", "--output", str(kit.scratch / "machine.json"))


def make_weights(kit: Kit) -> list[str]:
    folder = str(kit.scratch / "init")
    return module("rwkv_jax.train", *kit.model, "--train_stage", "1", "--proj_dir", folder)


def doctor(kit: Kit) -> list[str]:
    return module("rwkv_jax.doctor")


def compile_steps(kit: Kit) -> list[str]:
    # The first of several is compiled when it is timed: what XLA then tries out, to choose the
    # fastest products, has the GPU for itself.
    options = ["--runs", *(kit.runs[1:] or kit.runs), "--compile_only"]
    return module("benchmarks.train_step_gpu", *kit.model, *options)


def suite(kit: Kit) -> list[str]:
    # Of an environment that is not ours, plugins stay out, and warnings are not errors. The test
    # that needs torch is of the recurrence on a CPU.
    options = ["-p", "xdist", "-p", "no:cacheprovider", "-v", "--tb=short", "-m", "not torch"]
    options += ["-W", "default"]
    workers = min(10, max(4, len(os.sched_getaffinity(0)) - 4))
    if kit.rehearse:
        workers = 1
        options += ["-k", "dtypes_of or inverse"]
    return module("pytest", "-n", str(workers), *options, *SUITE)


def wkv7(kit: Kit) -> list[str]:
    tiny = ["--shapes", "1,32,1,16"] if kit.rehearse else []
    return module("benchmarks.wkv7_gpu", "--output", kit.record("wkv7"), *tiny)


def train_step(kit: Kit) -> list[str]:
    options = ["--runs", *kit.runs, "--command", "--output", kit.record("train_step")]
    options += ["--steps", "3"] if kit.rehearse else []
    return module("benchmarks.train_step_gpu", *kit.model, *kit.weights, *options)


def profile(kit: Kit) -> list[str]:
    micro_bsz, _, grad_cp = kit.runs[0].partition("/")
    options = ["--micro_bsz", micro_bsz, "--grad_cp", grad_cp, "--output", kit.record("profile")]
    options += ["--trace", str(kit.output / TRACE)]
    return module("benchmarks.profile_gpu", *kit.model, *kit.weights, *options)


def rivals(kit: Kit) -> list[str]:
    options = ["--official", str(kit.rivals)] if kit.rivals else []
    if kit.rehearse:
        options += "--shapes 1,32,1,16 --size tiny --ctx_len 32 --micro_bsz 1".split()
    return module("benchmarks.rivals_gpu", "--output", kit.record("rivals"), *options)


def page(kit: Kit) -> list[str]:
    folder = str(kit.output)
    return module("benchmarks.gpu_page", "--results", folder, "--output", f"{folder}/{PAGE}")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process, in a group of its own.

    Attributes:
        limit: seconds, at the most, unless there is more time than all stages may take.
        needs: seconds that stages before it have to leave; `GRACE` of them may go to its end.
        beside: runs on cores that the next stage spares, and is waited for after that.
        tail: lines of its output that the screen gets.
    """

    name: str
    command: Callable[[Kit], list[str]]
    limit: float
    needs: float = 0.0
    beside: bool = False
    tail: int = 1
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    xla_flags: str = ""


# Two programs on one GPU: neither may take its memory whole.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
# For programs that run once: XLA need not search for the fastest of their products.
ONCE = "--xla_gpu_autotune_level=0"

STAGES = [
    Stage("machine", check_machine, 150),
    Stage("weights", make_weights, 100, beside=True, environment={"JAX_PLATFORMS": "cpu"}),
    Stage("doctor", doctor, 120),
    Stage("compile", compile_steps, 180, beside=True, environment=SHARED),
    Stage("suite", suite, 150, tail=8, environment=SHARED | NO_PLUGINS, xla_flags=ONCE),
    Stage("wkv7", wkv7, 110, needs=60, tail=23),
    Stage("train_step", train_step, 150, needs=100, tail=6),
    Stage("profile", profile, 60, needs=55, tail=39),
    Stage("rivals", rivals, 300, tail=30),
    Stage("page", page, 20, needs=20),
]


@contextlib.contextmanager
def signals_waiting() -> Iterator[None]:
    """Inside, a signal that ends this process waits: no stage is begun, or left, without notice."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


class Running:
    """A stage's process, begun; what it prints goes to the end of `log`."""

    def __init__(self, stage: Stage, kit: Kit, limit: float, log: Path):
        self.stage, self.limit, self.log = stage, limit, log
        self.began, self.seconds = time.monotonic(), 0.0
        self.status: int | None = None
        self.overran = False
        with log.open("ab") as file:
            self._from = file.tell()
            self._process = subprocess.Popen(
                stage.command(kit),
                cwd=ROOT,
                env=kit.environment | stage.environment | {"XLA_FLAGS": kit.xla_flags(stage)},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,  # no session of its own, which would outlive this program's
            )

    def finish(self) -> None:
        """Waits until it has ended, by itself or by its limit."""
        left = self.began + self.limit - time.monotonic()
        try:
            self._process.wait(max(0.0, left))
        except subprocess.TimeoutExpired:
            self.overran = True
        self.close()

    def close(self) -> None:
        """Ends it, and all that it started: by an interrupt, then by force."""
        if self.status is not None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGINT)
                self._process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.status = self._process.wait()
        # Until its children are gone, too: they may hold memory of the GPU.
        end = time.monotonic() + GONE
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < end:
                os.killpg(self._process.pid, 0)
                time.sleep(0.02)
        self.seconds = time.monotonic() - self.began

    def text(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._from)
            return file.read().decode("utf-8", "replace")


class Report:
    """Runs stages and writes the outcome of each to summary.json."""

    def __init__(self, kit: Kit, stages: list[Stage], limit: float):
        self.kit, self.stages = kit, stages
        self.began = time.monotonic()
        self.end = self.began + limit
        self.log = kit.output / LOG
        self.summary = machine.record("gpu_report") | {"rehearsal": kit.rehearse}
        self.rows: dict[str, dict[str, Any]] = {
            stage.name: {"stage": stage.name, "status": "not begun"} for stage in self.stages
        }
        self.write()

    def say(self, words: str) -> None:
        now = time.monotonic()
        print(f"[{now - self.began:4.0f} s, {self.end - now:4.0f} s left] {words}", flush=True)

    def write(self) -> None:
        rows = list(self.rows.values())
        machine.write(self.kit.output / SUMMARY, self.summary | {"stages": rows})

    def run(self) -> bool:
        """Whether all stages passed. Whatever ends this, none of their processes is left.

        Raises:
            UserError: the first stage, the machine's, did not pass: the others are not begun.
        """
        under_way: list[Running] = []
        try:
            for index, stage in enumerate(self.stages):
                left = self.end - GRACE - time.monotonic()
                kept = sum(later.needs for later in self.stages[index + 1 :])
                # If more time is left than the stages may take, each gets its share of it.
                wanted = sum(x.limit for x in self.stages[index:] if x is stage or not x.beside)
                limit = min(max(1.0, left / wanted) * stage.limit, left - kept)
                if limit < LEAST:
                    self.say(f"{stage.name}: no time is left for it")
                    continue
                self.say(f"{stage.name}: {limit:.0f} s at most")
                if not stage.beside:
                    with self.log.open("a", encoding="utf-8") as log:
                        log.write(f"\n===== {stage.name}\n")
                path = self.kit.scratch / f"{stage.name}.txt" if stage.beside else self.log
                with signals_waiting():
                    under_way.insert(0, Running(stage, self.kit, limit, path))
                while under_way and not stage.beside:
                    under_way[0].finish()
                    self.note(under_way.pop(0))
                if stage.name == "machine":
                    self.check_machine()
        except BaseException:
            with signals_waiting():
                for running in under_way:
                    running.close()
                    self.note(running, "interrupted")
            raise
        return all(row["status"] == "passed" for row in self.rows.values())

    def check_machine(self) -> None:
        row = self.rows["machine"]
        if row["status"] != "passed":
            reason = row["last_line"].removeprefix("error: ")
            raise UserError(f"{self.log}: the machine's check is {row['status']}: {reason}")
        self.kit.described = json.loads((self.kit.scratch / "machine.json").read_text("utf-8"))
        self.summary["device_kind"] = self.kit.described["device_kind"]
        self.write()
        if self.kit.described["platform"] != "gpu" and not self.kit.rehearse:
            raise UserError(
                "there is no GPU here; --rehearse runs everything in tiny sizes on a CPU"
            )

    def note(self, running: Running, status: str = "") -> None:
        """What became of a stage that has ended."""
        name, row = running.stage.name, self.rows[running.stage.name]
        if running.overran:
            status = "stopped by its limit"
        elif not status:
            status = f"failed with status {running.status}" if running.status else "passed"
        text = running.text()
        lines = text.strip().splitlines() or [""]
        row |= {
            "status": status,
            "seconds": round(running.seconds, 1),
            "limit": round(running.limit, 1),
            "last_line": lines[-1][:300],
        }
        if running.stage.beside:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(f"\n===== {name}\n{text}")
        if name == "suite":
            self.summary["suite"] = count_tests(text)
        self.write()
        self.say(f"{name}: {status} after {running.seconds:.0f} s")
        tail = lines[-running.stage.tail :]
        print(*(f"    {line[:150]}" for line in tail), sep="\n", flush=True)

    def close(self) -> None:
        """Prints the summary and writes it, and cuts the middle out of a very long log."""
        self.write()
        if self.log.exists() and self.log.stat().st_size > 2 * LOG_END:
            text = self.log.read_bytes()
            self.log.write_bytes(text[:LOG_END] + b"\n[...]\n" + text[-LOG_END:])
        print(f"\n{self.summary.get('device_kind', 'no device')}, {self.summary['date']}")
        for row in self.rows.values():
            print(f"  {row['stage']:>10}  {row['status']}")
        if tests := self.summary.get("suite"):
            print(f"  {tests['passed']} tests passed, {tests['failed']} failed, of {tests['all']}")
            if tests["cuda_errors"]:
                print(f"  {tests['cuda_errors']} lines speak of CUDA errors")
            for name in tests["failures"]:
                print(f"    {name}")
        if clocks := self.summary.get("clocks"):
            print("  while busy: {} / {} / {} MHz".format(*clocks["sm_mhz"]))
        files = sorted(path.name for path in self.kit.output.iterdir())
        print(f"in {self.kit.output}: {', '.join(files)}", flush=True)


@contextlib.contextmanager
def watching_clocks(scratch: Path, summary: dict[str, Any]) -> Iterator[None]:
    """Asks nvidia-smi each second; at the end, what the first GPU did goes into `summary`."""
    query = "clocks.sm,utilization.gpu,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    path = scratch / "clocks.csv"
    with path.open("w") as file, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # there is no such program
            watcher = subprocess.Popen(
                [*command, "--id=0", "--loop=1"],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(watcher.wait)
            stack.callback(watcher.kill)
        try:
            yield
        finally:
            summary["clocks"] = read_clocks(path.read_text("utf-8", "replace"))


def read_clocks(text: str) -> dict[str, Any]:
    """Of lines of MHz, utilization in per cent, W, °C: what they were while the GPU was busy."""
    samples = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # "[N/A]", or half a line
            mhz, utilization, power, temperature = map(float, line.split(","))
            if utilization >= 50:
                samples.append((mhz, power, temperature))
    if not samples:
        return {}
    clocks, powers, temperatures = zip(*samples, strict=True)
    return {
        "busy_seconds": len(samples),
        "sm_mhz": [min(clocks), statistics.median(clocks), max(clocks)],
        "most_watts": max(powers),
        "most_celsius": max(temperatures),
    }


def count_tests(text: str) -> dict[str, Any]:
    """What `pytest -v`, with workers, has printed of tests, also when it was stopped."""
    found = re.findall(r"^\[gw\d+\] .*?(PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+)", text, re.M)
    of = {outcome: [name for o, name in found if o == outcome] for outcome, _ in found}
    failures = sorted({*of.get("FAILED", []), *of.get("ERROR", [])})
    items = re.findall(r"\[(\d+) items?\]", text)
    return {
        "all": int(items[-1]) if items else 0,
        "passed": len(of.get("PASSED", [])),
        "failed": len(failures),
        "failures": failures,
        # After an illegal access all else fails in that process: read its first failure.
        "cuda_errors": len(re.findall(r"CUDA_ERROR|illegal memory", text)),
        "closing_line": (re.findall(r"^=+ (.*) =+$", text, re.M) or [""])[-1],
    }


def unsatisfied() -> Iterator[Requirement]:
    """What pyproject.toml asks for and is not here, or too old."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    for requirement in map(Requirement, wanted):
        have = machine.installed(requirement.name)
        if have is None or not requirement.specifier.contains(have, prereleases=True):
            yield requirement


def install(wheels: Path, target: Path) -> None:
    """Puts what is unsatisfied into a folder, from the wheels of another; says what it cannot."""
    for requirement in unsatisfied():
        name = re.sub(r"[-_.]+", "_", requirement.name).lower()
        found = {wheel_version(x): x for x in wheels.rglob("*.whl") if wheel_name(x) == name}
        fitting = [x for x in found if requirement.specifier.contains(x, prereleases=True)]
        if not fitting:
            print(f"note: {requirement} is not satisfied, and {wheels} has no such wheel")
            continue
        wheel = found[max(fitting)]
        options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
        command = module("pip", "install", "--quiet", *options, "--target", str(target))
        done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip fails"])[-1]
            print(f"note: {requirement} is not satisfied: {wheel}: {reason}")
        else:
            print(f"took {wheel.name}")


def wheel_name(path: Path) -> str:
    return re.sub(r"[-_.]+", "_", path.name.split("-")[0]).lower()


def wheel_version(path: Path) -> Version:
    with contextlib.suppress(InvalidVersion, IndexError):
        return Version(path.name.split("-")[1])
    return Version("0")


def environment(scratch: Path, rehearse: bool) -> dict[str, str]:
    """For all stages alike: what one compiles, the next finds on disk."""
    unwanted = (
        "JAX_COMPILATION_CACHE_DIR",
        "PYTEST_ADDOPTS",
        "XLA_CLIENT_MEM_FRACTION",
        "XLA_PYTHON_CLIENT_MEM_FRACTION",
    )
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    path = [str(ROOT), str(scratch / "site"), *filter(None, [kept.get("PYTHONPATH")])]
    return (
        kept
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "XDG_CACHE_HOME": str(scratch / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
            # Choices among kernels that were timed beside the suite stay with their own program.
            "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
            # Call stacks are part of a Pallas kernel's program, and so of its key on disk.
            "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
        }
        | ({"JAX_PLATFORMS": "cpu"} if rehearse else {})
    )


def choose(names: list[str]) -> list[Stage]:
    """The stages of these names, and the first, in order."""
    known = [stage.name for stage in STAGES]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--stages {unknown[0]}: there are {', '.join(known)}")
    return [stage for stage in STAGES if stage.name in ("machine", *names)]


def main() -> None:
    parser = command.parser(__doc__)
    defaults = [stage.name for stage in STAGES if stage.name != "rivals"]
    parser.add_argument(
        "--output", type=Path, default=Path("out/gpu"), metavar="DIR", help="default out/gpu"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        metavar="STAGE",
        help=f"some of {', '.join(defaults)} (default all of these), rivals",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=LIMIT,
        metavar="SECONDS",
        help=f"of all stages (default {LIMIT})",
    )
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / ".whl", metavar="DIR", help="default .whl"
    )
    parser.add_argument(
        "--rivals", type=Path, metavar="DIR", help="time others as well; DIR: a checkout of RWKV-LM"
    )
    parser.add_argument("--rehearse", action="store_true", help="in tiny sizes on a CPU")
    options = parser.parse_args()
    names = options.stages or defaults
    stages = choose([*names, *(["rivals"] if options.rivals else [])])
    output = options.output.absolute()
    with reporting_os_errors(output, "write"):
        output.mkdir(parents=True, exist_ok=True)
        records = [path for name in RECORDS for path in output.glob(f"{name}_*.json")]
        for path in (output / LOG, output / SUMMARY, output / TRACE, output / PAGE, *records):
            path.unlink(missing_ok=True)  # of a report before: it would pass for this one's

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, signals_raise():
        scratch = Path(folder)
        install(options.wheels, scratch / "site")
        sys.path.insert(0, str(scratch / "site"))  # what the record names is what stages take
        rivals = options.rivals and options.rivals.absolute()
        kit = Kit(output, scratch, environment(scratch, options.rehearse), options.rehearse, rivals)
        report = Report(kit, stages, options.limit)
        try:
            with watching_clocks(scratch, report.summary):
                passed = report.run()
        finally:
            report.close()
    if not passed:
        raise UserError("not all stages passed")


if __name__ == "__main__":
    run_command(main)
