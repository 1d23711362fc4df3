"""`python -m rwkv_jax.doctor`: what this machine would train on, and what is wrong with it.

Facts are gathered first; then rules over the facts say what is wrong, in plain words and with the
way out. jax's facts, and the losses of a small model that is trained for a few steps, come from one
process of their own, so that a driver that crashes or a GPU that is full is something to report.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __spec__ is None:  # run as a script: imports come from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).parents[1])

from rwkv_jax.binidx import BinIdxWriter
from rwkv_jax.errors import CommandParser, UserError, run_command
from rwkv_jax.nvidia import Gpu, ask_nvidia_smi, has_driver

if TYPE_CHECKING:
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.model import Params

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes")
PLUGINS = tuple(
    f"jax-{kind}-{part}" for kind in ("cuda12", "cuda13") for part in ("plugin", "pjrt")
)
CUDNN = ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # of CUDA's libraries, what jax checks first
VARIABLES = ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "XLA_FLAGS")

# The oldest driver that a CUDA version runs on, and the oldest GPU that jax's build for it takes.
OLDEST_DRIVER = {"cuda12": 525, "cuda13": 580}
OLDEST_GPU = {"cuda12": (5, 2), "cuda13": (7, 5)}

# Options of the self-test, and the losses of its steps: computed in float64 by the independent
# implementation in tests/torch_rwkv7.py (tests/test_doctor.py computes them again).
SELF_TEST: dict[str, Any] = {
    "n_layer": 1, "n_embd": 64, "vocab_size": 512, "ctx_len": 32, "micro_bsz": 4, "devices": 1,
    "my_exit_tokens": 768, "warmup_steps": 0, "lr_init": 1e-3, "lr_final": 1e-3,
}  # fmt: skip
KNOWN_LOSSES = (6.342448, 6.051721, 5.352484, 4.812257, 4.352367, 4.044164)
TOLERANCE = {"fp32": 5e-4, "bf16": 5e-2, "fp16": 5e-2}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What there is. Rules read nothing else."""

    versions: Mapping[str, str]  # of the packages that are installed
    variables: Mapping[str, str]  # of the environment, those that are set
    gpus: tuple[Gpu, ...] = ()  # by nvidia-smi
    driver_says: str | None = (
        None  # nvidia-smi's words when it fails; None: there is no such program
    )
    platform: str = ""  # jax's: cpu, gpu, tpu; empty when jax does not start
    kinds: tuple[str, ...] = ()  # a name for each of jax's devices
    kernels: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    precisions: tuple[str, ...] = ()  # what is tried: float32, and what a run would take by itself
    jax_says: str = ""  # its last complaint

    @property
    def plugins(self) -> list[str]:
        """Of cuda12 and cuda13, those that are installed."""
        return [kind for kind in OLDEST_DRIVER if f"jax-{kind}-plugin" in self.versions]


PATIENCE = 300.0  # seconds: a GPU's first compilations, on a slow machine


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of starting jax and training on it, in a process of its own."""

    facts: Mapping[str, Any]  # `jax_facts`; empty when jax does not start
    losses: Mapping[str, Sequence[float]]  # by precision, of those trainings that came to an end
    start_says: str  # the last line of what jax complains of as it starts
    says: str  # the last line of all


def run_trial() -> Trial:
    """Runs `TRIAL`, whatever happens to it."""
    # Unbuffered: what was printed before a crash or a hang arrives, in the order it was printed.
    command = [sys.executable, "-u", "-c", TRIAL]
    try:
        said = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE
        ).stdout
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"") + f"\nnot done after {PATIENCE:.0f} seconds".encode()
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    results = [n for n, line in enumerate(lines) if line.startswith("{")]
    facts, *trained = [json.loads(lines[n]) for n in results] or [{}]
    start = lines[: results[0]] if results else lines
    return Trial(
        facts,
        {name: losses for done in trained for name, losses in done.items()},
        start[-1].strip() if start else "",
        lines[-1].strip() if lines else "",
    )


def gather_facts(trial: Trial) -> Facts:
    """The facts of this machine."""
    versions = {}
    for name in (*PACKAGES, *PLUGINS, *CUDNN):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    gpus, driver_says = ask_nvidia_smi()
    return Facts(
        versions=versions,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
        gpus=gpus,
        driver_says=driver_says,
        platform=trial.facts.get("platform", ""),
        kinds=tuple(trial.facts.get("kinds", ())),
        kernels=trial.facts.get("kernels", {}),
        precisions=tuple(trial.facts.get("precisions", ())),
        jax_says=trial.start_says,
    )


def why_no_gpu() -> str:
    """Why jax, which has started and uses the CPU, uses no NVIDIA GPU, and the way out.

    Empty where there is no NVIDIA driver.
    """
    import jax

    try:
        jax.devices("cuda")
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} puts the CPU first: unset it"
    except RuntimeError as error:
        says = str(error).splitlines()[0]
    facts = gather_facts(Trial({"platform": "cpu"}, {}, says, says))
    if not facts.gpus and not facts.driver_says and not has_driver():
        return ""
    return next(problems(facts), f"jax sees no GPU; it says: {says}")


def problems(facts: Facts) -> Iterator[str]:
    """What keeps this machine from training as it could; each with the way out."""
    versions, wanted = facts.versions, _fitting_plugin(facts)
    if versions.get("jax") != versions.get("jaxlib"):
        yield (
            f"jax {versions.get('jax')} with jaxlib {versions.get('jaxlib')}: they belong "
            "together; pip install --upgrade jax jaxlib"
        )
    for name in PLUGINS:
        if name in versions and versions[name] != versions.get("jaxlib"):
            yield (
                f"{name} {versions[name]} with jaxlib {versions.get('jaxlib')}: jax ignores a "
                f"plugin of another version; pip install --upgrade 'jax[{name.split('-')[1]}]'"
            )
    if len(facts.plugins) == 2:
        yield (
            "jax's plugins for CUDA 12 and for CUDA 13 are both installed: jax loads one, not "
            "always the same, and reports the other as an error; rwkv_jax.plan works with either: "
            "pip uninstall " + " ".join(x for x in PLUGINS if wanted not in x)
        )
    if not facts.platform and "JAX_PLATFORMS" in facts.variables:
        yield (
            f"JAX_PLATFORMS={facts.variables['JAX_PLATFORMS']}: jax does not start with it: "
            f"unset it. It says: {facts.jax_says}"
        )
    elif not facts.platform:
        yield f"jax does not start: {facts.jax_says}"
    if facts.driver_says:
        yield _driver_trouble(facts.driver_says)
    if not facts.gpus:
        return
    driver = int(facts.gpus[0].driver.partition(".")[0])
    if driver < OLDEST_DRIVER["cuda12"]:
        yield (
            f"the NVIDIA driver is {facts.gpus[0].driver}, too old for any jax of today: install "
            f"{OLDEST_DRIVER['cuda12']} or newer"
        )
    elif not facts.plugins:
        yield (
            f"there is a GPU ({facts.gpus[0].name}), but jax has no CUDA and runs on the CPU: "
            f"pip install 'jax[{wanted}]', or this project's extra {wanted}"
        )
    for kind in facts.plugins:
        if OLDEST_DRIVER["cuda12"] <= driver < OLDEST_DRIVER[kind]:
            yield (
                f"jax's plugin is for {kind}, which needs driver {OLDEST_DRIVER[kind]}; here is "
                f"{facts.gpus[0].driver}: update the driver, or pip uninstall "
                f"{' '.join(x for x in PLUGINS if kind in x)} and pip install 'jax[{wanted}]'"
            )
        too_old = [gpu for gpu in facts.gpus if (0, 0) < gpu.capability < OLDEST_GPU[kind]]
        if too_old:
            yield (
                f"{too_old[0].name} has compute capability {_dotted(too_old[0].capability)}; "
                f"{kind} needs {_dotted(OLDEST_GPU[kind])}: use cuda12, or a newer GPU"
            )
    runs_plugin = all(driver >= OLDEST_DRIVER[kind] for kind in facts.plugins)
    if facts.plugins and facts.platform == "cpu" and runs_plugin:
        yield from _hidden_gpu(facts)


def _hidden_gpu(facts: Facts) -> Iterator[str]:
    """Why jax does not use a GPU for which it has a driver and a plugin."""
    if "cpu" in facts.variables.get("JAX_PLATFORMS", ""):
        yield f"JAX_PLATFORMS={facts.variables['JAX_PLATFORMS']} hides the GPU: unset it"
    elif facts.variables.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        value = facts.variables["CUDA_VISIBLE_DEVICES"]
        yield f"CUDA_VISIBLE_DEVICES={value!r} hides every GPU: unset it, or name one (0)"
    elif "cuda" in facts.variables.get("LD_LIBRARY_PATH", "").lower():
        yield (
            f"LD_LIBRARY_PATH ({facts.variables['LD_LIBRARY_PATH']}) puts another CUDA before the "
            "one that pip installed for jax: unset it"
        )
    elif not any(name in facts.versions for name in CUDNN) and "cuDNN" in facts.jax_says:
        yield (
            "jax does not find CUDA's libraries, which the extra plan does not bring: pip install "
            f"'jax[{_fitting_plugin(facts)}]'"
        )
    else:
        yield f"jax does not use the GPU; it says: {facts.jax_says or 'nothing'}"


def _driver_trouble(words: str) -> str:
    first = words.splitlines()[0]
    if "version mismatch" in words:
        return (
            f"nvidia-smi says {first!r}: the driver was updated under a running kernel module; "
            "restart the machine"
        )
    if "communicate with the NVIDIA driver" in words:
        return (
            f"nvidia-smi says {first!r}: the driver is installed but not loaded; modprobe nvidia, "
            "or install it anew for this kernel"
        )
    if "No devices were found" in words:
        return "nvidia-smi finds no GPU: is it passed into this container or virtual machine?"
    if "not a valid field" in words:
        return (
            "the NVIDIA driver is too old to tell a GPU's compute capability: install "
            f"{OLDEST_DRIVER['cuda12']} or newer"
        )
    return f"nvidia-smi fails: {first!r}"


def notes(facts: Facts, free_disk: int) -> Iterator[str]:
    """What a person may want to know, though it stops nothing. Disk in bytes."""
    for number, gpu in enumerate(facts.gpus):
        if gpu.used > 0.1 * gpu.memory > 0:
            yield (
                f"GPU {number}: {gpu.used} of {gpu.memory} MiB are in use by other programs "
                "(nvidia-smi lists them); training takes all but a little of a GPU when it starts"
            )
        if facts.platform == "gpu" and gpu.capability < (8, 0):
            yield (
                f"GPU {number}: compute capability {_dotted(gpu.capability)} has no bf16 units; "
                "--precision is fp16 there unless it is given"
            )
    if facts.plugins and facts.driver_says is None:
        yield (
            "jax has a CUDA plugin, but there is no NVIDIA driver (no nvidia-smi), so that it can "
            "compile for a GPU (python -m rwkv_jax.plan) but not use one: for that, install the "
            "driver; a container needs to be started with --gpus all"
        )
    if facts.platform not in ("", "cpu", "gpu"):
        yield f"nothing here has been tried on {facts.platform}"
    if free_disk < 10e9:
        yield (
            f"{free_disk / 1e9:.1f} GB are free in this folder: a checkpoint takes 12 bytes a "
            "parameter, and two are kept"
        )


def _fitting_plugin(facts: Facts) -> str:
    """cuda12 or cuda13: the newest that driver and GPUs run."""
    fits = [
        kind
        for kind in OLDEST_DRIVER
        if facts.gpus
        and int(facts.gpus[0].driver.partition(".")[0]) >= OLDEST_DRIVER[kind]
        and all(gpu.capability >= OLDEST_GPU[kind] for gpu in facts.gpus)
    ]
    return fits[-1] if fits else "cuda12"


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def write_self_test_data(prefix: Path) -> None:
    """2000 tokens with something to learn in them: the squares, modulo 61."""
    with BinIdxWriter(prefix) as writer:
        writer.append(np.arange(2000) ** 2 % 61 + 1, [2000])


# The program of `run_trial`. Prints a line of JSON for jax's facts, and for each training.
TRIAL = """
import json, pathlib, tempfile
from rwkv_jax import doctor
facts = doctor.jax_facts()
print(json.dumps(facts), flush=True)
with tempfile.TemporaryDirectory() as folder:
    data = pathlib.Path(folder) / "squares"
    doctor.write_self_test_data(data)
    for precision in facts["precisions"]:
        losses = doctor.losses_of_small_model(data, precision)
        print(json.dumps({precision: losses}), flush=True)
"""


def jax_facts() -> dict[str, Any]:
    """jax's devices, and which kernel each dtype would run, and why. Starts jax."""
    import jax

    from pallas_kernels.wkv7.api import choose
    from rwkv_jax import build

    build.prepare_jax()
    devices = jax.devices()
    shapes = [jax.ShapeDtypeStruct((1, 512, 1, 64), name) for name in ("bfloat16", "float32")]
    return {
        "platform": devices[0].platform,
        "kinds": [device.device_kind for device in devices],
        "kernels": {str(shape.dtype): choose(shape) for shape in shapes},
        "precisions": list(dict.fromkeys(["fp32", build.device_precision()])),
    }


def starting_params(model: "ModelConfig") -> "Params":
    """Fresh weights, but that the matrices which begin at zero are drawn at random, too.

    So every part of the model counts from the first step on. Rounded to bf16, as in a file.
    """
    import jax
    import ml_dtypes

    from rwkv_jax.initialisation import init_params

    rng = np.random.default_rng(1)

    def begin(leaf: np.ndarray) -> np.ndarray:
        if leaf.ndim == 3 and not leaf.any():
            leaf = rng.standard_normal(leaf.shape, np.float32) / np.sqrt(leaf.shape[-1])
        return leaf.astype(ml_dtypes.bfloat16).astype(np.float32)

    return jax.tree.map(begin, init_params(model))


def losses_of_small_model(data: Path, precision: str) -> list[float]:
    """The losses of the steps of `SELF_TEST`: the step that train runs, without its files."""
    import jax
    import jax.numpy as jnp

    from rwkv_jax import build, sharding
    from rwkv_jax.config import TrainConfig
    from rwkv_jax.dataset import open_dataset
    from rwkv_jax.distributed import place
    from rwkv_jax.optimizer import learning_rate, make_optimizer
    from rwkv_jax.schedule import make_schedule
    from rwkv_jax.step import TrainState, abstract_state

    mesh = sharding.make_mesh(1)
    on_gpu = mesh.devices.flat[0].platform != "cpu"
    config = build.decide(TrainConfig(**SELF_TEST, precision=precision), on_gpu)
    model = config.model_config()
    squares = open_dataset(str(data), config.ctx_len, None, model.vocab_size)
    schedule = make_schedule(config, config.micro_bsz, len(squares.tokens))
    rate = learning_rate(config, model.n_embd, 0, schedule.exit_step)
    optimizer = make_optimizer(config, rate)
    params = starting_params(model)
    abstract = abstract_state(mesh, model, optimizer)
    moments = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract.opt_state)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = place(TrainState(params, moments), where)

    def batch(step: int) -> jax.Array:
        return jnp.asarray(squares.batch(step, 1, config.micro_bsz)[None])

    # Nearly all of the time goes into compiling: on a CPU, half of it without LLVM's optimisations.
    effort = None if on_gpu else {"xla_backend_optimization_level": 0}
    run_step: Any = build.build_step(config, model, mesh, optimizer)
    compiled = run_step.lower(state, batch(0)).compile(effort)
    losses = []
    for step in range(schedule.last_step):
        for _ in range(16):  # in fp16, as often as the loss scale is still too large
            state, metrics = compiled(state, batch(step))
            if not metrics.skipped:
                break
        losses.append(float(metrics.loss))
    return losses


def self_test(trial: Trial, precision: str) -> str:
    """How the losses of a trial compare with the known ones, in words.

    Raises:
        UserError: they differ, or there are none.
    """
    if precision not in trial.losses:
        raise UserError(f"self-test in {precision}: training fails: {trial.says}")
    losses = trial.losses[precision]
    apart = float(np.max(np.abs(np.array(losses) - np.array(KNOWN_LOSSES))))
    summary = f"{len(losses)} training steps, losses within {apart:.1g} of the known ones"
    if not apart <= TOLERANCE[precision]:
        raise UserError(
            f"self-test in {precision}: {summary}, more than {TOLERANCE[precision]}: this machine "
            "computes something else; please report it with all of the above"
        )
    return f"{precision}: {summary}"


def report(facts: Facts) -> Iterator[tuple[str, str]]:
    """The facts, a heading and a line each."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "system", f"{platform.platform()}, Python {platform.python_version()}, {cpus} CPU cores"
    yield "packages", ", ".join(f"{x} {facts.versions.get(x, 'missing')}" for x in PACKAGES)
    plugins = [f"{name} {facts.versions[name]}" for name in PLUGINS if name in facts.versions]
    yield "CUDA", ", ".join(plugins) or "jax has no CUDA plugin"
    if not facts.gpus:
        yield "driver", facts.driver_says or "no NVIDIA driver (no nvidia-smi)"
    for gpu in facts.gpus:
        yield (
            "GPU",
            f"{gpu.name}, compute capability {_dotted(gpu.capability)}, "
            f"{gpu.memory / 1024:.1f} GiB, driver {gpu.driver}",
        )
    for name, value in facts.variables.items():
        yield "environment", f"{name}={value}"
    if facts.platform:
        yield "jax runs on", f"{len(facts.kinds)} x {facts.kinds[0]} ({facts.platform})"
    for dtype, (name, why) in facts.kernels.items():
        yield f"WKV, {dtype}", f"{name}: {why}"


def main() -> None:
    """On two cores of a slow virtual machine: 8 s, nearly all of it compiling and imports; then 6,
    as compiled programs are kept.
    """
    CommandParser(
        prog="python -m rwkv_jax.doctor",
        description="Say what this machine would train on, which kernels would run, and what is "
        "wrong with drivers, packages and settings; then train a small model for some steps whose "
        "losses are known. Exits with 1 when something is wrong.",
    ).parse_args()
    print("starting jax, and training a small model on it …", flush=True)
    began = time.monotonic()
    trial = run_trial()
    took = time.monotonic() - began
    facts = gather_facts(trial)
    for heading, text in report(facts):
        print(f"{heading:>14}  {text}")
    wrong = list(problems(facts))
    for precision in facts.precisions:
        try:
            print(f"{'self-test':>14}  {self_test(trial, precision)} ({took:.1f} s)")
        except UserError as error:
            wrong.append(str(error))
    for note in notes(facts, shutil.disk_usage(".").free):
        print(f"note: {note}")
    for problem in wrong:
        print(f"problem: {problem}")
    if wrong:
        sys.exit(1)
    if facts.jax_says:
        print(f"note: jax says as it starts: {facts.jax_says}")
    print("nothing else is wrong" if facts.jax_says else "nothing is wrong")


if __name__ == "__main__":
    run_command(main)
