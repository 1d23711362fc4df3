"""Predicts a WKV-7 kernel's cycles a chunk from its machine code, for want of a GPU.

    JAX_PLATFORMS=cpu python benchmarks/wkv7_sass_estimate.py [h100 rtx4090 …]

The SASS of a kernel's main loop is replayed in order, with one warp of every program on each of a
core's four schedulers: the assembler's own stall counts, scoreboard waits and barriers, and the
latencies and issue rates of `unit`. Global loads count as prefetched where they are `cp.async`.

Not calibrated: no figure here was compared with a GPU's. What an instruction's encoding says of its
scheduling, and that shared memory answers after about 30 cycles, is from Jia et al., Dissecting the
NVIDIA Volta GPU Architecture via Microbenchmarking (arXiv 1804.06826); that mma and wgmma take some
30 cycles, and mma.sync reaches three fifths of Hopper's peak, from Luo et al., Benchmarking and
Dissecting the Nvidia Hopper GPU Architecture (arXiv 2402.13499, 2501.12084), rounded. How long a
tensor core is held follows from the vendor's dense bf16 rate with float32 sums.
Needs the packages of `pallas_kernels.gpu_targets` and a `cuobjdump` on the PATH (it comes in the
triton wheel too: triton/backends/nvidia/bin).
"""

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gpu_targets import GPU_TARGETS, assemble, compile_for
from pallas_kernels.wkv7 import wkv7
from pallas_kernels.wkv7.arg_specs import ARG_SPECS

REPEATS = 8  # passes of each program, averaged
# Cycles that a 16×8×16 mma holds one of a core's four tensor cores; half the rate on GeForce.
MMA_CYCLES = {"a100": 8, "h100": 4, "a6000": 16, "l4": 16, "pro6000": 16}
GEFORCE_MMA_CYCLES = 32


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


def unit(name: str, mma_cycles: int) -> tuple[str, int, int]:
    """(unit, cycles it is held, cycles to the result), as one of a core's four schedulers sees it.

    Shared memory serves the four in turn, 128 bytes a cycle.
    """
    if name.startswith("HGMMA"):
        width = int(re.findall(r"64x(\d+)x", name)[0])
        return "tensor", max(width // 2, 16), max(width // 2, 16) + 30
    wide = 4 if re.search(r"128|\.4", name) else 2 if re.search(r"\.64|\.2$", name) else 1
    units = {
        "HMMA": ("tensor", mma_cycles, 33),
        "LDSM": ("memory", 4 * wide, 33),
        "LDS": ("memory", 4 * wide, 30),
        "STSM": ("memory", 4 * wide, 25),
        "STS": ("memory", 4 * wide, 25),
        "SHFL": ("memory", 4, 24),
        "MUFU": ("special", 8, 24),
        "F2F": ("special", 8, 24),
        "LDGSTS": ("memory", 16, 30),
        "LDG": ("memory", 16, 500),
        "STG": ("memory", 16, 30),
    }
    match = re.match("|".join(sorted(units, key=len, reverse=True)), name)
    return units[match[0]] if match else ("", 1, 20)


def cycles(loop: list[Instruction], programs: int, mma_cycles: int) -> int:
    """Cycles until every program on a core has gone through the loop once, on average."""
    traits = [unit(x.name, mma_cycles) for x in loop]
    warps = [{"at": 0, "time": 0, "boards": [0] * 8, "wgmma": 0} for _ in range(programs)]
    free: Counter[str] = Counter()
    clock = 0

    def ready(warp) -> int:
        instruction, (name, _, _) = loop[warp["at"] % len(loop)], traits[warp["at"] % len(loop)]
        times = [x for i, x in enumerate(warp["boards"][:6]) if instruction.waits >> i & 1]
        if instruction.name.startswith("WARPGROUP.DEPBAR"):
            times.append(warp["wgmma"])
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
        boards = warp["boards"]
        boards[instruction.sets_on_result] = max(
            boards[instruction.sets_on_result], start + latency
        )
        boards[instruction.sets_on_read] = max(
            boards[instruction.sets_on_read], start + max(held, 10)
        )
        barrier = 20 if instruction.name.startswith("BAR") else 0
        warp["time"] = start + max(1, instruction.stall) + barrier
        clock = start + 1
        warp["at"] += 1
    return clock // REPEATS


def disassemble(card: str) -> dict[str, str]:
    """SASS by kernel, of forward and backward at the 0.1b's shape."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        sys.exit("error: cuobjdump is not on the PATH: see this file's docstring")
    inputs = [jax.ShapeDtypeStruct(tuple(ARG_SPECS["0.1b_micro_batch_8"]), jnp.bfloat16)] * 6

    def forward_and_backward(*inputs):
        y, vjp = jax.vjp(functools.partial(wkv7, implementation="pallas_triton"), *inputs)
        return y, vjp(y)

    target = GPU_TARGETS[card]
    found = {}
    for ptx in compile_for(target, forward_and_backward, *inputs).ptx:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            assemble(target, ptx, cubin)
            command = [tool, "-sass", str(cubin)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for part in text.split("Function : ")[1:]:
            found[part.split()[0]] = part
    return found


def main() -> None:
    for card in sys.argv[1:] or ["h100", "rtx4090"]:
        mma_cycles = MMA_CYCLES.get(card, GEFORCE_MMA_CYCLES)
        for kernel, sass in disassemble(card).items():
            if kernel.startswith("wkv7"):
                loop = main_loop(parse(sass))
                replayed = [cycles(loop, programs, mma_cycles) for programs in (1, 2, 3)]
                print(
                    f"{card} {kernel}: {len(loop)} instructions, "
                    f"cycles for 1, 2, 3 programs a core: {replayed}"
                )


if __name__ == "__main__":
    main()
