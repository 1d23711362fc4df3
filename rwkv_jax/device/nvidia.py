"""The machine's NVIDIA driver and GPUs, as nvidia-smi reports them, without jax."""

import ctypes
import dataclasses
import re
import shutil
import subprocess


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi reports it; `memory` and `used` in MiB."""

    name: str
    driver: str
    memory: int
    used: int
    capability: tuple[int, int]


def has_driver() -> bool:
    """Whether the library of an NVIDIA driver, of any version, can be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def ask_nvidia_smi() -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs, and the error message of nvidia-smi if it failed (None: it is not installed)."""
    if shutil.which("nvidia-smi") is None:
        return (), None
    query = "name,driver_version,memory.total,memory.used,compute_cap"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), str(error)
    gpus = tuple(_parse_gpu(line) for line in result.stdout.splitlines() if line.count(",") == 4)
    return gpus, "" if gpus else (result.stdout + result.stderr).strip()


def _parse_gpu(line: str) -> Gpu:
    name, driver, memory, used, capability = (word.strip() for word in line.split(","))
    major, minor = ([int(n) for n in re.findall(r"\d+", capability)] + [0, 0])[:2]

    def size(word: str) -> int:
        return int(word) if word.isdecimal() else 0  # unified memory is "[N/A]"

    return Gpu(name, driver, size(memory), size(used), (major, minor))
