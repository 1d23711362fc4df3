"""Predicts the cycles per chunk of WKV-7 kernels from machine code, without a GPU.

    python -m benchmarks.wkv7_sass_estimate FILE.ptx CARD [--output PATH]

The SASS of a kernel's main loop is replayed in order, with one warp of every program on each of a
core's four schedulers: the assembler's own stall counts, scoreboard waits and barriers, and the
latencies and rates of `Costs` and `unit`. `benchmarks.wkv7_designs` writes what comes out.

Where each figure is from:
- an encoding's scheduling bits: Jia et al., arXiv 1804.06826, the section on control information;
- shared memory after 30 cycles: Luo et al., arXiv 2402.13499 and 2501.12084, memory latencies of
  Ampere, Ada and Hopper (29), rounded; ldmatrix and mma after 33: Sun et al., arXiv 2206.02874,
  completion latencies on Ampere, and Luo et al. for mma and wgmma on Hopper, rounded;
- mma.sync at three fifths of Hopper's peak: Luo et al.; how long a tensor core is held otherwise:
  the vendor's dense bf16 rate with float32 sums;
- 16 special functions and single conversions a cycle and core, 64 results of the integer pipe (of
  which F2FP is one: the compiler gives it no scoreboard), 32 of shuffles: CUDA C++ Best Practices
  Guide, "Throughput of Native Arithmetic Instructions", 8.0 to 9.0;
- a special function after 23 cycles: Accel-Sim's configurations SM80_A100 and SM90_H100
  (github.com/accel-sim/accel-sim-framework, trace_opcode_latency_initiation_sfu);
- a shuffle after 25 cycles and a barrier of four warps after 29: Burtchell and Burtscher, IISWC
  2024, their A100's logs (github.com/burtscher/SyncPerformance, results/system2);
- global memory: the table of github.com/markdewing/AI_kernels, latency/README.md.

Calibrated on one kernel with published times: wind_rwkv's chunked_cuda (github.com/mshakerinava/
wind_rwkv, compiled by NVRTC 12.9 with -D_C_=64 --use_fast_math for compute_90a and compute_80),
which has this shape of program and no prefetching. docs/log.md says how far off it is.

Needs the packages of `pallas_kernels.gpu_targets` and a `cuobjdump` on the PATH (it comes in the
triton wheel too: triton/backends/nvidia/bin).
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from benchmarks import command, machine
from pallas_kernels.gpu_targets import GPU_TARGETS, GpuTarget, assemble
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.files import reporting_os_errors

REPEATS = 8  # passes of each program, averaged
CLOCK_GHZ = {"h100": 1.755}  # under load; the others' of GPU_TARGETS
MEMORY_CYCLES = {"a100": 550, "h100": 700, "rtx4090": 636}
# Cycles that a 16×8×16 mma holds one of a core's four tensor cores; half the rate on GeForce.
MMA_CYCLES = {"a100": 8, "h100": 4, "rtx4090": 32}


class Instruction(NamedTuple):
    """One SASS instruction; bits 105 … 122 of its encoding say how it is scheduled."""

    address: int
    text: str
    name: str
    stall: int
    sets_on_result: int  # scoreboard, 7 for none
    sets_on_read: int
    waits: int  # mask of scoreboards


def parse(sass: str) -> list[Instruction]:
    lines = sass.splitlines()
    found = []
    for line, following in zip(lines, lines[1:], strict=False):
        match = re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/", line)
        if match:
            text = match[2].strip()
            name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
            control = int(re.findall(r"0x([0-9a-f]{16})", following)[0], 16) >> 41
            fields = (control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63)
            found.append(Instruction(int(match[1], 16), text, name, *fields))
    return found


def main_loop(code: list[Instruction]) -> list[Instruction]:
    """The longest backward branch's body; all of the code where there is none."""
    spans = [
        (int(target[1], 16), x.address)
        for x in code
        if x.name.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", x.text))
    ]
    first, last = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    return [x for x in code if first <= x.address <= last] if last > first else code


class Costs(NamedTuple):
    """Cycles; this file's docstring has the sources."""

    memory: int  # to what a load from global memory brings
    mma_held: int
    alu_held: int = 2  # a scheduler's part of the integer pipe, by one instruction
    special: int = 23  # to the result of an exponential, a reciprocal or a single conversion
    special_held: int = 8
    shuffle: int = 25
    shared: int = 30
    matrix: int = 33  # to the result of ldmatrix and of an mma
    wgmma: int = 30  # to its result, after it held the tensor core for half its width
    barrier: int = 29  # of four warps


def costs_of(card: str) -> Costs:
    return Costs(MEMORY_CYCLES[card], MMA_CYCLES[card])


ALU = "F2FP IADD3 IMNMX ISETP FMNMX FSEL FSETP LEA LOP3 PLOP3 PRMT SEL SHF VIADD".split()


def unit(name: str, costs: Costs) -> tuple[str, int, int]:
    """(unit, cycles it is held, cycles to the result), as one of a core's four schedulers sees it.

    Shared memory serves the four in turn, 128 bytes a cycle.
    """
    base = name.split(".")[0]
    if base == "HGMMA":
        width = int(re.findall(r"64x(\d+)x", name)[0])
        return "tensor", max(width // 2, 16), max(width // 2, 16) + costs.wgmma
    if base in ALU:  # their latency is in the compiler's stall counts
        return "alu", costs.alu_held, 0
    wide = 4 if re.search(r"128|\.4", name) else 2 if re.search(r"\.64|\.2$", name) else 1
    units = {
        "HMMA": ("tensor", costs.mma_held, costs.matrix),
        "LDSM": ("memory", 4 * wide, costs.matrix),
        "LDS": ("memory", 4 * wide, costs.shared),
        "STSM": ("memory", 4 * wide, costs.shared),
        "STS": ("memory", 4 * wide, costs.shared),
        "SHFL": ("memory", 4, costs.shuffle),
        "MUFU": ("special", costs.special_held, costs.special),
        "F2F": ("special", costs.special_held, costs.special),
        "LDGSTS": ("memory", 16, costs.shared),
        "LDG": ("memory", 16, costs.memory),
        "STG": ("memory", 16, costs.shared),
    }
    return units.get(base, ("", 1, 20))


def cycles(loop: list[Instruction], programs: int, costs: Costs, prefetched: bool = True) -> int:
    """Cycles until every program on a core has gone through the loop once, on average.

    `prefetched`: what `cp.async` loads is there when it is waited for.
    """
    traits = [unit(x.name, costs) for x in loop]
    warps = [
        {"at": 0, "time": 0, "boards": [0] * 8, "wgmma": 0, "copies": 0} for _ in range(programs)
    ]
    free: Counter[str] = Counter()
    clock = 0

    def ready(warp) -> int:
        instruction, (name, _, _) = loop[warp["at"] % len(loop)], traits[warp["at"] % len(loop)]
        times = [x for i, x in enumerate(warp["boards"][:6]) if instruction.waits >> i & 1]
        if instruction.name.startswith("WARPGROUP.DEPBAR"):
            times.append(warp["wgmma"])
        if instruction.name.startswith("DEPBAR") and not prefetched:
            times.append(warp["copies"])
        return max([clock, warp["time"], free[name] if name else 0, *times])

    while unfinished := [x for x in warps if x["at"] < REPEATS * len(loop)]:
        warp = min(unfinished, key=ready)
        start = ready(warp)
        instruction = loop[warp["at"] % len(loop)]
        name, held, latency = traits[warp["at"] % len(loop)]
        if name:
            free[name] = start + held
        if instruction.name.startswith("HGMMA"):
            warp["wgmma"] = max(warp["wgmma"], start + latency)
        if instruction.name.startswith("LDGSTS"):
            warp["copies"] = start + costs.memory
        boards = warp["boards"]
        boards[instruction.sets_on_result] = max(
            boards[instruction.sets_on_result], start + latency
        )
        boards[instruction.sets_on_read] = max(
            boards[instruction.sets_on_read], start + max(held, 10)
        )
        held_up = costs.barrier if instruction.name.startswith("BAR") else 1
        warp["time"] = start + max(held_up, instruction.stall)
        clock = start + 1
        warp["at"] += 1
    return clock // REPEATS


def loops(target: GpuTarget, ptx: str) -> dict[str, list[Instruction]]:
    """The main loop of every kernel in a PTX file."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        raise UserError("cuobjdump is not on the PATH (--help says where it comes from)")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        assemble(target, ptx, cubin)
        command = [tool, "-sass", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {part.split()[0]: main_loop(parse(part)) for part in text.split("Function : ")[1:]}


def replays(loop: list[Instruction], costs: Costs, prefetched: bool = True) -> list[int]:
    """`cycles` with one, two, three and four programs on a core."""
    return [cycles(loop, programs, costs, prefetched) for programs in (1, 2, 3, 4)]


def resident(registers: int, warps: int = 4) -> int:
    """Programs that a core's registers hold at a time; at most four are looked at."""
    return min(4, 65536 // (32 * warps * -(-registers // 8) * 8))


def in_rounds(programs: int, cores: int, fit: int, cycles: list[int]) -> int:
    """Cycles that a pass of so many programs takes, `fit` on a core at a time."""
    full, rest = divmod(programs, cores * fit)
    last = cycles[-(-rest // cores) - 1] if rest else 0
    return full * cycles[fit - 1] + last


def main() -> None:
    parser = command.record_parser(__doc__)
    parser.add_argument("ptx", type=Path, metavar="FILE.ptx", help="kernels, run at 512 programs")
    parser.add_argument(
        "card", choices=list(MEMORY_CYCLES), help=f"one of {', '.join(MEMORY_CYCLES)}"
    )
    options = parser.parse_args()
    card, rows, total = options.card, [], 0.0
    with reporting_os_errors(options.ptx, "read"):
        ptx = options.ptx.read_text()
    target = GPU_TARGETS[card]
    clock = CLOCK_GHZ.get(card, target.clock_ghz)
    with tempfile.TemporaryDirectory() as folder:
        report = assemble(target, ptx, Path(folder) / "kernels.cubin")
    for name, loop in loops(target, ptx).items():
        registers = int(re.findall(rf"function '{name}'.*?Used (\d+) reg", report, re.DOTALL)[0])
        counts = replays(loop, costs_of(card), prefetched=False)
        turn = in_rounds(512, target.core_count, resident(registers), counts)
        total += (milliseconds := turn * 4096 / 16 / clock / 1e6)
        print(f"{name}: {counts} cycles a chunk, {registers} registers, {milliseconds:.2f} ms")
        rows.append({"kernel": name, "cycles": counts, "registers": registers, "ms": milliseconds})
    print(f"B8 T4096 H64 in chunks of 16: {total:.1f} ms")
    if options.output:
        record = machine.record("wkv7_sass_estimate") | {"card": card, "ms": total, "rows": rows}
        machine.write(options.output, record)


if __name__ == "__main__":
    run_command(main)
