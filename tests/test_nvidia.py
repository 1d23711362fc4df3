"""What is read off nvidia-smi, and what follows for jax's memory."""

import os

from rwkv_jax import build, nvidia
from rwkv_jax.nvidia import Gpu


def test_nvidia_smi_is_read(nvidia_smi):
    nvidia_smi(
        "NVIDIA H100 80GB HBM3, 580.65.06, 81559, 4, 9.0\nNVIDIA GB10, 580.1, [N/A], [N/A], 12.1"
    )
    h100 = Gpu("NVIDIA H100 80GB HBM3", "580.65.06", 81559, 4, (9, 0))
    spark = Gpu("NVIDIA GB10", "580.1", 0, 0, (12, 1))
    assert nvidia.ask_nvidia_smi() == ((h100, spark), "")
    nvidia_smi("No devices were found", 6)
    assert nvidia.ask_nvidia_smi() == ((), "No devices were found")


def test_no_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia.ask_nvidia_smi() == ((), None)


def test_jax_leaves_a_gibibyte_or_a_twentieth(nvidia_smi, monkeypatch):
    """The largest card decides: beside it, there may be one that draws the desktop."""
    for cards, share in (((8192, 2048), 7 / 8), ((81559,), 0.95), ((0,), 0.95)):
        nvidia_smi("\n".join(f"NVIDIA Some, 580.1, {memory}, 1, 8.9" for memory in cards))
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "")  # and back after the test
        monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
        build.prepare_jax()
        assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == share
