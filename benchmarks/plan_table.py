"""Generates the README's table of planned memory.

    JAX_PLATFORMS=cpu python -m benchmarks.plan_table \\
        --output benchmarks/results/plan.json README.md README.zh-CN.md

Compiles the step of every row of `ROWS`, a minute each, and prints the table. Needs the extra
`plan`.
"""

import dataclasses
import shlex
import sys
from pathlib import Path

import jax

from benchmarks import command, machine
from rwkv_jax.config import parse_train_options
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.files import written_whole
from rwkv_jax.planning.memory import GIB
from rwkv_jax.planning.plans import find_target, plan

ROOT = Path(__file__).parent.parent
READMES = ROOT / "README.md", ROOT / "README.zh-CN.md"
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
MARKERS = "<!-- python -m benchmarks.plan_table -->", "<!-- end of the table -->"

# GPU, micro_bsz, options; what the tutorial says of them, in GB.
ROWS: list[tuple[str, int, str, str]] = [
    ("h100", 8, "--size 0.1b", "23.08"),
    ("h100", 6, "--size 0.4b", "22.51"),
    ("h100", 1, "--size 1.5b", "41.12"),
    ("h100", 1, "--size 2.9b", "89.21"),
    (
        "rtx4090",
        1,
        "--size 7.2b --devices 4 --strategy deepspeed_stage_3_offload",
        "out of memory",
    ),
    ("h100", 1, "--size 13.3b --devices 8 --strategy deepspeed_stage_3", ""),
    ("h100", 1, "--size 13.3b --num_nodes 16 --devices 8 --strategy deepspeed_stage_3", ""),
]


def main() -> None:
    outputs = command.tables_parser(__doc__).parse_args().output
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_traceback_in_locations_limit", 0)  # as `rwkv_jax.plan` sets it
    rows, records = [], []
    for gpu, micro_bsz, options, tutorial in ROWS:
        print(f"{options}: ", end="", file=sys.stderr, flush=True)
        arguments = [*options.split(), "--ctx_len", "4096", "--micro_bsz", str(micro_bsz)]
        target = find_target(gpu)
        need = plan(parse_train_options(arguments)[0], target, search=False).costs[micro_bsz]
        rows.append(
            f"| {options} | {micro_bsz} | {target.device_kind} | {need.total / GIB:.1f} | "
            f"{tutorial or '–'} |"
        )
        record = {"gpu": gpu, "options": shlex.join(arguments), "total": need.total}
        records.append({**record, **dataclasses.asdict(need)})
    print("\n".join(rows))
    for path in outputs:
        if path.suffix != ".md":
            machine.write(path, records)
            continue
        before, start, rest = path.read_text(encoding="utf-8").partition(MARKERS[0])
        table, end, after = rest.partition(MARKERS[1])
        if not end:
            raise UserError(f"{path}: no place for the table between {' and '.join(MARKERS)}")
        head = table.strip("\n").splitlines()[:2]
        with written_whole(path) as temporary:
            text = "\n".join((before + start, "", *head, *rows, "", end)) + after
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
