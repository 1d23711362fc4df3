"""The GPU benchmark's way from shapes to a file, as far as it goes without a GPU."""

import json
import math

import jax
import pytest

from pallas_kernels.wkv7 import bench
from pallas_kernels.wkv7.arg_specs import ArgSpec


def test_without_a_gpu_says_so_in_a_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench"])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2 and "no GPU" in capsys.readouterr().err


def test_times_what_runs_and_reports_what_does_not(monkeypatch, tmp_path, capsys):
    """A tiny shape on this machine, which pallas_triton refuses: a row with the reason."""
    spec = ArgSpec(1, 16, 1, 16)
    monkeypatch.setattr("sys.argv", ["bench", "--output", str(tmp_path / "results")])
    monkeypatch.setattr(bench, "ARG_SPECS", {"tiny": spec})
    monkeypatch.setattr(bench, "RUNS", 2)
    monkeypatch.setattr(bench, "COPY_BYTES", 2**12)
    monkeypatch.setattr(bench, "ROTATED_BYTES", 2**15)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    op = bench.wkv7

    def refuse_pallas(*inputs, implementation):
        if implementation == "pallas_triton":
            raise NotImplementedError("needs compute capability 8.0")
        return op(*inputs, implementation=implementation)

    monkeypatch.setattr(bench, "wkv7", refuse_pallas)
    bench.main()
    [path] = (tmp_path / "results").iterdir()
    results = json.loads(path.read_text())
    rows = {(row["implementation"], row["pass"]): row for row in results["rows"]}
    assert path.name == "wkv7_cpu.json" and len(rows) == len(results["rows"]) == 4
    for direction, arrays in {"forward": 7, "forward_backward": 20}.items():
        assert "compute capability" in rows["pallas_triton", direction]["error"]
        timed = rows["xla", direction]
        bytes_moved = arrays * 2 * math.prod(spec)
        assert timed["ms"] > 0
        assert timed["byte_floor_ms"] == pytest.approx(bytes_moved / results["copy_gb_s"] / 1e6)
        assert timed["of_byte_floor"] == pytest.approx(timed["byte_floor_ms"] / timed["ms"])
    assert "tiny xla forward:" in capsys.readouterr().out


def test_no_input_is_found_in_a_cache(monkeypatch):
    monkeypatch.setattr(bench, "ROTATED_BYTES", 2**15)
    for spec in (ArgSpec(1, 16, 1, 16), ArgSpec(1, 512, 1, 64)):
        sets = bench.random_inputs(spec)
        assert len(sets) >= 2
        assert sum(x.nbytes for inputs in sets for x in inputs) >= 2**15
