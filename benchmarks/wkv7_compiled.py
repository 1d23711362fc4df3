"""What the compiler makes of the WKV-7 kernels, card by card, without a GPU: a table for the docs.

    JAX_PLATFORMS=cpu python -m benchmarks.wkv7_compiled --output docs/wkv7-kernel.md

Compiles forward and backward for every row of `ROWS` and prints the table; with --output the table
of this jax and this assembler is written into its place in the page. tests/test_gpu_compile.py
fails when the two differ. A few seconds a row. Needs the packages of `pallas_kernels.gpu_targets`.
"""

import functools
import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import command
from pallas_kernels.gpu_targets import GPU_TARGETS, Compiled, compile_for, ptxas
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.arg_specs import ArgSpec
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.files import written_whole

DOCS = Path(__file__).parent.parent / "docs" / "wkv7-kernel.md"
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


def line(row: Row) -> str:
    """Registers / bytes of spill / tensor-core instructions / KiB of shared memory, by kernel."""
    cells = [row.card, f"{row.size}, reset" if row.resets else str(row.size)]
    for name in KERNELS:
        kernel = compiled(row).kernels[name]
        shared = f"{kernel.shared_bytes / 1024:.0f}"
        figures = (kernel.registers, kernel.spill_bytes, kernel.tensor_instructions, shared)
        cells.append(" / ".join(str(x) for x in figures))
    return f"| {' | '.join(cells)} |"


@functools.cache
def table_name() -> str:
    """Of this jax and this assembler: other versions allocate registers in other ways."""
    words = subprocess.run([str(ptxas()), "--version"], capture_output=True, text=True).stdout
    (release,) = re.findall(r"release (\S+),", words)
    return f"compiled by jax {jax.__version__}, ptxas {release}"


def replace(path: Path, name: str, text: str) -> None:
    """Puts text between the markers of this name in a Markdown file."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, rest = path.read_text("utf-8").split(begin)
    with written_whole(path) as temporary:
        temporary.write_text(before + begin + text + "\n" + end + rest.split(end)[1], "utf-8")


def main() -> None:
    pages = command.tables_parser(__file__, __doc__).parse_args().output
    for page in pages:
        if f"<!-- {table_name()}: begin -->" not in page.read_text("utf-8"):
            raise UserError(f"add <!-- {table_name()}: begin --> and … end --> to {page}")
    lines = [f"| card | N | {' | '.join(KERNELS)} |", "|---" * (2 + len(KERNELS)) + "|"]
    for row in ROWS:
        lines.append(line(row))
        print(lines[-1], flush=True)
    for page in pages:
        replace(page, table_name(), "\n".join(lines))


if __name__ == "__main__":
    run_command(main)
