"""Lists the sums of a GPU step without a fixed order, and the cost of `--deterministic 1`.

    JAX_PLATFORMS=cpu python -m benchmarks.deterministic [--output PATH]

Compiles a training step for an H100, without a GPU, and lists the sums whose order is not fixed:
scatters whose indices may coincide, which a GPU adds atomically. Then compiles the only one, the
embedding's gradient, at the shape of 0.1b, micro_bsz 8, ctx_len 4096, with and without the flag of
`--deterministic 1`. Prints all of it as JSON. Needs the extra plan.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import command, machine
from pallas_kernels.gpu_targets import GPU_TARGETS, compile_for, device_mesh
from rwkv_jax.config import TrainConfig
from rwkv_jax.device.runtime import DETERMINISTIC
from rwkv_jax.errors import run_command
from rwkv_jax.model.rwkv7 import embed
from rwkv_jax.parallel import sharding
from rwkv_jax.planning import cost
from rwkv_jax.training.build import build_step, resolve_config
from rwkv_jax.training.optimizer import learning_rate, make_optimizer
from rwkv_jax.training.step import abstract_state, programs

TARGET = GPU_TARGETS["h100"]


def unordered_sums(hlo: str) -> list[str]:
    """The op_name of each scatter of a compiled program into places that may coincide."""
    scatters = [line for line in hlo.splitlines() if re.search(r"= \S+ scatter\(", line)]
    return [
        re.findall(r'op_name="([^"]*)"', line)[0]
        for line in scatters
        if "unique_indices=true" not in line
    ]


def step(options: TrainConfig) -> str:
    """The optimized HLO of the step that train would run on an H100."""
    there = list(device_mesh(TARGET).devices.flat)
    mesh = sharding.mesh_from_devices(there, sharding.data_axis_size("", 1))
    config = resolve_config(options, True, TARGET.compute_capability)
    model = config.model_config()
    optimizer = make_optimizer(config, learning_rate(config, model.n_embd, 0, 1e6))
    state = abstract_state(mesh, model, optimizer)
    shape = config.accumulate_grad_batches, config.micro_bsz, config.ctx_len + 1
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.batch_sharding(mesh))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        [part] = programs(build_step(config, model, mesh, optimizer), state, batch)
        lowered = part.function.lower(*part.arguments)
    return lowered.compile().as_text()


def embedding_gradient(rows: int, width: int, batch: int, time: int) -> dict[str, object]:
    """As XLA_FLAGS has it: bytes moved, bytes of temporary memory, unordered sums, sorts."""
    weight = jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    dy = jax.ShapeDtypeStruct((batch, time, width), jnp.bfloat16)

    def gradient(weight, tokens, dy):
        return jax.vjp(lambda weight: embed(weight, tokens), weight)[1](dy)

    compiled = compile_for(TARGET, gradient, weight, tokens, dy).executable
    text = compiled.as_text()
    return {
        "traffic_gb": cost.memory_traffic(text) / 1e9,
        "temporary_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "unordered_sums": unordered_sums(text),
        "sorts": len(re.findall(r" sort\(", text)),
    }


def with_flags(flags: str, *shape: int) -> dict[str, object]:
    """`embedding_gradient` in a process of its own: XLA reads its flags once."""
    command = [sys.executable, "-m", "benchmarks.deterministic", "--gradient", *map(str, shape)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, check=True
    )
    return json.loads(run.stdout)


def main() -> None:
    parser = command.record_parser(__doc__)
    parser.add_argument("--gradient", nargs=4, type=int, metavar="SIZE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.gradient:
        print(json.dumps(embedding_gradient(*arguments.gradient)))
        return
    options = TrainConfig(size="0.1b", n_layer=2, ctx_len=4096, micro_bsz=8)
    result = machine.record("deterministic") | {
        "compiled_for": TARGET.device_kind,
        "unordered_sums": unordered_sums(step(options)),
        "default": with_flags("", 65536, 768, 8, 4096),
        "deterministic": with_flags(DETERMINISTIC, 65536, 768, 8, 4096),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        machine.write(arguments.output, result)


if __name__ == "__main__":
    run_command(main)
