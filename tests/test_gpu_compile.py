"""The kernels compiled for real GPUs, without one: what interpret mode cannot show."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.gpu_targets import (
    GPU_TARGETS,
    can_compile,
    compile_for,
    device_mesh,
    shared_memory,
)
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec

if not can_compile():
    pytest.skip("needs the GPU compiler of pallas_kernels.gpu_targets", allow_module_level=True)

DOCS = Path(__file__).parent.parent / "docs" / "wkv7-kernel.md"
KERNELS = ("wkv7_forward", "wkv7_backward_ends", "wkv7_backward_chunks")
# One card of each compute capability that the kernels know.
CARDS = ("a100", "a6000", "rtx4090", "h100", "rtx5090")


def arrays(spec: ArgSpec, dtype=jnp.bfloat16, **options) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(tuple(spec), dtype, **options)] * 6


def forward_and_backward(*inputs, **options):
    y, vjp = jax.vjp(functools.partial(wkv7, **options), *inputs)
    return y, vjp(y)


def backward(*inputs):
    return forward_and_backward(*inputs)[1]


@functools.cache
def kernels(card: str, spec: ArgSpec):
    return compile_for(GPU_TARGETS[card], forward_and_backward, *arrays(spec)).kernels


def row(card: str, size: int) -> str:
    found = kernels(card, ArgSpec(8, 4096, 12, size))
    cells = []
    for name in KERNELS:
        kernel = found[name]
        cells.append(f"{kernel.registers} / {kernel.spill_bytes} / {kernel.tensor_instructions}")
    return f"| {card} | {size} | " + " | ".join(cells) + " |"


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("card", CARDS)
def test_kernels_keep_to_their_registers_and_use_tensor_cores(card: str, size: int):
    found = kernels(card, ArgSpec(8, 4096, 12, size))
    assert set(KERNELS) <= set(found)
    for name in KERNELS:
        assert found[name].tensor_instructions >= 20, found[name]
        if size <= 64:
            assert found[name].spill_bytes <= 32, found[name]
    assert row(card, size) in DOCS.read_text(), f"docs/wkv7-kernel.md should say\n{row(card, size)}"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_other_dtypes_and_resets_compile(dtype):
    spec = ArgSpec(2, 40, 3, 64)
    reset = jax.ShapeDtypeStruct((2, 40), jnp.bool_)
    compiled = compile_for(
        GPU_TARGETS["rtx4090"],
        lambda reset, *x: forward_and_backward(*x, reset=reset),
        reset,
        *arrays(spec, dtype),
    )
    assert set(KERNELS) <= set(compiled.kernels)


def test_shared_memory_is_that_of_a_kernel_that_does_not_fit():
    forward = functools.partial(wkv7, implementation="pallas_triton")
    spec = ARG_SPECS["0.1b_micro_batch_8"]
    assert 8_000 < shared_memory(GPU_TARGETS["a100"], forward, *arrays(spec)) < 100_000


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
        return forward_and_backward(*inputs, implementation="pallas_triton")

    compiled = compile_for(target, sharded, *inputs, mesh=mesh)
    assert set(KERNELS) <= set(compiled.kernels)
    text = compiled.executable.as_text()
    assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", text)


def test_none_picks_this_kernel_where_it_runs():
    found = compile_for(GPU_TARGETS["l4"], wkv7, *arrays(ArgSpec(1, 32, 1, 16))).kernels
    assert "wkv7_forward" in found
