"""Times other WKV-7 operators and training steps and ours on the same inputs.

    python -m benchmarks.rivals_gpu [--official RWKV-LM] [--output PATH]

Rivals are timed where they are:

- `fla`: flash-linear-attention's chunk_rwkv7, if it is installed, called as its own layer calls it.
  It takes log decays; the map from the raw logit, which ours includes, is not in its time;
- `official_cuda` and `official_trainer`: RWKV-LM's CUDA operator and its model's training step,
  from the checkout that `--official` names, compiled as its source says with nvcc and ninja. Our
  step is timed beside it, and only then.

Each runs in a process of its own, under `--limit`, one after the other: a process has the whole
GPU. All read the same files of inputs, and each row has the SHA-256 of what was read. A rival's
time counts if it was given the same inputs as ours on the same card, and if what it computes is
what ours does: the operator's y and six gradients, the first step's gradient of every tensor and
the first steps' losses, to `ARRAY_ERROR` and `NUMBER_ERROR`. Otherwise its row says what is wrong.
`ratio` is its time over ours.

The official step is forward, backward, clipping and Adam without Lightning and DeepSpeed: those
are replaced by stand-ins, which do nothing in a step, and by torch's fused AdamW on float32
masters, whether they are installed or not. On a CPU everything runs in the same way; its times
mean nothing.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np

from benchmarks import command, gpu_inputs, machine, timing
from benchmarks.train_step_gpu import EXIT_TOKENS, prepare
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import TrainConfig, parse_train_options
from rwkv_jax.errors import UserError, one_line, run_command, signals_raise
from rwkv_jax.files import reporting_os_errors

INPUTS = ("r", "w", "k", "v", "a", "b")
PASSES = ("forward", "forward_backward")
# Of an array's norm. bfloat16's rounding gives 0.005 to the operator's results, and 0.02 to the
# gradients of a model's tensors.
ARRAY_ERROR = {"wkv7": 0.05, "step": 0.15}
NUMBER_ERROR = 0.01  # of a loss, or of the whole gradient's norm

WARM_UP_SECONDS = 0.5
LISTED = 5  # tensors of whose gradients the largest errors are kept
LOSSES = 3  # steps whose losses are compared; the timed ones follow
STEPS, STEPS_SECONDS = 20, 2.0  # so many, or for so long, at least three

Row = dict[str, Any]
Report = Callable[[Row], None]


class StepOptions(NamedTuple):
    size: str
    ctx_len: int
    micro_bsz: int
    grad_cp: int

    def arguments(self) -> list[str]:
        """As `train_step_gpu` has them: the same program, which may be on disk already."""
        options = self._asdict() | {"precision": "bf16", "my_exit_tokens": EXIT_TOKENS}
        return [f"--{name}={value}" for name, value in options.items()]

    def config(self) -> TrainConfig:
        return parse_train_options(self.arguments())[0]


# ---------------------------------------------------------------------------------- what all share


def median_seconds(call: Callable[[int], Any], wait: Callable[[Any], Any]) -> float:
    """Of call(i), as `timing` has it; calls before raise the clocks of an idle card."""

    def raise_clocks() -> None:
        end = time.monotonic() + WARM_UP_SECONDS
        while time.monotonic() < end:
            wait(call(0))

    return timing.median_seconds(call, wait, raise_clocks)


def each_shape(
    report: Report,
    scratch: Path,
    shapes: list[str],
    card: str,
    timed: Callable[[dict[str, np.ndarray], Path], dict[str, Row]],
) -> None:
    """Reports a row for each shape and pass; timed(inputs, folder of our results) makes them."""
    for shape in shapes:
        given = load(scratch / shape / "inputs")
        head = {
            "what": "wkv7",
            "shape": shape,
            **ArgSpec(*given["r"].shape)._asdict(),
            "inputs_sha256": gpu_inputs.sha256(given.values()),
            "card": card,
        }
        try:
            found = timed(given, scratch / shape / "ours")
        except Exception as error:  # it does not fit, or the card cannot run it; others follow
            traceback.print_exc()
            found = dict.fromkeys(PASSES, {"error": _why(error)})
        for direction, row in found.items():
            report(head | {"pass": direction} | row)


def step_row(options: StepOptions, batch: np.ndarray, init: Path) -> Row:
    digest = hashlib.sha256(init.read_bytes() + gpu_inputs.sha256([batch]).encode())
    return {
        "what": "step",
        **options._asdict(),
        "pass": "step",
        "batch_sha256": gpu_inputs.sha256([batch]),
        "inputs_sha256": digest.hexdigest(),
    }


def time_steps(
    options: StepOptions, step: Callable[[], tuple[float, float]], after_first: Callable[[], Row]
) -> Row:
    """Of step() → (loss, gradient norm), which returns when the step is done.

    `after_first` is called after the first one; what it returns goes into the row.
    """
    first = [step()]
    found = after_first()
    first += [step() for _ in range(LOSSES - 1)]
    took: list[float] = []
    while len(took) < 3 or len(took) < STEPS and sum(took) < STEPS_SECONDS:
        start = time.perf_counter()
        step()
        took.append(time.perf_counter() - start)
    seconds = statistics.median(took)
    return {
        "losses": [loss for loss, _ in first],
        "grad_norms": [norm for _, norm in first],
        **found,
        "steps": len(took),
        "ms": 1e3 * seconds,
        "tokens_per_s": options.micro_bsz * options.ctx_len / seconds,
    }


def save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """numpy's files know no bfloat16: the bits as 16-bit integers."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.view(np.uint16))


def load(folder: Path) -> dict[str, np.ndarray]:
    order = (*INPUTS, "dy", "y")
    paths = sorted(folder.glob("*.npy"), key=lambda path: order.index(path.stem))
    return {path.stem: np.load(path).view(ml_dtypes.bfloat16) for path in paths}


# -------------------------------------------------------------------------------------------- ours


def ours_wkv7(report: Report, scratch: Path, shapes: list[str]) -> None:
    import jax

    from pallas_kernels.wkv7 import wkv7
    from pallas_kernels.wkv7.api import choose
    from rwkv_jax.device.runtime import prepare_jax

    prepare_jax()
    device = jax.devices()[0]

    @jax.jit
    def forward_backward(*arrays):
        *inputs, dy = arrays
        y, vjp = jax.vjp(wkv7, *inputs)
        return y, *vjp(dy)

    def timed(given: dict[str, np.ndarray], ours: Path) -> dict[str, Row]:
        sets = [
            [jax.device_put(array) for array in given.values()]
            for _ in range(timing.copies(device.platform != "cpu", given["r"].nbytes))
        ]
        outputs = map(np.asarray, forward_backward(*sets[0]))
        save(ours, dict(zip(("y", *INPUTS), outputs, strict=True)))
        runs = (
            functools.partial(_call, jax.jit(wkv7), [x[:6] for x in sets]),
            functools.partial(_call, forward_backward, sets),
        )
        return {
            direction: {
                "kernel": choose(sets[0][0])[0],
                "ms": 1e3 * median_seconds(run, jax.block_until_ready),
            }
            for direction, run in zip(PASSES, runs, strict=True)
        }

    each_shape(report, scratch, shapes, device.device_kind, timed)


def _call(function: Callable, sets: list[Any], i: int) -> Any:
    return function(*sets[i % len(sets)])


def ours_step(report: Report, scratch: Path, options: StepOptions) -> None:
    import jax
    import optax

    from rwkv_jax.device.runtime import prepare_jax

    prepare_jax()
    device, init = jax.devices()[0], scratch / "init.pth"
    prepared = prepare([*options.arguments(), "--load_model", str(init)])
    np.save(scratch / "rates.npy", np.asarray(prepared.rate(jax.numpy.arange(LOSSES + STEPS))))
    state = prepared.make_state()
    batch = jax.device_put(prepared.batch, prepared.batch_sharding)

    def step() -> tuple[float, float]:
        nonlocal state
        state, metrics = prepared.run(state, batch)
        jax.block_until_ready(state)
        return float(metrics.loss), float(metrics.grad_norm)

    def keep_gradient() -> Row:
        mu = optax.tree.get(state.opt_state, "mu")  # (1 − β₁) times the clipped gradient
        weights.save_pth(scratch / "mu.pth", mu, np.float32)
        return {}

    row = step_row(options, prepared.batch[0], init) | time_steps(options, step, keep_gradient)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use")
    report(row | {"card": device.device_kind, "peak_bytes": memory})


# ----------------------------------------------------------------------------- rivals, all in torch


class Operator(NamedTuple):
    run: Callable[..., Any]  # (r, w, k, v, a, b) of [B,T,H,N] → y
    takes_log_decay: bool  # in place of w, the raw logit


def _device() -> tuple[Any, str]:
    """torch's device, and the card's name as jax has it."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    return torch.device("cpu"), "cpu"


def time_operator(report: Report, scratch: Path, shapes: list[str], operator: Operator) -> None:
    import torch

    device, card = _device()
    scale = -math.exp(-0.5)  # log decay = scale·sigmoid(w)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.view(np.int16)).to(device).view(torch.bfloat16)

    def wait(_: Any) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def forward(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return operator.run(*inputs)

    def forward_backward(*arrays: torch.Tensor) -> list[torch.Tensor]:
        *inputs, dy = arrays
        y = operator.run(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    def timed(given: dict[str, np.ndarray], ours: Path) -> dict[str, Row]:
        tensors = {name: tensor(array) for name, array in given.items()}
        share = torch.sigmoid(tensors["w"].float())
        if operator.takes_log_decay:
            tensors["w"] = (scale * share).bfloat16()
        sets = [
            [x.clone().requires_grad_(name != "dy") for name, x in tensors.items()]
            for _ in range(timing.copies(device.type == "cuda", given["r"].nbytes))
        ]
        results = dict(zip(("y", *INPUTS), forward_backward(*sets[0]), strict=True))
        if operator.takes_log_decay:
            results["w"] = results["w"].float() * scale * share * (1 - share)
        errors = {}
        for name, array in load(ours).items():
            expected = tensor(array).float()
            errors[name] = float((results.pop(name).detach() - expected).norm() / expected.norm())
        runs = (
            functools.partial(_call, forward, [x[:6] for x in sets]),
            functools.partial(_call, forward_backward, sets),
        )
        return {
            direction: {"errors": errors, "ms": 1e3 * median_seconds(run, wait)}
            for direction, run in zip(PASSES, runs, strict=True)
        }

    each_shape(report, scratch, shapes, card, timed)


def fla_operator() -> Operator:
    from fla.ops.rwkv7 import chunk_rwkv7

    settings = {"scale": 1.0, "safe_gate": True, "lower_bound": -math.exp(-0.5), "chunk_size": 64}

    def run(*inputs: Any) -> Any:
        return chunk_rwkv7(*inputs, **settings)[0]

    return Operator(run, takes_log_decay=True)


def fla(report: Report, scratch: Path, shapes: list[str]) -> None:
    time_operator(report, scratch, shapes, fla_operator())


def fla_build(_: Report, spec: ArgSpec) -> None:
    """Compiles, on all cores, the hundreds of forms from which fla's kernels choose the fastest.

    The first call would do so one after the other, in minutes; now it finds them on disk. They
    depend on the number of heads, and not of tokens.
    """
    os.environ["FLA_CACHE_RESULTS"] = "0"  # it is not to take a part's choice for its own
    parts = max(1, len(os.sched_getaffinity(0)) - 2)
    with ProcessPoolExecutor(parts, mp_context=multiprocessing.get_context("spawn")) as pool:
        small = spec._replace(time=min(spec.time, 1024))
        list(pool.map(functools.partial(try_forms, small, parts), range(parts)))


def try_forms(spec: ArgSpec, parts: int, part: int) -> None:
    """Runs fla's operator once, trying one of so many parts of each kernel's forms."""
    import torch
    from triton.runtime.autotuner import Autotuner

    bench = Autotuner._bench

    def bench_part(self: Any, *arguments: Any, config: Any, **meta: Any) -> Any:
        if self.configs.index(config) % parts != part:
            return 3 * [1e9]  # milliseconds: worse than any of the part, better than none of it
        return bench(self, *arguments, config=config, **meta)

    device, _ = _device()
    inputs = [
        torch.full(tuple(spec), -0.1, dtype=torch.bfloat16, device=device, requires_grad=True)
        for _ in INPUTS
    ]
    with mock.patch.object(Autotuner, "_bench", bench_part):
        y = fla_operator().run(*inputs)
        torch.autograd.grad(y, inputs, y)


def official_cuda(report: Report, scratch: Path, shapes: list[str], folder: Path) -> None:
    run = official_model(folder).RWKV7_CLAMPW_CUDA_OP.apply
    time_operator(report, scratch, shapes, Operator(run, takes_log_decay=False))


def official_trainer(report: Report, scratch: Path, options: StepOptions, folder: Path) -> None:
    import torch

    device, card = _device()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    tensors = torch.load(scratch / "init.pth", weights_only=True)
    batch, rates = np.load(scratch / "tokens.npy"), iter(np.load(scratch / "rates.npy").tolist())
    tokens = torch.from_numpy(batch).long().to(device)
    config = options.config()
    shape = config.model_config()
    model, scripted = official_rwkv(
        folder,
        types.SimpleNamespace(
            n_layer=shape.n_layer,
            n_embd=shape.n_embd,
            dim_att=shape.n_embd,
            dim_ffn=shape.dim_ffn,
            head_size=shape.head_size,
            vocab_size=shape.vocab_size,
            ctx_len=options.ctx_len,
            grad_cp=options.grad_cp,
            my_testing="x070",
            weight_decay=config.weight_decay,
            lr_init=0.0,  # each step sets it
            betas=(config.beta1, config.beta2),
            adam_eps=config.adam_eps,
        ),
    )
    model.load_state_dict(tensors)
    model.to(device, torch.bfloat16)
    model.trainer = types.SimpleNamespace(is_global_zero=False, strategy=None)
    adam = model.configure_optimizers()
    params = [p for group in adam.param_groups for p in group["params"]]
    masters = [p.detach().float() for p in params]
    rest = iter(masters)
    for group in adam.param_groups:
        group["params"] = [next(rest) for _ in group["params"]]

    def step() -> tuple[float, float]:
        loss = model.training_step((tokens[:, :-1], tokens[:, 1:]), 0)
        loss.backward()
        used = [(p, m) for p, m in zip(params, masters, strict=True) if p.grad is not None]
        for p, m in used:
            m.grad = p.grad.float()
            p.grad = None
        norm = torch.nn.utils.clip_grad_norm_(masters, config.grad_clip)
        rate = next(rates)
        for group in adam.param_groups:
            group["lr"] = rate * group["my_lr_scale"]
        adam.step()
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        return loss.item(), norm.item()

    def compare_gradient() -> Row:
        mu = torch.load(scratch / "mu.pth", weights_only=True)
        names = {p: name for name, p in model.named_parameters()}
        errors = {}
        for p, m in zip(params, masters, strict=True):
            ours = mu.pop(names[p]).to(device)
            theirs = adam.state[m]["exp_avg"] if m in adam.state else torch.zeros_like(ours)
            # What no gradient reaches, as layer 0's value residual, is zero in both.
            errors[names[p]] = float((theirs - ours).norm() / ours.norm().clamp(min=1e-30))
        worst = sorted(errors, key=lambda name: -errors[name])[:LISTED]
        return {"errors": {name: errors[name] for name in worst}}

    row = step_row(options, batch, scratch / "init.pth")
    row |= time_steps(options, step, compare_gradient)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    row |= {"scripted": scripted, "optimizer": "torch.optim.AdamW(fused=True)"}
    report(row | {"card": card, "peak_bytes": peak})


# ----------------------------------------------------------------------------- the official sources


def official_model(folder: Path, scripted: bool = True) -> types.ModuleType:
    """RWKV-LM's src/model.py as a module, imported with the settings of its demo.

    Args:
        scripted: whether TorchScript compiles its time mix, as in the demo. RWKV_JIT_ON=0 is no
            way to do without: the source's functions for that hide each other.
    """
    import torch

    sources = folder / "RWKV-v7" / "train_temp"
    settings = {
        "RWKV_MY_TESTING": "x070",
        "RWKV_KERNEL": "@rwkv3",
        "RWKV_HEAD_SIZE": "64",
        "RWKV_HEAD_L2WRAP_CE_CHUNK": "0",
        "RWKV_FLOAT_MODE": "bf16",
        "RWKV_JIT_ON": "1",
    }
    modules = stand_ins()
    unscripted = {} if scripted else {"ScriptModule": torch.nn.Module, "script_method": _same}
    with (
        mock.patch.multiple(torch.jit, **unscripted) if unscripted else contextlib.nullcontext(),
        mock.patch.dict(os.environ, settings),
        mock.patch.object(sys, "path", [str(sources), *sys.path]),
        contextlib.chdir(sources),
    ):
        for name in ("src", "src.model"):
            sys.modules.pop(name, None)
        sys.modules.update(modules)
        try:
            return importlib.import_module("src.model")  # which stays: scripting looks it up
        finally:
            for name in modules:
                sys.modules.pop(name, None)


def _same(function: Any) -> Any:
    return function


def official_rwkv(folder: Path, arguments: types.SimpleNamespace) -> tuple[Any, bool]:
    """The model of src/model.py, and whether it is scripted, as by its trainer.

    Some torch cannot script it, as 2.14 on Python 3.12: no autograd.Function is called there.
    """
    try:
        return official_model(folder).RWKV(arguments), True
    except RuntimeError:
        return official_model(folder, scripted=False).RWKV(arguments), False


def stand_ins() -> dict[str, types.ModuleType]:
    """What src/model.py imports of Lightning and DeepSpeed."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def fused_adam(groups: list[Row], *, lr: float, betas: Any, eps: float, **_: Any) -> Any:
        return torch.optim.AdamW(groups, lr, betas, eps, fused=True)

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def again(function: Callable, *arguments: Any) -> Any:
        return checkpoint(function, *arguments, use_reentrant=True)

    contents: dict[str, dict[str, Any]] = {
        "pytorch_lightning": {"LightningModule": torch.nn.Module},
        "pytorch_lightning.utilities": {"rank_zero_info": nothing, "rank_zero_only": nothing},
        "pytorch_lightning.strategies": {"DeepSpeedStrategy": type("DeepSpeedStrategy", (), {})},
        "deepspeed": {"checkpointing": types.SimpleNamespace(checkpoint=again)},
        "deepspeed.ops": {},
        "deepspeed.ops.adam": {"FusedAdam": fused_adam, "DeepSpeedCPUAdam": nothing},
    }
    modules = {}
    for name, content in contents.items():
        module = modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
    return modules


def compiler_environment(scratch: Path) -> dict[str, str]:
    """What torch's builder of extensions should know, where its own guess may be wrong."""
    # Extensions are of this run: the lock of one that was ended would block the next.
    found = {"TORCH_EXTENSIONS_DIR": str(scratch / "extensions")}
    # Searched last: headers of cuBLAS and the like, which a toolkit may lack and torch brings.
    torch = importlib.util.find_spec("torch")
    site = Path(torch.origin).parents[1] if torch and torch.origin else scratch
    headers = [os.environ.get("CPLUS_INCLUDE_PATH"), *map(str, site.glob("nvidia/*/include"))]
    if any(headers):
        found["CPLUS_INCLUDE_PATH"] = os.pathsep.join(filter(None, headers))
    # It takes the folder above that of the first nvcc on the path, which may be a script elsewhere.
    with contextlib.suppress(OSError):
        command = ["nvcc", "--dryrun", "-c", "x.cu"]
        said = subprocess.run(command, capture_output=True, text=True, cwd=scratch).stderr
        here = re.search(r"^#\$ _HERE_=(.+)$", said, re.M)
        if here and "CUDA_HOME" not in os.environ:
            found["CUDA_HOME"] = str(Path(here[1]).parent)
    return found


def official_build(_: Report, folder: Path) -> None:
    """Compiles the extensions of src/model.py at once: imported, it does so one after the other."""
    calls = extensions(folder)
    if calls:
        spawn = multiprocessing.get_context("spawn")
        workers = min(len(calls), len(os.sched_getaffinity(0)))
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            sources = folder / "RWKV-v7" / "train_temp"
            list(pool.map(functools.partial(_build, sources), calls))


def _build(sources: Path, call: Row) -> None:
    from torch.utils import cpp_extension

    with contextlib.chdir(sources):
        cpp_extension.load(**call | {"verbose": False})


def extensions(folder: Path) -> list[Row]:
    """The keywords of each `torch.utils.cpp_extension.load` that src/model.py calls."""
    import torch
    from torch.utils import cpp_extension

    calls: list[Row] = []

    with (
        mock.patch.object(cpp_extension, "load", lambda **call: calls.append(call)),
        mock.patch.object(torch.library, "register_autograd", lambda *_, **__: None),
        mock.patch.object(torch.jit, "script", _same),
    ):
        official_model(folder)
    return calls


# ---------------------------------------------------------------------------------------- processes


def _why(error: BaseException) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return one_line(f"{type(error).__name__}: {first}")


def _child(path: Path, function: Callable[..., None], arguments: tuple) -> None:
    """Runs function(report, *arguments), whose rows, or why there are no more, go to a file."""
    os.setpgid(0, 0)  # so that what it starts, compilers, can be ended with it
    with path.open("a", encoding="utf-8") as file:

        def report(row: Row) -> None:
            print(json.dumps(row), file=file, flush=True)

        try:
            function(report, *arguments)
        except Exception as error:
            if not isinstance(error, ImportError):
                traceback.print_exc()
            report({"error": _why(error)})


def rows_of(
    function: Callable[..., None], arguments: tuple, scratch: Path, limit: int
) -> list[Row]:
    """What `function` reports in a process of its own; last, in a row, why it ended too early."""
    path = scratch / f"{function.__name__}.jsonl"
    path.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(
        target=_child, args=(path, function, arguments)
    )
    process.start()
    try:
        _wait(process, limit)
        late = process.exitcode is None
    finally:
        _end(process)
    rows = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    )
    if late:
        rows.append({"error": f"it was ended after its limit of {limit} s"})
    elif process.exitcode:
        rows.append({"error": f"its process ended with status {process.exitcode}"})
    return rows


def _wait(process: BaseProcess, limit: int) -> None:
    process.join(limit)


def _end(process: BaseProcess) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()
    process.join()


# -------------------------------------------------------------------------------------- the verdict


def judged(row: Row, ours: list[Row]) -> Row:
    """A rival's row with its `ratio`, or with an `error` in place of its time."""
    if "error" in row:
        return row
    case = ("what", "shape", "size", "ctx_len", "micro_bsz", "grad_cp", "pass")
    beside = [x for x in ours if all(x.get(key) == row.get(key) for key in case) and "ms" in x]
    reason = _unlike(row, beside[0]) if beside else "there is no time of ours beside it"
    if reason:
        return {key: value for key, value in row.items() if key != "ms"} | {"error": reason}
    return row | {"ratio": row["ms"] / beside[0]["ms"]}


def _unlike(row: Row, ours: Row) -> str:
    """Why the two cannot be compared, or nothing."""
    for key in ("card", "batch", "time", "head", "inputs_sha256"):
        if row.get(key) != ours.get(key):
            return f"{key} is {row.get(key)}; ours is {ours.get(key)}"
    for name, error in row.get("errors", {}).items():
        if not error <= ARRAY_ERROR[row["what"]]:
            what = "y" if name == "y" else f"the gradient of {name}"
            return f"{what} differs from ours by {error:.2g} of its norm"
    if row["what"] == "step":
        for key, name in {"losses": "loss", "grad_norms": "gradient norm"}.items():
            for i, (theirs, mine) in enumerate(zip(row[key], ours[key], strict=True)):
                if not abs(theirs - mine) <= NUMBER_ERROR * abs(mine):
                    return f"the {name} of step {i + 1} is {theirs:.4g}; ours is {mine:.4g}"
    return ""


def write_inputs(scratch: Path, shapes: dict[str, ArgSpec], options: StepOptions) -> None:
    for name, spec in shapes.items():
        save(scratch / name / "inputs", gpu_inputs.wkv7_inputs(spec, seed=0))
    model = options.config().model_config()
    batch = gpu_inputs.tokens(options.micro_bsz, options.ctx_len, model.vocab_size)
    np.save(scratch / "tokens.npy", batch)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in weights.official_shapes(model).items():
        # Of ordinary size in every tensor: zeros would hide an error behind them.
        is_scale = "ln" in name and name.endswith("weight")
        tensors[name] = 0.02 * rng.standard_normal(shape, np.float32) + np.float32(is_scale)
    pth.write(scratch / "init.pth", tensors, ml_dtypes.bfloat16)


def outcome(row: Row) -> str:
    of = "shape" if row["what"] == "wkv7" else "size"
    where = " ".join(row[key] for key in (of, "pass") if key in row)
    if "error" in row:
        said = row["error"]
    else:
        said = f"{row['ms']:.3f} ms"
        said += f", {row['ratio']:.2f} times ours" if "ratio" in row else ""
    return " ".join(filter(None, (row["implementation"], where))) + f": {said}"


def main() -> None:
    parser = command.record_parser(__doc__, "write the record (JSON) here, row by row")
    parser.add_argument("--official", type=Path, metavar="DIR", help="a checkout of RWKV-LM")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=list(ARG_SPECS),
        metavar="SHAPE",
        help=f"B,T,H,N, or one of {', '.join(ARG_SPECS)} (default: all of these)",
    )
    parser.add_argument("--size", default="0.1b", help="of the step's model (0.1b)")
    parser.add_argument("--ctx_len", type=int, default=4096)
    parser.add_argument("--micro_bsz", type=int, default=8)
    parser.add_argument("--grad_cp", type=int, default=1, choices=(0, 1))
    parser.add_argument("--limit", type=int, default=180, metavar="SECONDS", help="of each process")
    options = parser.parse_args()
    shapes = dict(map(gpu_inputs.shape, options.shapes))
    step = StepOptions(options.size, options.ctx_len, options.micro_bsz, options.grad_cp)
    step.config().model_config()  # an unknown size is refused here
    folder = options.official and options.official.absolute()
    source = folder and folder / "RWKV-v7" / "train_temp" / "src" / "model.py"
    if source and not source.is_file():
        raise UserError(f"--official {options.official}: has no RWKV-v7/train_temp/src/model.py")

    result = machine.record("rivals")
    for name in ("flash-linear-attention", "fla-core"):
        if version := machine.installed(name):
            result["machine"]["packages"][name] = version
    if source:
        result["official_sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()
    rows: list[Row] = result.setdefault("rows", [])
    if options.output:
        with reporting_os_errors(options.output, "write"):
            options.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        signals_raise(),
        # Gigabytes, which do not belong beside the results if this process is killed.
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
        mock.patch.dict(os.environ, compiler_environment(Path(temporary))),
    ):
        scratch = Path(temporary)
        write_inputs(scratch, shapes, step)

        def add(found: list[Row], what: str, name: str) -> bool:
            """Adds the rows of an implementation; whether there is no error among them."""
            ours = [row for row in rows if row["implementation"] == "ours"]
            for row in found:
                row = {"what": what, **row, "implementation": name}
                rows.append(row if name == "ours" else judged(row, ours))
                print(outcome(rows[-1]), flush=True)
            if options.output:
                machine.write(options.output, result)
            return all("error" not in row for row in found)

        def run(what: str, name: str, function: Callable[..., None], *arguments: Any) -> bool:
            return add(rows_of(function, arguments, scratch, options.limit), what, name)

        names = list(shapes)
        run("wkv7", "ours", ours_wkv7, scratch, names)
        card = next((row["card"] for row in rows if "card" in row), "")
        result |= {"device_kind": card, "on_gpu": card not in ("", "cpu")}
        if not result["on_gpu"]:
            print("no GPU: this rehearses the benchmark on a CPU, and its times mean nothing")
        if result["on_gpu"] and importlib.util.find_spec("fla"):
            for row in rows_of(fla_build, (shapes[names[0]],), scratch, options.limit):
                print(f"fla's kernels were not all compiled beforehand: {row['error']}", flush=True)
        run("wkv7", "fla", fla, scratch, names)

        lacking = ""
        if not source:
            lacking = "--official names no checkout of RWKV-LM"
        elif built := rows_of(official_build, (folder,), scratch, options.limit):
            lacking = built[-1]["error"]
        if lacking:
            add([{"error": lacking}], "wkv7", "official_cuda")
            add([{"error": lacking}], "step", "official_trainer")
        else:
            run("wkv7", "official_cuda", official_cuda, scratch, names, folder)
            if run("step", "ours", ours_step, scratch, step):
                run("step", "official_trainer", official_trainer, scratch, step, folder)
            else:
                reason = "there is no time of ours beside it"
                add([{"error": reason}], "step", "official_trainer")
    if options.output:
        print(f"wrote {options.output}")


if __name__ == "__main__":
    run_command(main)
