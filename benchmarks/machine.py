"""Describes the machine of a measurement, and writes records.

    python -m benchmarks.machine [--output PATH]

Prints it, with what jax sees of a GPU and whether that works.

A record is {"benchmark", "machine", "commit", "date", …, "rows"}; units are in the names of the
keys. Of a GPU it is NAME_<card>.json.
"""

import datetime
import json
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks import command
from rwkv_jax.device.nvidia import ask_nvidia_smi
from rwkv_jax.errors import UserError, run_command
from rwkv_jax.files import reporting_os_errors, written_whole

PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint",
    "tensorstore", "ml_dtypes", "numpy", "torch", "triton", "rwkv", "pytest", "pytest-xdist",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """CPU name, cores usable by this process, memory in GiB, Python and package versions.

    With `gpu` where nvidia-smi lists one: name, count, driver, memory_mib.
    """
    gpus, _ = ask_nvidia_smi()
    described = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "packages": {name: v for name in PACKAGES if (v := installed(name)) is not None},
    }
    if gpus:
        described["gpu"] = {
            "name": gpus[0].name,
            "count": len(gpus),
            "driver": gpus[0].driver,
            "memory_mib": gpus[0].memory,
        }
    return described


def record(benchmark: str) -> dict[str, Any]:
    """The head of a file of results: what was run, on what, of which commit, on which day (UTC)."""
    return {
        "benchmark": benchmark,
        "machine": describe(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def commit() -> str:
    """Of this checkout, with a + where it has changes; "" where git does not know it."""
    command = ["git", "describe", "--always", "--abbrev=7", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write(path: Path, record: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Writes a record whole, in place of what is there.

    Raises:
        UserError: it cannot be written.
    """
    with reporting_os_errors(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def card(device_kind: str) -> str:
    """A device's name as part of a file's: `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"\W+", "_", device_kind).strip("_").lower()


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


def main() -> None:
    """Prints what is here, and what jax sees and computes with; --output writes it as well."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.wkv7.api import choose
    from rwkv_jax.device.runtime import prepare_jax

    path = command.record_parser(__doc__, "write it (JSON) here").parse_args().output
    described = describe()
    print(json.dumps(described, indent=1))
    prepare_jax()
    device = jax.devices()[0]
    product = jnp.ones((1024, 1024), jnp.bfloat16)
    if float((product @ product)[0, 0]) != 1024:
        raise UserError(f"{device.device_kind}: a product of matrices is wrong")
    v = jax.ShapeDtypeStruct((8, 4096, 12, 64), jnp.bfloat16)
    print(f"jax sees {jax.device_count()} x {device.device_kind}; WKV by {choose(v)[0]}")
    if "gpu" in described and device.platform != "gpu":
        raise UserError("nvidia-smi lists a GPU and jax sees none; run python -m rwkv_jax.doctor")
    if path:
        write(path, described | {"platform": device.platform, "device_kind": device.device_kind})


if __name__ == "__main__":
    run_command(main)
