"""Predicts WKV-7 kernels' cycles a chunk from their machine code, for want of a GPU.

    JAX_PLATFORMS=cpu python -m benchmarks.wkv7_sass_estimate

The SASS of a kernel's main loop is replayed in order, with one warp of every program on each of a
core's four schedulers: the assembler's own stall counts, scoreboard waits and barriers, and the
latencies and issue rates of `unit`. Global loads count as prefetched where they are `cp.async`.
Writes two tables into their places in docs/wkv7-kernel.md: the kernels as they are, and the other
designs that `DESIGNS` makes of them.

Not calibrated: no figure here was compared with a GPU's. What it assumes, and from where:
- an encoding's scheduling bits: Jia et al., arXiv 1804.06826, the section on control information;
- shared memory after 30 cycles: Luo et al., arXiv 2402.13499 and 2501.12084, memory latencies of
  Ampere, Ada and Hopper, rounded; ldmatrix and mma after 33: Sun et al., arXiv 2206.02874,
  completion latencies on Ampere, and Luo et al. for mma and wgmma on Hopper, rounded;
- mma.sync at three fifths of Hopper's peak: Luo et al.; how long a tensor core is held otherwise:
  the vendor's dense bf16 rate with float32 sums;
- other global loads after 500 cycles: between the L2's 281 (GH200) or 296 (RTX 4090) and the
  memory's 690 or 636 in the table of github.com/markdewing/AI_kernels, latency/README.md;
- shuffles, special functions, barriers: our own guesses.

Needs the packages of `pallas_kernels.gpu_targets` and a `cuobjdump` on the PATH (it comes in the
triton wheel too: triton/backends/nvidia/bin).
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks.wkv7_compiled import DOCS, KERNELS, Row, compiled, replace
from pallas_kernels.gpu_targets import GPU_TARGETS, assemble
from pallas_kernels.wkv7 import pallas_triton
from pallas_kernels.wkv7.arg_specs import ARG_SPECS

CARDS = ("h100", "rtx4090")
CLOCK_GHZ = {"h100": 1.755}  # under load; the others' of GPU_TARGETS
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


def replay(card: str) -> dict[str, tuple[list[int], int]]:
    """By kernel: cycles a chunk of one, two and three programs on a core; bytes of spill."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        sys.exit("error: cuobjdump is not on the PATH: see this file's docstring")
    target, found = GPU_TARGETS[card], {}
    mma_cycles = MMA_CYCLES.get(card, GEFORCE_MMA_CYCLES)
    made = compiled(Row(card, 64, False))
    for ptx in made.ptx:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            assemble(target, ptx, cubin)
            command = [tool, "-sass", str(cubin)]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for part in text.split("Function : ")[1:]:
            name = part.split()[0]
            if name in KERNELS:
                loop = main_loop(parse(part))
                counts = [cycles(loop, programs, mma_cycles) for programs in (1, 2, 3)]
                found[name] = counts, made.kernels[name].spill_bytes
    return found


@contextlib.contextmanager
def design(**changes) -> Iterator[None]:
    """pallas_triton with other values of its constants; what was compiled is forgotten."""
    kept = {name: getattr(pallas_triton, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(pallas_triton, name, value)
        compiled.cache_clear()
        jax.clear_caches()
        yield
    finally:
        for name, value in kept.items():
            setattr(pallas_triton, name, value)
        compiled.cache_clear()
        jax.clear_caches()


def _tunings(**values) -> dict:
    tuning = pallas_triton.Tuning(**({"warps": 4} | values))
    return {(major, 64, False): tuning for major in (8, 9, 12)}


DESIGNS = {
    "as they are": {},
    "chunks of 32, states every 32": {"TUNING": _tunings(chunk_length=32, chunks=8, stages=2)},
    "third kernel: one chunk a program, plain loads": {"TUNING": _tunings()},
    "tiles loaded again, as at N = 128": {
        "TUNING": _tunings(chunks=8, stages=2, reload_sequential=True, reload_gradients=True)
    },
}


def floors(card: str, replayed: dict, chunk: int) -> list[tuple[float, float]]:
    """(µs by bytes, µs by chain) of each of KERNELS at the 0.1b's shape, micro_bsz 8."""
    spec, target = ARG_SPECS["0.1b_micro_batch_8"], GPU_TARGETS[card]
    clock = 1e3 * CLOCK_GHZ.get(card, target.clock_ghz)
    heads, vector, state = spec.batch * spec.head, 2 * spec.size, 2 * spec.size**2 / chunk
    moved = (7 * vector + state, 5 * vector + state, 13 * vector + 2 * state)
    in_turn = -(-heads // target.core_count)
    found = []
    for name, count in zip(KERNELS, moved, strict=True):
        by_bytes = heads * spec.time * count / target.bandwidth_gb_s / 1e3
        one, two, _ = replayed[name][0]
        chunks = spec.time / chunk
        parallel = name == "wkv7_backward_chunks"
        chain = heads / target.core_count * two / 2 if parallel else in_turn * one
        found.append((by_bytes, chunks * chain / clock))
    return found


def main() -> None:
    now = ["| kernel | card | cycles a chunk: 1, 2, 3 programs a core | bytes / chain, µs |"]
    others = ["| design | card | cycles for 16 tokens, spill | larger floors, µs | sum |"]
    now.append("|---" * 4 + "|")
    others.append("|---" * 5 + "|")
    for name, changes in DESIGNS.items():
        chunk = 32 if "32" in name else 16
        with design(**changes):
            for card in CARDS:
                try:
                    replayed = replay(card)
                except jax.errors.JaxRuntimeError as error:
                    others.append(f"| {name} | {card} | {str(error).splitlines()[0]} | | |")
                    continue
                pairs = floors(card, replayed, chunk)
                if not changes:
                    for kernel, (by_bytes, chain) in zip(KERNELS, pairs, strict=True):
                        counts = ", ".join(map(str, replayed[kernel][0]))
                        now.append(
                            f"| {kernel} | {card} | {counts} | {by_bytes:.0f} / {chain:.0f} |"
                        )
                per_16 = (
                    f"{replayed[x][0][x == KERNELS[2]] * 16 // chunk} ({replayed[x][1]} B)"
                    for x in KERNELS
                )
                larger = [max(pair) for pair in pairs]
                each = " + ".join(f"{x:.0f}" for x in larger)
                others.append(
                    f"| {name} | {card} | {', '.join(per_16)} | {each} | {sum(larger):.0f} |"
                )
                print(others[-1], flush=True)
    replace(DOCS, "floors", "\n".join(now))
    replace(DOCS, "designs", "\n".join(others))


if __name__ == "__main__":
    main()
