"""Compiles the WKV-7 kernels for every card without a GPU: registers, spills, shared memory.

    JAX_PLATFORMS=cpu python -m benchmarks.wkv7_compiled \\
        --output docs/wkv7-kernel.md benchmarks/results/compiled_kernels.json

Compiles forward and backward for every row of `ROWS`, a few seconds each, and prints the record.
--output writes the record of this jax and this assembler beside those of other stacks, and its
tables into the page. tests/kernels/test_gpu_compile.py fails when a compilation differs from its
record. Needs the packages of `pallas_kernels.gpu_targets`.
"""

import functools
import itertools
import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import command
from pallas_kernels.gpu_targets import GPU_TARGETS, Compiled, compile_for, ptxas
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.arg_specs import ArgSpec
from rwkv_jax.errors import run_command
from rwkv_jax.files import written_whole

DOCS = Path(__file__).parent.parent / "docs" / "wkv7-kernel.md"
RESULTS = Path(__file__).parent / "results" / "compiled_kernels.json"
KERNELS = ("wkv7_forward", "wkv7_backward_ends", "wkv7_backward_chunks")
# One card of each compute capability that the kernels know.
CARDS = ("a100", "a6000", "rtx4090", "h100", "rtx5090")


class Row(NamedTuple):
    """A card, a head size, and whether states are reset."""

    card: str
    size: int
    resets: bool


ROWS = [
    *(Row(card, size, r) for size in (64, 128) for r in (False, True) for card in CARDS),
    *(Row(card, size, False) for card, size in itertools.product(("rtx4090", "h100"), (32, 16))),
]


@functools.cache
def compiled(row: Row) -> Compiled:
    """Forward and backward in bfloat16, at the shape of 0.1b but for the head size."""
    tokens = [jax.ShapeDtypeStruct(tuple(ArgSpec(8, 4096, 12, row.size)), jnp.bfloat16)] * 6
    reset = jax.ShapeDtypeStruct((8, 4096), jnp.bool_) if row.resets else None

    def forward_and_backward(reset, *tokens):
        op = functools.partial(wkv7, reset=reset, implementation="pallas_triton")
        y, vjp = jax.vjp(op, *tokens)
        return y, vjp(y)

    return compile_for(GPU_TARGETS[row.card], forward_and_backward, reset, *tokens)


def record(row: Row) -> dict[str, Any]:
    """The row, and of each kernel the registers and bytes of spill of a thread, the tensor-core
    instructions in its PTX, and the KiB of shared memory of a block.
    """
    found = row._asdict()
    for name in KERNELS:
        kernel = compiled(row).kernels[name]
        found[name] = {
            "registers": kernel.registers,
            "spill": kernel.spill_bytes,
            "tensor": kernel.tensor_instructions,
            "shared_kib": round(kernel.shared_bytes / 1024),
        }
    return found


@functools.cache
def stack() -> str:
    """This jax and this assembler: other versions allocate registers in other ways."""
    words = subprocess.run([str(ptxas()), "--version"], capture_output=True, text=True).stdout
    (release,) = re.findall(r"release (\S+),", words)
    return f"jax {jax.__version__}, ptxas {release}"


def line(row: dict[str, Any]) -> str:
    cells = [" / ".join(map(str, row[name].values())) for name in KERNELS]
    return f"| {' | '.join([row['card'], *cells])} |"


def newest_table(results: dict[str, list]) -> str:
    """Every card with N = 64 and no resets, of the stack that the record has last."""
    name, rows = list(results.items())[-1]
    lines = [f"| {name} | {' | '.join(KERNELS)} |", "|---" * (1 + len(KERNELS)) + "|"]
    return "\n".join(lines + [line(x) for x in rows if x["size"] == 64 and not x["resets"]])


def spill_table(results: dict[str, list]) -> str:
    """The kernel that spills most, of each stack."""
    lines = ["| stack | compiled | largest spill, bytes a thread | where |", "|---" * 4 + "|"]
    for name, rows in results.items():
        row, kernel = max(
            itertools.product(rows, KERNELS), key=lambda pair: pair[0][pair[1]]["spill"]
        )
        where = f"{kernel}, {row['card']}, N = {row['size']}{', reset' if row['resets'] else ''}"
        count = len(rows) * len(KERNELS)
        lines.append(f"| {name} | {count} kernels | {row[kernel]['spill']} | {where} |")
    return "\n".join(lines)


TABLES = {"compiled": newest_table, "spills": spill_table}


def replace(path: Path, name: str, text: str) -> None:
    """Puts text between the markers of this name in a Markdown file."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = path.read_text("utf-8").split(begin)
    with written_whole(path) as temporary:
        temporary.write_text(before + begin + text + "\n" + end + rest.split(end)[1], "utf-8")


def write(path: Path, results: dict[str, list]) -> None:
    """Writes the record, a row per line."""
    stacks = [
        f" {json.dumps(name)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for name, rows in results.items()
    ]
    with written_whole(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(stacks) + "\n}\n", "utf-8")


def main() -> None:
    outputs = command.tables_parser(__doc__).parse_args().output
    results = json.loads(RESULTS.read_text("utf-8"))
    results[stack()] = rows = []
    for row in ROWS:
        rows.append(record(row))
        print(json.dumps(rows[-1]), flush=True)
    for path in outputs:
        if path.suffix == ".md":
            for name, table in TABLES.items():
                replace(path, name, table(results))
        else:
            write(path, results)


if __name__ == "__main__":
    run_command(main)
