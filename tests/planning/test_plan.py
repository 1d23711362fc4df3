"""The planner without a GPU compiler: its arithmetic, its search, its words.

What it compiles for real GPUs is in test_gpu_compile.py.
"""

import dataclasses
import importlib.util
import json
import math
import os
import random
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from benchmarks import plan_table
from pallas_kernels import gpu_targets
from pallas_kernels.gpu_targets import GPU_TARGETS, current_compute_capability
from rwkv_jax import plan
from rwkv_jax.config import AUTO, TrainConfig, parse_train_options
from rwkv_jax.errors import UserError
from rwkv_jax.parallel import sharding
from rwkv_jax.planning import batch_size, memory, plans
from rwkv_jax.planning.memory import GIB, StepCost
from rwkv_jax.planning.plans import Plan
from rwkv_jax.training.build import resolve_config

TINY = TrainConfig(n_layer=2, n_embd=64, vocab_size=512, ctx_len=32, micro_bsz=1, precision="fp32")


@pytest.fixture(autouse=True)
def as_outside_of_tests():
    """optax promotes types; and what the command sets, it sets globally."""
    names = "jax_default_matmul_precision", "jax_traceback_in_locations_limit"
    before = {name: jax.config.values[name] for name in names}
    with jax.numpy_dtype_promotion("standard"):
        yield
    for name, value in before.items():
        jax.config.update(name, value)


# The cards.


def test_cards_are_told_apart_by_their_device_kind():
    kinds = [target.device_kind for target in GPU_TARGETS.values()]
    assert len(set(kinds)) == len(kinds)
    for name, capability in {"t4": (7, 5), "rtx3090": (8, 6), "h100": (9, 0)}.items():
        target = GPU_TARGETS[name]
        device = AbstractDevice(target.device_kind, num_cores=target.core_count, platform="gpu")
        mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert current_compute_capability() == capability


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_a_card_is_compiled_under_a_name_of_its_compute_capability(name):
    target = GPU_TARGETS[name]
    assert f'device_description_str: "{target.compiled_as}"' in target.text()
    device = AbstractDevice(target.compiled_as, num_cores=target.core_count, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_compute_capability() == target.compute_capability


@pytest.mark.parametrize(
    ("plugin", "folder"), [("jax_cuda12_plugin", "cuda_nvcc"), ("jax_cuda13_plugin", "cu13")]
)
def test_the_plugin_of_either_cuda_compiles(plugin, folder, monkeypatch, tmp_path):
    """With its own assembler, though that of the other is installed as well, or none."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: find_spec("json" if name in (plugin, "absl") else "no" + name),
    )
    monkeypatch.setitem(sys.modules, "nvidia", types.SimpleNamespace(__path__=[str(tmp_path)]))
    monkeypatch.setenv("PATH", "")
    assert not gpu_targets.can_compile()
    for each in gpu_targets.PLUGINS.values():
        assembler = tmp_path / each / "bin" / "ptxas"
        assembler.parent.mkdir(parents=True)
        assembler.touch(0o755)
    assert gpu_targets.can_compile()
    assert gpu_targets.ptxas() == str(tmp_path / folder / "bin" / "ptxas")


def test_a_card_that_is_there_need_not_be_in_the_table(monkeypatch):
    class Card:
        compute_capability = "8.9"
        client = type("Client", (), {"platform_version": "cuda 12090"})

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Card])
    for platform, capability in {"gpu": (8, 9), "cpu": None}.items():
        device = AbstractDevice("NVIDIA RTX 4070", num_cores=46, platform=platform)
        mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert current_compute_capability() == capability


@pytest.mark.parametrize("name", GPU_TARGETS)
def test_a_cards_figures_agree_with_each_other(name):
    target = GPU_TARGETS[name]
    # Two operations a clock in each arithmetic unit; boost clocks are rounded in data sheets.
    fp32 = 2 * target.core_count * target.fpus_core * target.clock_ghz / 1e3
    assert target.fp32_tflops == pytest.approx(fp32, rel=0.06)
    assert 1.9 < target.tensor_tflops / target.fp32_tflops < 17
    sold_as = [12, 16, 24, 32, 40, 48, 80, 96, 141]
    nearest = min(sold_as, key=lambda size: abs(size - target.memory_gb))
    assert 0.9 * nearest < target.memory_gb < nearest


# The largest batch.


def needs_of(kind: str, draw: random.Random):
    """batch → bytes, as steps need them, and as they could."""
    fixed, each = 10 ** draw.uniform(6, 10), 10 ** draw.uniform(5, 9)
    bend, knee = draw.uniform(0, 0.2), 10 ** draw.uniform(0, 4)
    return {
        "affine": lambda b: fixed + each * b,
        "noisy": lambda b: (fixed + each * b) * (1 + 0.005 * math.sin(13 * b)),
        "falling slope": lambda b: fixed + each * (min(b, knee) + bend * max(b - knee, 0)),
        "rising slope": lambda b: fixed + each * (b + 5 * max(b - knee, 0)),
        "concave": lambda b: fixed + each * b**0.8,
        "convex": lambda b: fixed + each * (b + bend * b * b),
        "steps": lambda b: fixed + each * 16 * math.ceil(b / 16),
        "powers of two": lambda b: fixed + each * 2 ** math.ceil(math.log2(b)),
        "a jump": lambda b: fixed + each * b + 1e10 * (b > knee),
        "not monotone": lambda b: fixed + each * b * (1 + bend * math.sin(b / knee)),
        "constant": lambda b: fixed,
    }[kind]


# How far from the largest the result may be, and how many are measured, of an ordinary need; of an
# odd one, only that it fits and that the search ends.
SEARCHES = {
    "affine": (0.98, 5),
    "noisy": (0.93, 8),
    "falling slope": (0.92, 8),
    "rising slope": (0.85, 8),
    "concave": (0.9, 8),
    "convex": (0.7, 8),
    "steps": (0.75, 8),
    "powers of two": (0, 8),
    "a jump": (0, 8),
    "not monotone": (0, 8),
    "constant": (1, 8),
}


@pytest.mark.parametrize("kind", SEARCHES)
def test_the_search_is_short_and_ends_at_what_was_measured_to_fit(kind):
    for seed in range(60):
        search_of(needs_of(kind, random.Random(seed)), *SEARCHES[kind])


def search_of(need, closeness: float, calls: int) -> None:
    limit, most, measured = 2 * 10**10, 40320, {}

    def measure(batch):
        assert batch not in measured and 1 <= batch <= most
        measured[batch] = int(need(batch))
        return measured[batch]

    found = batch_size.largest_batch(measure, limit, most)
    assert len(measured) <= calls
    assert found == max((b for b in measured if measured[b] <= limit), default=0)
    if 0 < found < most and measured[found] < 0.97 * limit:
        beyond = math.ceil((found + 1) / closeness) if closeness else most + 1
        assert beyond > most or need(beyond) > limit, measured


def test_the_search_of_a_step_whose_slope_falls_and_then_jumps():
    """What a small model's step was planned to need on an RTX 4090, in GiB."""
    batches = [1, 2, 127, 6902, 68650, 82500, 84752, 89040, 89041, 89042]
    needs = [0.13, 0.15, 0.55, 2.72, 18.81, 21.26, 20.87, 24.98, 24.98, 24.63]
    measured = []

    def need(batch):
        measured.append(batch)
        return int(np.interp(batch, batches, needs) * GIB)

    limit = memory.available(GPU_TARGETS["rtx4090"])
    found = batch_size.largest_batch(need, limit)
    assert len(measured) <= 8 and found in measured and need(found) <= limit < need(1.03 * found)


def test_nothing_fits():
    needs = {1: 11}
    assert batch_size.largest_batch(needs.__getitem__, 10) == 0  # and nothing but 1 is measured
    assert batch_size.largest_batch(lambda batch: 10 + batch, 11) == 1
    assert batch_size.largest_batch(lambda batch: batch, 10**9, 40320) == 40320


# Measuring.


@pytest.fixture(scope="module")
def measured() -> dict[int, StepCost]:
    """The tiny step on one simulated device and on two."""
    config = resolve_config(TINY, on_gpu=False)
    with jax.numpy_dtype_promotion("standard"):
        found = {
            devices: memory.measure(config, config.model_config(), sharding.make_mesh(devices))
            for devices in (1, 2)
        }
    return found


@pytest.mark.slow
def test_what_is_measured(measured):
    one, two = measured[1], measured[2]
    assert one.optimizer - 2 * one.parameters in range(1, 64)  # and the counts of steps
    assert two.parameters == pytest.approx(one.parameters / 2, rel=0.02)
    assert one.temporary > one.parameters / 4 and two.total < one.total
    tokens, C, F, V, L = TINY.ctx_len, 64, 256, 512, 2
    weights = L * (4 * C * C + 2 * C * F + 2 * C * (32 * 3 + 32)) + V * C
    assert 6 * weights * tokens < one.flops < 12 * weights * tokens  # and the WKV operation
    assert two.flops == one.flops  # of a device, whose batch is the same
    assert one.traffic > 3 * one.parameters


def test_auto_takes_the_largest_batch_that_the_device_holds(monkeypatch, capsys):
    config = resolve_config(TINY, on_gpu=False)
    model, mesh = config.model_config(), sharding.make_mesh(1)
    need = StepCost(parameters=1, optimizer=2, passes=0, flops=0, traffic=0, compile_seconds=0.0)

    def measure(config, *_):
        return dataclasses.replace(need, passes=100 + 10 * config.micro_bsz)

    for user in (plans, batch_size):
        monkeypatch.setattr(user, "measure", measure)
    assert batch_size.fitting_micro_bsz(config, model, mesh, limit=155) == 5
    assert (
        batch_size.fitting_micro_bsz(config, model, mesh, limit=10**9) == 40320
    )  # a miniepoch per step
    with pytest.raises(UserError, match="not even 1 fits the 0.0 GiB of cpu; try "):
        batch_size.fitting_micro_bsz(config, model, mesh, limit=109)
    assert batch_size.fitting_micro_bsz(config, model, mesh) == 1  # the default of a CPU
    assert capsys.readouterr().err.splitlines()[-1] == (
        "note: --micro_bsz auto: jax does not report the memory of cpu; using the default, 1"
    )


def test_gpus_of_several_machines(monkeypatch):
    asked: list[object] = []

    def device_mesh(target, count, hosts):
        asked.append((count, hosts))
        return sharding.make_mesh(count)

    def measure(config, model, mesh, target):
        asked.append(dict(mesh.shape))
        return StepCost(GIB, 2 * GIB, 5 * GIB, 1, 1, 1.0)

    monkeypatch.setattr(plans, "device_mesh", device_mesh)
    for user in (plans, batch_size):
        monkeypatch.setattr(user, "measure", measure)
    options = dataclasses.replace(TINY, devices=2, num_nodes=2, mesh="data=2,fsdp=2")
    result = plans.plan(options, GPU_TARGETS["h100"], search=False)
    assert asked == [(4, 2), {"data": 2, "fsdp": 2}]
    text = plans.report(result, 1, "")
    assert "4 x NVIDIA H100 80GB HBM3 in 2 machines" in text and "128 tokens per step" in text


# What is printed.


def some_plan(total: float, largest: int = 4, **options) -> Plan:
    config = resolve_config(
        TrainConfig(size="0.1b", ctx_len=4096, devices=2, micro_bsz=2, **options), on_gpu=True
    )
    need = StepCost(GIB, 2 * GIB, int(total * GIB), 10**13, 67 * 10**9, 30.0)
    larger = dataclasses.replace(need, passes=need.passes + GIB)
    return Plan(
        GPU_TARGETS["h100"], config, config.model_config(), {2: need, largest or 1: larger}, largest
    )


def test_the_report():
    text = plans.report(some_plan(5), 2, "python -m rwkv_jax.train")
    lines = dict(line.strip().split("  ", 1) for line in text.splitlines())
    assert "12 layers of width 768, 191.1 M parameters" in lines["model"]
    assert lines["devices"].startswith("2 x NVIDIA H100 80GB HBM3, bf16, blocks recomputed")
    assert lines["batch"] == "micro_bsz 2, ctx_len 4096: 16,384 tokens per step"
    assert lines["parameters"].strip() == "1.00 GiB float32 master weights"
    assert lines["optimizer"].strip() == "2.00 GiB Adam's moments"
    assert lines["activations"].strip() == "1.00 GiB 0.50 GiB per sample"
    assert lines["gradients"].strip() == "1.00 GiB and working copies"
    assert lines["peak"].strip().startswith("5.00 GiB per device; of its 79.1 GiB jax has 75.1,")
    assert lines["peak"].endswith("fits") and "NOT" not in lines["peak"]
    assert lines["largest"] == "micro_bsz 4 fits: 6.00 GiB"
    assert lines["step"] == (
        "10.0 TFLOP per device, 10 ms at 989 TFLOP/s; 67 GB of memory traffic, 20 ms at 3,352 GB/s"
    )
    assert lines["speed"].startswith("at most 819,689 tokens/s")
    assert lines["train"] == "python -m rwkv_jax.train"


def test_the_report_of_one_batch():
    result = some_plan(5)
    alone = {2: result.costs[2]}
    text = plans.report(result._replace(costs=alone, largest=2), 2, "")
    assert "2.00 GiB with gradients and working copies" in text
    assert "gradients  " not in text and "leave out --micro_bsz to search" in text
    alone = {2: some_plan(90).costs[2]}
    text = plans.report(result._replace(costs=alone, largest=0), 2, "")
    assert "DOES NOT FIT" in text and "largest that fits, or try --grad_cp 1" in text


PARTS = "parameters", "optimizer", "activations", "gradients"


@pytest.mark.parametrize("offload", [{}, {"host": 3 * GIB}, {"host": 3 * GIB, "update": 40 * GIB}])
@pytest.mark.parametrize(
    "passes",
    [
        {1: 9},
        {1: 9, 2: 10, 4: 12},
        {1: 3.1, 4: 9},  # more than in proportion
        {1: 9, 2: 8.5, 4: 8},  # falling
        {1: 3.13, 2: 3.15, 172: 3.55, 6902: 5.72, 68650: 21.81, 82500: 24.26},
        {1: 4, 64: 40, 32: 3.5},
    ],
    ids=str,
)
def test_the_parts_of_the_report_add_up_to_the_peak(passes, offload):
    """Those of the device: of a state in the host's memory there is none, or what is updated."""
    strategy = "fsdp_offload" if offload else "auto"
    one = some_plan(5, strategy=strategy).costs[2]
    needs = {
        batch: dataclasses.replace(one, passes=int(gib * GIB), **offload)
        for batch, gib in passes.items()
    }
    for batch in needs:
        result = some_plan(5, strategy=strategy)._replace(costs=needs, largest=batch)
        lines = [line.split() for line in plans.report(result, batch, "").splitlines()]
        figures = {line[0]: float(line[1]) for line in lines if line[0] in (*PARTS, "peak")}
        assert all(figure >= 0 for figure in figures.values()), figures
        there = sum(figures.get(part, 0) for part in PARTS[2 if offload else 0 :])
        assert there == pytest.approx(figures["peak"], abs=0.021), (batch, figures)


def test_the_report_of_what_is_in_the_host_s_memory():
    """Where the passes are the peak, activations and gradients are theirs."""
    result = some_plan(5, strategy="fsdp_offload")
    away = {"host": 3 * GIB, "update": 4 * GIB, "moved": 50 * 10**9}
    needs = {batch: dataclasses.replace(need, **away) for batch, need in result.costs.items()}
    text = plans.report(result._replace(costs=needs), 2, "")
    lines = dict(line.strip().split("  ", 1) for line in text.splitlines() if "  " in line.strip())
    assert lines["optimizer"].strip() == "2.00 GiB Adam's moments in host memory"
    assert lines["activations"].strip() == "1.00 GiB 0.50 GiB per sample"
    assert lines["gradients"].strip() == "4.00 GiB and working copies"
    assert lines["peak"].strip().startswith("5.00 GiB per device")
    assert lines["host"] == "50 GB to and from host memory, 2,000 ms at 25 GB/s; 2 x 3.00 GiB in it"
    assert lines["speed"].startswith(f"at most {16384 / (2 + 67 / 3352):,.0f} tokens/s")


@pytest.mark.parametrize("update, largest", [(11, 52), (23, 0)])
def test_a_visit_of_the_state_has_to_fit_and_does_not_mislead_the_search(
    update, largest, monkeypatch
):
    measured = []

    def measure(config, *_):
        measured.append(config.micro_bsz)
        passes = int((7.2 + 0.3 * config.micro_bsz) * GIB)
        return StepCost(GIB, 2 * GIB, passes, 1, 1, 1.0, host=3 * GIB, update=update * GIB)

    monkeypatch.setattr(plans, "device_mesh", lambda *_: sharding.make_mesh(1))
    for user in (plans, batch_size):
        monkeypatch.setattr(user, "measure", measure)
    monkeypatch.setattr(plans, "available", lambda _: int(22.8 * GIB))
    options = dataclasses.replace(TINY, strategy="fsdp_offload")
    assert abs(plans.plan(options, GPU_TARGETS["rtx4090"]).largest - largest) <= 1
    assert len(measured) <= 3


def test_the_report_of_what_does_not_fit():
    text = plans.report(some_plan(90, largest=0), 2, "")
    assert "DOES NOT FIT" in text and "not even micro_bsz 1 fits; try --grad_cp 1" in text


def test_the_readmes_table_is_what_was_planned():
    """Its rows against benchmarks/results/plan.json, and the options of both against train's."""
    records = json.loads(plan_table.RESULTS.read_text())
    for readme in plan_table.READMES:
        table = readme.read_text("utf-8").split(plan_table.MARKERS[0])[1]
        rows = table.split(plan_table.MARKERS[1])[0].strip().splitlines()[2:]
        for row, record, of in zip(rows, records, plan_table.ROWS, strict=True):
            gpu, micro_bsz, options, tutorial = of
            config, _ = parse_train_options(record["options"].split())
            assert (record["gpu"], config.micro_bsz, config.ctx_len) == (gpu, micro_bsz, 4096)
            assert record["options"].startswith(options)
            cells = options, micro_bsz, GPU_TARGETS[gpu].device_kind
            peak = f"{record['total'] / GIB:.1f}"
            assert row == f"| {' | '.join(map(str, (*cells, peak, tutorial or '–')))} |"


def command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    plan.main()


def test_the_command_ends_with_the_command_to_train(monkeypatch, capsys):
    monkeypatch.setattr(plans, "can_compile", lambda: True)
    monkeypatch.setattr(plan, "plan", lambda *_, **__: some_plan(5))
    command(
        monkeypatch, "--gpu", "h100", "--size", "0.1b", "--micro_bsz", "auto", "--data_file", "my x"
    )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("python -m rwkv_jax.train --size 0.1b --data_file 'my x' --micro_bsz 4")
    monkeypatch.setattr(plan, "plan", lambda *_, **__: some_plan(90, largest=0))
    with pytest.raises(SystemExit) as left:
        command(monkeypatch, "--gpu", "h100", "--micro_bsz=2")
    assert left.value.code == 1
    assert "--micro_bsz=2" not in capsys.readouterr().out


def test_bad_input_gets_one_line(monkeypatch):
    monkeypatch.setattr(plans, "can_compile", lambda: False)
    for arguments, line in {
        (): "--gpu is needed: give one of t4, a100",
        ("--gpu", "gtx9"): "--gpu gtx9: not known: give one of t4, a100",
        ("--gpu", "h100"): r"the compiler for GPUs is not installed: pip install -e '.\[plan\]'",
        ("--gpu", "h100", "--micro_bsz", "many"): "'many' is neither a number nor auto",
        ("--gpu", "h100", "--ctx_lem", "1"): "did you mean --ctx_len",
    }.items():
        with pytest.raises(UserError, match=line):
            command(monkeypatch, *arguments)


def test_a_failing_compiler_gets_one_line(capfd):
    with (
        pytest.raises(UserError, match=r"^the compiler failed: INTERNAL: ptxas: no space left$"),
        memory.quiet_compiler(),
    ):
        os.write(2, b"E0000 a page of the compiler's own words\n")
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas: no space left\nits stack")
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError), memory.quiet_compiler():
        os.write(2, b"of use to whoever reads the traceback\n")
        raise ZeroDivisionError
    assert capfd.readouterr().err == "of use to whoever reads the traceback\n"


def test_a_search_says_how_far_it_is(monkeypatch):
    said = []

    def measure(config, model, mesh, target, progress):
        said.append((config.micro_bsz, progress))
        return StepCost(
            GIB, 2 * GIB, (8 + config.micro_bsz + 9 * (config.micro_bsz > 60)) * GIB, 1, 1, 1.0
        )

    monkeypatch.setattr(plans, "device_mesh", lambda *_: sharding.make_mesh(1))
    for user in (plans, batch_size):
        monkeypatch.setattr(user, "measure", measure)
    assert plans.plan(TINY, GPU_TARGETS["h100"]).largest == 60
    assert said[0] == (1, " (compilation 1 of at most 8)")
    assert said[1][1] == " (compilation 2 of at most 8; 1 fits)"
    batches = [batch for batch, _ in said]
    below, above = max(b for b in batches[:-1] if b <= 60), min(b for b in batches[:-1] if b > 60)
    assert said[-1][1].endswith(f" of at most 8; {below} fits, {above} does not)")


def test_auto_is_an_option_of_train():
    assert parse_train_options(["--micro_bsz", "auto"])[0].micro_bsz == AUTO
    with pytest.raises(UserError, match="neither a number nor auto"):
        parse_train_options(["--micro_bsz", "-3"])
