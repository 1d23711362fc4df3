"""What is read off nvidia-smi, and what follows for jax's memory."""

import os

import pytest

from rwkv_jax.device import nvidia, runtime
from rwkv_jax.device.nvidia import Gpu
from rwkv_jax.errors import UserError


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
        set_variables(monkeypatch, NEW=None, OLD=None)
        runtime.prepare_jax()
        assert float(os.environ[NAMES["NEW"]]) == share and NAMES["OLD"] not in os.environ


NAMES = {"NEW": "XLA_CLIENT_MEM_FRACTION", "OLD": "XLA_PYTHON_CLIENT_MEM_FRACTION"}


def set_variables(monkeypatch, **values: str | None) -> None:
    for name, value in values.items():
        monkeypatch.setenv(NAMES[name], value or "")  # and back after the test
        if value is None:
            monkeypatch.delenv(NAMES[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_user_s_share_of_memory_stays_under_either_name(name, monkeypatch, capsys):
    """jax's CUDA plugin does not start where both are set."""
    set_variables(monkeypatch, **{"NEW": None, "OLD": None, name: "0.5"})
    runtime.prepare_jax()
    present = {key: os.environ[key] for key in NAMES.values() if key in os.environ}
    assert present == {NAMES[name]: "0.5"} and capsys.readouterr().err == ""


def test_of_both_names_the_newer_counts(monkeypatch, capsys):
    set_variables(monkeypatch, NEW="0.5", OLD="0.7")
    runtime.prepare_jax()
    assert os.environ[NAMES["NEW"]] == "0.5" and NAMES["OLD"] not in os.environ
    assert (
        capsys.readouterr().err
        == f"note: {NAMES['OLD']} has no effect, because {NAMES['NEW']} is set\n"
    )


@pytest.mark.parametrize("value", ["90%", "0", "-0.5", "nan"])
def test_a_share_of_memory_is_a_number(value, monkeypatch):
    set_variables(monkeypatch, NEW=None, OLD=value)
    with pytest.raises(UserError, match=f"^XLA_PYTHON_CLIENT_MEM_FRACTION={value}: set a number"):
        runtime.prepare_jax()


def test_deterministic_adds_a_flag_to_the_user_s(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    runtime.prepare_jax(deterministic=True)
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=/tmp/x {runtime.DETERMINISTIC}"
