"""What a measurement was made on: every result file under `results/` carries it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "rwkv")


def describe() -> dict[str, object]:
    """CPU name, cores usable by this process, memory in GiB, Python and package versions."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "packages": {name: v for name in PACKAGES if (v := installed(name)) is not None},
    }


def cpu_name() -> str:
    """The model name and the widest vector unit, which decides how fast matrix products are."""
    info: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    flags = info.get("flags", "").split()
    vector = next((f for f in ("avx512f", "avx2", "avx") if f in flags), "no avx")
    return f"{info.get('model name', platform.machine())} ({vector})"


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
