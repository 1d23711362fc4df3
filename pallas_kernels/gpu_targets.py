"""Compiles for a named GPU on a machine that has none, and reads what the compiler made.

XLA compiles for a GPU from a description of it; no driver is needed, only the compiler's own packages:
`pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 absl-py`, in the versions of jax
and jaxlib. The tests check the kernels with it, `rwkv_jax.plan` the memory of a training step.
"""

import contextlib
import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


@dataclasses.dataclass(frozen=True)
class GpuTarget:
    """What the compiler, and a byte count, need to know of a card (vendor's data sheets)."""

    device_kind: str
    compute_capability: tuple[int, int]
    core_count: int
    clock_ghz: float
    memory_gb: float  # GiB that CUDA reports
    bandwidth_gb_s: float  # 1e9 bytes a second
    l2_mb: float
    shared_kb_core: int  # KiB a core; one block may take 1 KiB less
    threads_core: int
    fpus_core: int = 128

    @property
    def sm(self) -> str:
        """The name ptxas knows the card by; Hopper's wgmma needs the `a`."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}" + ("a" if major in (9, 10, 12) else "")

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
device_description_str: "{self.device_kind}"
"""


GPU_TARGETS = {
    "a100": GpuTarget("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 79.2, 2039, 40, 164, 2048, 64),
    "a6000": GpuTarget("NVIDIA RTX A6000", (8, 6), 84, 1.80, 47.5, 768, 6, 100, 1536),
    "rtx3090": GpuTarget("NVIDIA GeForce RTX 3090", (8, 6), 82, 1.70, 23.7, 936, 6, 100, 1536),
    "rtx4090": GpuTarget("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 23.6, 1008, 72, 100, 1536),
    "l4": GpuTarget("NVIDIA L4", (8, 9), 58, 2.04, 22.0, 300, 48, 100, 1536),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 79.1, 3352, 50, 228, 2048),
    "rtx5090": GpuTarget("NVIDIA GeForce RTX 5090", (12, 0), 170, 2.41, 31.3, 1792, 96, 100, 1536),
    "pro6000": GpuTarget(
        "NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 2.60, 94.9, 1792, 128, 100, 1536
    ),
}


def current_compute_capability() -> tuple[int, int] | None:
    """Of the NVIDIA GPU that a function traced now will run on; None when it is another device.

    That is the device of `jax.sharding.use_abstract_mesh` when it names one, else the default one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        kinds = {target.device_kind: target.compute_capability for target in GPU_TARGETS.values()}
        return kinds.get(device.device_kind)
    if jax.default_backend() != "gpu" or "rocm" in jax.devices()[0].client.platform_version:
        return None
    major, minor = jax.devices()[0].compute_capability.split(".")
    return int(major), int(minor)
