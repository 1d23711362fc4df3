"""Compiles for a named GPU on a machine without one, and reads the compiler's report.

XLA compiles for a GPU from a description of it; no driver is needed, only the compiler's own
packages, in jax's version: `pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
absl-py`, or jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc, and JAX_PLATFORMS=cpu.
`tests/kernels/test_gpu_compile.py` checks the kernels in this way.
"""

import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """The figures of a card that the compiler and byte counts need (vendor's data sheets)."""

    device_kind: str
    compute_capability: tuple[int, int]
    core_count: int
    clock_ghz: float
    memory_gb: float  # GiB that CUDA reports
    bandwidth_gb_s: float  # 1e9 bytes a second
    l2_mb: float
    shared_kb_core: int  # KiB a core; one block may take 1 KiB less
    threads_core: int
    tensor_tflops: float  # 16-bit operands, float32 sums, nothing sparse
    fp32_tflops: float  # outside of the tensor cores
    fpus_core: int = 128

    @property
    def sm(self) -> str:
        """The card's architecture for ptxas; Hopper's wgmma needs the `a`."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}" + ("a" if major in (9, 10, 12) else "")

    @property
    def compiled_as(self) -> str:
        """The name under which it is compiled: one of its compute capability that Pallas knows."""
        return STAND_INS[self.compute_capability]

    def text(self) -> str:
        """XLA's GpuTargetConfigProto, in protobuf's text form."""
        major, minor = self.compute_capability
        features = "ACCELERATED_FEATURES" if major in (9, 10) else "NONE"
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_kb_core * 1024}
  shared_memory_per_block_optin: {(self.shared_kb_core - 1) * 1024}
  threads_per_core_limit: {self.threads_core}
  core_count: {self.core_count}
  fpus_per_core: {self.fpus_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {int(self.bandwidth_gb_s * 1e9)}
  l2_cache_size: {int(self.l2_mb * 2**20)}
  clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {int(self.memory_gb * 2**30)}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.compiled_as}"
"""


# fmt: off
GPU_TARGETS = {
    "t4": GpuTarget(
        "Tesla T4", (7, 5), 40, 1.59, 14.6, 320, 4, 64, 1024, 65, 8.1, 64),
    "a100": GpuTarget(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 79.2, 2039, 40, 164, 2048, 312, 19.5, 64),
    "a100-40": GpuTarget(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 39.4, 1555, 40, 164, 2048, 312, 19.5, 64),
    "a6000": GpuTarget(
        "NVIDIA RTX A6000", (8, 6), 84, 1.80, 47.5, 768, 6, 100, 1536, 155, 38.7),
    "rtx3060": GpuTarget(
        "NVIDIA GeForce RTX 3060", (8, 6), 28, 1.78, 11.6, 360, 3, 100, 1536, 25.5, 12.7),
    "rtx3090": GpuTarget(
        "NVIDIA GeForce RTX 3090", (8, 6), 82, 1.70, 23.7, 936, 6, 100, 1536, 71, 35.6),
    "rtx4090": GpuTarget(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 23.6, 1008, 72, 100, 1536, 165, 82.6),
    "l4": GpuTarget(
        "NVIDIA L4", (8, 9), 58, 2.04, 22.0, 300, 48, 100, 1536, 121, 30.3),
    "h100": GpuTarget(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 79.1, 3352, 50, 228, 2048, 989, 66.9),
    "h200": GpuTarget(
        "NVIDIA H200", (9, 0), 132, 1.98, 139.8, 4800, 50, 228, 2048, 989, 66.9),
    "rtx5090": GpuTarget(
        "NVIDIA GeForce RTX 5090", (12, 0), 170, 2.41, 31.3, 1792, 96, 100, 1536, 210, 105),
    "pro6000": GpuTarget(
        "NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 2.60, 94.9, 1792, 128, 100, 1536, 504, 125),
}
# fmt: on

# Pallas looks up the compute capability of an absent GPU by name, in a list that lacks many cards.
# This is one name for each compute capability.
STAND_INS = {
    (7, 5): "Tesla T4",
    (8, 0): "NVIDIA A100-SXM4-80GB",
    (8, 6): "NVIDIA A10",
    (8, 9): "NVIDIA L4",
    (9, 0): "NVIDIA H100 80GB HBM3",
    (12, 0): "NVIDIA RTX PRO 6000 Blackwell",
}
# The plugins of jax that compile for CUDA, and the folder of the package `nvidia` with their ptxas.
PLUGINS = {"jax_cuda13_plugin": "cu13", "jax_cuda12_plugin": "cuda_nvcc"}


def current_compute_capability() -> tuple[int, int] | None:
    """That of the NVIDIA GPU on which a function traced now will run; None on another device.

    This is the device of `jax.sharding.use_abstract_mesh` if it names one, else the default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        if device.platform != "gpu":
            return None
        kinds = {target.device_kind: target.compute_capability for target in GPU_TARGETS.values()}
        kinds |= {kind: capability for capability, kind in STAND_INS.items()}
        if device.device_kind in kinds:
            return kinds[device.device_kind]
    # A mesh of present devices names one as well, which may be missing from the tables.
    if jax.default_backend() != "gpu" or "rocm" in jax.devices()[0].client.platform_version:
        return None
    major, minor = jax.devices()[0].compute_capability.split(".")
    return int(major), int(minor)


def can_compile() -> bool:
    """Whether the packages that the module docstring names are installed."""
    return bool(plugins() and importlib.util.find_spec("absl") and ptxas())


def plugins() -> list[str]:
    """The installed plugins of jax that compile for CUDA."""
    return [name for name in PLUGINS if importlib.util.find_spec(name)]


def device_mesh(target: GpuTarget, count: int = 1, hosts: int = 1, axis: str = "data") -> Mesh:
    """A mesh of `count` absent GPUs, over `hosts` processes.

    Inside `jax.sharding.use_abstract_mesh(mesh.abstract_mesh)`, functions are traced and lowered
    for such GPUs.
    """
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=target.text(),
        topology=f"1x{hosts}x{count // hosts}",
    )
    return Mesh(np.array(topology.devices), (axis,), axis_types=(AxisType.Auto,))


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The assembler's report on a kernel, and counts from its code."""

    name: str
    registers: int
    spill_bytes: int  # a thread, the larger of stores and loads
    tensor_instructions: int  # mma and wgmma in the PTX
    shared_bytes: int  # of a block, as XLA launches it


@dataclasses.dataclass(frozen=True)
class Compiled:
    """`executable` is jax's; its `memory_analysis()` is XLA's plan for that GPU."""

    executable: Any
    kernels: dict[str, Kernel]
    ptx: list[str]


def compile_for(
    target: GpuTarget, function: Callable, *arguments: Any, mesh: Mesh | None = None
) -> Compiled:
    """Compiles `jax.jit(function)` for the target.

    Args:
      target: one of `GPU_TARGETS`.
      function: anything that `jax.jit` takes, or its result.
      arguments: pytrees of `jax.ShapeDtypeStruct` with shardings over `mesh`. Without a mesh, any
        arrays and structs: their shapes and dtypes are used, for one GPU.
      mesh: a result of `device_mesh`.
    """
    if mesh is None:
        mesh = device_mesh(target)
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), arguments
        )
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jitted.lower(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        _put_recording_assembler(Path(folder))
        executable = lowered.compile(
            compiler_options={
                "xla_dump_to": folder,
                "xla_gpu_cuda_data_dir": folder,
                # Use the assembler of that folder, not the library in the process.
                "xla_gpu_enable_libnvptxcompiler": False,
                "xla_gpu_libnvjitlink_mode": "LIB_NV_JIT_LINK_MODE_DISABLED",
            }
        )
        launches = "".join(x.read_text() for x in Path(folder).glob("*.thunk_sequence.txt"))
        records = [
            (x.read_text(), x.with_suffix(".report").read_text())
            for x in Path(folder, "bin").glob("*.ptx")
        ]
    shared = {
        name: int(size)
        for name, size in re.findall(r"(\S+) grid: .* shared_memory: (\d+) bytes", launches)
    }
    if shared and not records:
        raise RuntimeError(
            f"XLA did not run the assembler in {folder}: is TMPDIR on a file system that is "
            "mounted with noexec?"
        )
    kernels = {
        kernel.name: kernel for ptx, report in records for kernel in _kernels(ptx, report, shared)
    }
    return Compiled(executable, kernels, [ptx for ptx, _ in records])


def ptxas() -> str | None:
    """The assembler's path: in the packages that the module docstring names, else on the PATH."""
    try:
        import nvidia
    except ImportError:
        return shutil.which("ptxas")
    folders = [Path(x) / PLUGINS[name] / "bin" for name in plugins() for x in nvidia.__path__]
    return shutil.which("ptxas", path=os.pathsep.join(map(str, folders))) or shutil.which("ptxas")


def _assembler() -> str:
    path = ptxas()
    if path is None:
        raise RuntimeError("there is no ptxas: install the packages that gpu_targets.py names")
    return path


def assemble(target: GpuTarget, ptx: str, cubin: Path) -> str:
    """Assembles PTX with XLA's options; returns the assembler's report on the kernels."""
    command = [_assembler(), "-v", f"-arch={target.sm}", "-", "-o", str(cubin)]
    return subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr


def _put_recording_assembler(folder: Path) -> None:
    """Writes `bin/ptxas`, which saves its input (PTX) and its report beside itself.

    XLA's own dump has the PTX of Triton kernels only up to jax 0.10.
    """
    assembler = _assembler()
    recording = folder / "bin" / "ptxas"
    recording.parent.mkdir()
    recording.write_text(f"""#!/bin/sh
[ -f "$1" ] || exec {shlex.quote(assembler)} "$@"
record=$(mktemp {shlex.quote(str(recording.parent))}/XXXXXXXXXX)
cp "$1" "$record.ptx"
{shlex.quote(assembler)} -v "$@" 2> "$record.report"
status=$?
cat "$record.report" >&2
exit $status
""")
    recording.chmod(0o755)


def _kernels(ptx: str, report: str, shared: dict[str, int]) -> Iterator[Kernel]:
    for block in report.split("Compiling entry function ")[1:]:
        name = block.split("'")[1]
        body = ptx[ptx.index(f".entry {name}(") :]
        body = body[: body.find("\n}")]
        stores, loads = _find(r"(\d+) bytes spill stores, (\d+) bytes spill", block)
        yield Kernel(
            name=name,
            registers=int(_find(r"Used (\d+) registers", block)[0]),
            spill_bytes=max(int(stores), int(loads)),
            tensor_instructions=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\.", body)),
            shared_bytes=shared.get(name, 0),
        )


def _find(pattern: str, text: str) -> tuple[str, ...]:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}:\n{text}")
    return found.groups()
