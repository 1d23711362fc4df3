"""The GPU benchmark of WKV-7, on a CPU: its way from shapes to a file."""

import json
import math
import types

import numpy as np
import pytest

from benchmarks import timing, wkv7_gpu
from pallas_kernels.wkv7.arg_specs import ARG_SPECS, ArgSpec

SPEC = ArgSpec(1, 16, 1, 16)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(timing, "RUNS", 2)
    monkeypatch.setattr(wkv7_gpu, "raise_clocks", lambda: None)
    monkeypatch.setattr(wkv7_gpu, "prepare_jax", lambda: None)


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["wkv7_gpu", *arguments])
    wkv7_gpu.main()


def test_times_what_runs_and_reports_what_does_not(monkeypatch, quick, tmp_path, capsys):
    """pallas_triton is refused here: a row with the reason."""
    path = tmp_path / "new" / "wkv7_cpu.json"
    monkeypatch.setattr(wkv7_gpu, "dispatch_seconds", lambda: 0.0)
    run(monkeypatch, "--shapes", "1,16,1,16", "--output", str(path))
    record = json.loads(path.read_text())
    rows = {(row["implementation"], row["pass"]): row for row in record["rows"]}
    assert len(rows) == len(record["rows"]) == 4
    for direction, arrays in {"forward": 7, "forward_backward": 20}.items():
        assert "compute capability" in rows["pallas_triton", direction]["error"]
        timed = rows["xla", direction]
        bytes_moved = arrays * 2 * math.prod(SPEC)
        assert timed["ms"] > 0 and timed["shape"] == "1,16,1,16"
        assert timed["byte_floor_ms"] == pytest.approx(bytes_moved / record["copy_gb_s"] / 1e6)
        assert timed["of_byte_floor"] == pytest.approx(timed["byte_floor_ms"] / timed["ms"])
    assert record["benchmark"] == "wkv7" and record["on_gpu"] is False
    said = capsys.readouterr().out
    assert "no GPU" in said and "1,16,1,16 xla forward:" in said


def test_rows_are_written_one_by_one(monkeypatch, quick, tmp_path):
    """What was measured is there when the next one ends the process."""
    path, seen = tmp_path / "w.json", []
    real = wkv7_gpu.median_seconds

    def median_seconds(function, inputs):
        seen.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        if len(seen) > 4:  # the copy's, the empty program's and two rows'
            raise KeyboardInterrupt
        return real(function, inputs)

    monkeypatch.setattr(wkv7_gpu, "median_seconds", median_seconds)
    with pytest.raises(KeyboardInterrupt):
        arguments = ["--implementations", "xla", "--output", str(path)]
        run(monkeypatch, "--shapes", "1,16,1,16", "1,32,1,16", *arguments)
    assert seen == [0, 0, 0, 1, 2]
    assert [row["pass"] for row in json.loads(path.read_text())["rows"]] == [
        "forward",
        "forward_backward",
    ]


@pytest.mark.parametrize("times", [0.9, 1.1])
def test_no_share_of_the_floor_where_dispatch_is_timed(monkeypatch, times):
    dispatch = 1e-3
    seconds = times * wkv7_gpu.DISPATCH_TIMES * dispatch
    monkeypatch.setattr(wkv7_gpu, "median_seconds", lambda *_: seconds)
    [row, _] = wkv7_gpu.rows_of(SPEC, "xla", 1e9, dispatch)
    assert (row["of_byte_floor"] is None) == (times < 1)
    assert ("bound by dispatch" in wkv7_gpu.outcome(row)) == (times < 1)


def test_inputs_of_a_shape_are_of_one_program():
    """Different in each set, and in all more than a cache holds."""
    wkv7_gpu.draw.clear_cache()
    for count, spec in enumerate((SPEC, ArgSpec(1, 512, 1, 64)), 1):
        sets = wkv7_gpu.random_inputs(spec)
        assert wkv7_gpu.draw._cache_size() == count and len(sets) >= 2
        assert sum(x.nbytes for inputs in sets for x in inputs) >= timing.beyond_cache(on_gpu=False)
        assert not np.array_equal(sets[0][0], sets[1][0])
        a, b = (np.asarray(x, np.float32) for x in sets[0][4:])
        np.testing.assert_allclose(np.linalg.norm(a, axis=-1), 1, rtol=0.01)
        assert (np.sum(a * b, -1) < 0).all()


def test_clocks_are_up_when_a_product_gets_no_faster(monkeypatch):
    """Times that fall, then stay: the last ones are waited for, and no more."""
    took, calls = [8, 6, 4, 2, *[1] * 100], []
    now = 0.0

    def product(x):
        nonlocal now
        now += took[len(calls) // 8] / 8
        calls.append(x)
        return x

    monkeypatch.setattr(wkv7_gpu, "_product", lambda: (product, np.zeros(())))
    clock = types.SimpleNamespace(perf_counter=lambda: now, monotonic=lambda: 0.0)
    monkeypatch.setattr(wkv7_gpu, "time", clock)
    wkv7_gpu.raise_clocks()
    assert len(calls) == 8 * (5 + 25)


def test_the_shape_that_others_publish_is_the_first():
    assert next(iter(ARG_SPECS.values())) == (8, 4096, 64, 64)
