"""The kernels compiled for real GPUs, without one: what interpret mode cannot show."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import deterministic
from benchmarks.wkv7_compiled import KERNELS, RESULTS, ROWS, compiled, record, stack
from pallas_kernels.gpu_targets import (
    GPU_TARGETS,
    can_compile,
    compile_for,
    device_mesh,
)
from pallas_kernels.wkv7 import api as wkv7_api
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.arg_specs import ArgSpec
from rwkv_jax.config import TrainConfig
from rwkv_jax.device.runtime import DETERMINISTIC
from rwkv_jax.model.loss import head_loss
from rwkv_jax.planning import memory, plans

ROOT = Path(__file__).parents[2]

if jax.default_backend() == "gpu":  # it would time kernels, and compile for itself
    pytest.skip("run these with JAX_PLATFORMS=cpu", allow_module_level=True)
if not can_compile():
    pytest.skip("needs the GPU compiler of pallas_kernels.gpu_targets", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def as_for_a_user():
    """With all optimisations, and without a cache: jax warns when it finds what was compiled for a
    GPU that is not there, for it cannot load it.
    """
    settings = {"jax_enable_compilation_cache": False, "jax_disable_most_optimizations": False}
    before = {name: jax.config.values[name] for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def arrays(spec: ArgSpec, dtype=jnp.bfloat16, **options) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(tuple(spec), dtype, **options)] * 6


def forward_and_backward(*inputs, **options):
    y, vjp = jax.vjp(functools.partial(wkv7, **options), *inputs)
    return y, vjp(y)


def backward(*inputs):
    return forward_and_backward(*inputs)[1]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_kernels_keep_to_their_registers_and_use_tensor_cores(row):
    """Within limits, and as recorded where there is a record of this jax and assembler.

    `python -m benchmarks.wkv7_compiled` writes the record.
    """
    target = GPU_TARGETS[row.card]
    found = compiled(row).kernels
    for name in KERNELS:
        kernel = found[name]
        assert kernel.tensor_instructions >= 20, kernel
        assert kernel.spill_bytes <= 64, kernel
        assert 0 < kernel.shared_bytes <= (target.shared_kb_core - 1) * 1024, kernel
    recorded = json.loads(RESULTS.read_text("utf-8")).get(stack(), [record(row)])
    assert record(row) in recorded


def test_there_is_a_record_of_each_stack():
    results = json.loads(RESULTS.read_text("utf-8"))
    versions = [re.fullmatch(r"jax ([\d.]+), ptxas [\d.]+", name)[1] for name in results]
    assert len(versions) == 2 and versions[0] == "0.10.2" and versions[1] >= "0.12"
    assert {len(rows) for rows in results.values()} == {len(ROWS)}


wants_more_shared_memory = pytest.mark.xfail(
    jax.__version__ == "0.11.2",
    raises=jax.errors.JaxRuntimeError,
    reason="jax 0.11.2's Triton asks for 129 KiB of shared memory, whatever the tuning",
    strict=True,
)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [pytest.param(jnp.float32, 128, marks=wants_more_shared_memory), (jnp.float16, 64)],
)
def test_other_dtypes_and_resets_compile(dtype, size):
    """Where it is tightest: a consumer card's shared memory."""
    spec = ArgSpec(2, 40, 3, size)
    reset = jax.ShapeDtypeStruct((2, 40), jnp.bool_)
    compiled = compile_for(
        GPU_TARGETS["rtx4090"],
        lambda reset, *x: forward_and_backward(*x, reset=reset, implementation="pallas_triton"),
        reset,
        *arrays(spec, dtype),
    )
    assert all(name in compiled.executable.as_text() for name in KERNELS)


def test_sharded_over_batch_and_heads_nothing_is_gathered():
    target = GPU_TARGETS["h100"]
    mesh = device_mesh(target, count=4, hosts=1)
    mesh = jax.sharding.Mesh(
        mesh.devices.reshape(2, 2), ("data", "model"), axis_types=mesh.axis_types * 2
    )
    spec = PartitionSpec("data", None, "model", None)
    inputs = arrays(ArgSpec(4, 256, 4), sharding=NamedSharding(mesh, spec))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec,) * 6, out_specs=(spec, (spec,) * 6)
    )
    def sharded(*inputs):
        return forward_and_backward(*inputs)

    compiled = compile_for(target, sharded, *inputs, mesh=mesh)
    text = compiled.executable.as_text()
    assert all(name in text for name in KERNELS)
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", text)


def test_no_deprecation_reaches_the_user():
    code = """
import jax, jax.numpy as jnp
from pallas_kernels.gpu_targets import GPU_TARGETS, compile_for
from pallas_kernels.wkv7 import wkv7
inputs = [jnp.zeros((1, 16, 1, 16), jnp.bfloat16)] * 6
print(compile_for(GPU_TARGETS["l4"], wkv7, *inputs).executable.as_text())
"""
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", code]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "wkv7_forward" in run.stdout, run.stderr


def test_none_picks_this_kernel_where_it_runs():
    compiled = compile_for(GPU_TARGETS["l4"], wkv7, *arrays(ArgSpec(1, 32, 1, 16)))
    assert "wkv7_forward" in compiled.executable.as_text()


def test_none_leaves_to_xla_what_it_would_partition():
    target = GPU_TARGETS["h100"]
    mesh = device_mesh(target, count=2)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    inputs = arrays(ArgSpec(2, 32, 1, 16), sharding=sharding)
    compiled = compile_for(target, jax.jit(wkv7), *inputs, mesh=mesh)
    assert "wkv7_forward" not in compiled.executable.as_text()


def test_mapped_over_two_axes():
    inputs = [jax.ShapeDtypeStruct((2, 3, 1, 32, 1, 16), jnp.bfloat16)] * 6
    compiled = compile_for(GPU_TARGETS["a100"], jax.vmap(jax.vmap(backward)), *inputs)
    assert "wkv7_backward_chunks" in compiled.executable.as_text()


# The whole training step, as train builds it.


def test_the_step_with_the_kernels_is_planned_no_higher_than_with_the_xla_form(
    monkeypatch, tmp_path
):
    """The 0.1b step at micro_bsz 8, ctx_len 4096: for the H100 and the A100."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = TrainConfig(size="0.1b", ctx_len=4096, micro_bsz=8, devices=1)

    def needs() -> dict[str, memory.StepCost]:
        return {
            gpu: plans.plan(options, GPU_TARGETS[gpu], search=False).costs[8]
            for gpu in ("h100", "a100")
        }

    with jax.numpy_dtype_promotion("standard"):
        kernels = needs()
        jax.clear_caches()  # what was traced with the kernels
        monkeypatch.setattr(wkv7_api, "choose", lambda v: ("xla", "for comparison"))
        xla_form = needs()
    for gpu, need in kernels.items():
        assert need.total <= xla_form[gpu].total, (gpu, need, xla_form[gpu])
    assert kernels["h100"].total <= 6.5e9


# Memory traffic of the step below in MB with jax 0.10.2, by compute capability: what plan reports.
TRAFFIC = {(7, 5): 2581, (8, 0): 634, (8, 6): 634, (8, 9): 634, (9, 0): 664, (12, 0): 666}


# jax 0.10 does not look cards up by name: there, one of each compute capability shows as much.
PLANNED = (
    list(GPU_TARGETS)
    if jax.__version_info__ > (0, 10, 2)
    else list({target.compute_capability: card for card, target in GPU_TARGETS.items()}.values())
)


@pytest.mark.parametrize("card", PLANNED)
def test_every_card_is_planned_for_with_the_traffic_of_jax_0_10(card, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = TrainConfig(n_layer=2, n_embd=128, vocab_size=512, ctx_len=512, micro_bsz=4)
    target = GPU_TARGETS[card]
    with jax.numpy_dtype_promotion("standard"):
        need = plans.plan(options, target, search=False).costs[4]
    assert capfd.readouterr().err.startswith(f"compiling for {target.device_kind}, ")
    expected = TRAFFIC[target.compute_capability]
    assert need.traffic / 1e6 == pytest.approx(expected, rel=0.02)


def test_a_plan_for_a_t4_is_kept_on_disk(monkeypatch, tmp_path, capfd):
    """Its step takes the XLA form of wkv7: no kernel is compiled for compute capability 7.5."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = TrainConfig(n_layer=2, n_embd=128, vocab_size=512, ctx_len=64, micro_bsz=2)
    with jax.numpy_dtype_promotion("standard"):
        first = plans.plan(options, GPU_TARGETS["t4"], search=False)
        assert capfd.readouterr().err.startswith("compiling for Tesla T4, micro_bsz 2 … ")
        again = plans.plan(options, GPU_TARGETS["t4"], search=False)
        assert capfd.readouterr().err == ""
        (kept,) = tmp_path.rglob("plans/*.json")
        kept.write_text(kept.read_text()[:20])  # as a full disk leaves it
        anew = plans.plan(options, GPU_TARGETS["t4"], search=False).costs[2]
    assert first == again and first.largest == 2 and anew.total == first.costs[2].total
    need = first.costs[2]
    assert need.total > need.parameters + need.optimizer > 2 * need.parameters
    assert need.flops > 0 and need.traffic > 3 * need.parameters


def test_plan_leaves_the_users_cache_of_compiled_programs_alone(tmp_path):
    """What was compiled for a GPU that is not there cannot be loaded: jax warns when it tries."""
    for kept in ("first", "second"):  # no plan to find: it compiles the same program again
        environment = os.environ | {
            "XDG_CACHE_HOME": str(tmp_path / kept),
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        options = "--gpu t4 --n_layer 1 --n_embd 64 --vocab_size 256 --ctx_len 32 --micro_bsz 1"
        command = [sys.executable, "-m", "rwkv_jax.plan", *options.split()]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert run.returncode == 0 and run.stderr.count("\n") == 1, run.stderr
    assert not (tmp_path / "compiled").exists()


def test_the_loss_of_a_large_batch_and_its_gradients_stay_below_a_gigabyte():
    """Whole logits would take 8.6 GB in float32."""
    hidden = jax.ShapeDtypeStruct((8, 4096, 768), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((65536, 768), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((8, 4096), jnp.int32)
    loss = jax.value_and_grad(head_loss, (0, 1))
    compiled = compile_for(GPU_TARGETS["h100"], loss, hidden, head, targets)
    assert compiled.executable.memory_analysis().peak_memory_in_bytes < 1e9


def test_one_sum_of_a_step_has_no_order_and_the_flag_of_deterministic_gives_it_one():
    options = TrainConfig(n_layer=2, n_embd=64, vocab_size=512, ctx_len=64, micro_bsz=2)
    with jax.numpy_dtype_promotion("standard"):
        [name] = deterministic.unordered_sums(deterministic.step(options))
    shape = 512, 64, 2, 64
    gradients = {flags: deterministic.with_flags(flags, *shape) for flags in ("", DETERMINISTIC)}
    [alone] = gradients[""]["unordered_sums"]
    assert name.rpartition("/")[2] == alone.rpartition("/")[2] == "scatter-add"
    assert gradients[DETERMINISTIC]["unordered_sums"] == []
