"""docs/gpu.md is what `benchmarks/gpu_page.py` makes of the committed records."""

import copy
import json
import re
from pathlib import Path

import pytest

from benchmarks import gpu_page
from rwkv_jax.errors import UserError

CARD = "NVIDIA H100 80GB HBM3"
FILES = "nvidia_h100_80gb_hbm3"
HEADER = {
    "machine": {
        "cpu": "EPYC", "packages": {"jax": "0.11.2"},
        "gpu": {"name": CARD, "count": 1, "driver": "580.65.06", "memory_mib": 81559},
    },
    "commit": "abc1234", "date": "2026-11-28", "device_kind": CARD, "on_gpu": True,
}  # fmt: skip
SHAPE = {"shape": "0.1b_micro_batch_8", "batch": 8, "time": 4096, "head": 12, "size": 64}
STEP = {"size": "0.1b", "ctx_len": 4096, "micro_bsz": 8, "grad_cp": 1}
RECORDS = {
    "wkv7": HEADER | {
        "benchmark": "wkv7", "copy_gb_s": 2718.4, "dispatch_ms": 0.01,
        "rows": [
            SHAPE | {"implementation": "pallas_triton", "pass": "forward", "byte_floor_ms": 0.2,
                     "ms": 0.3141, "of_byte_floor": 0.637},
            SHAPE | {"implementation": "pallas_triton", "pass": "forward_backward",
                     "byte_floor_ms": 0.2, "ms": 12.344, "of_byte_floor": None},
            SHAPE | {"implementation": "xla", "pass": "forward", "byte_floor_ms": 0.2,
                     "error": "out of | memory"},
        ],
    },
    "train_step": HEADER | {
        "benchmark": "train_step",
        "rows": [
            STEP | {"precision": "bf16", "ms": 71.532, "tokens_per_s": 458088.4, "mfu": 0.3172,
                    "peak_bytes": 5.4 * 2**30, "steps": 30, "loss": 11.0},
            STEP | {"micro_bsz": 64, "error": "out of memory: 90 GiB"},
        ],
        "command": STEP | {"micro_bsz": 8, "tokens_per_s": 449999.6, "ms": 72.8},
    },
    "profile": HEADER | STEP | {
        "benchmark": "profile", "steps": 5, "step_ms": 73.211, "busy_share": 0.9871,
        "parts": {"wkv7": 20.25, "matrix_products": 60.75},
        "kernels": [
            {"name": "wkv7|backward", "ms": 13.577, "share": 0.1676, "calls": 12.0, "part": "wkv7"}
        ] + [
            {"name": f"short{i}", "ms": 0.1, "share": 0.001, "calls": 1.0, "part": "wkv7"}
            for i in range(10)
        ],
    },
    "rivals": HEADER | {
        "benchmark": "rivals",
        "rows": [
            SHAPE | {"what": "wkv7", "implementation": "ours", "pass": "forward", "ms": 0.3333},
            SHAPE | {"what": "wkv7", "implementation": "fla", "pass": "forward", "ms": 0.6999,
                     "ratio": 2.0999},
            {"what": "wkv7", "implementation": "official_cuda", "error": "nvcc: not found"},
            STEP | {"what": "step", "implementation": "official_trainer", "pass": "step",
                    "ms": 104.22, "tokens_per_s": 314411.7, "ratio": 1.4569},
        ],
    },
}  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """A function that writes records, all of them by default, and returns their folder."""

    def write(records=RECORDS):
        for name, record in records.items():
            (tmp_path / f"{name}_{FILES}.json").write_text(json.dumps(record))
        return tmp_path

    return write


def test_the_page_is_that_of_the_committed_records():
    page = (gpu_page.ROOT / "docs" / "gpu.md").read_text("utf-8")
    assert page == gpu_page.page(gpu_page.ROOT / "benchmarks" / "results"), (
        "run python -m benchmarks.gpu_page"
    )


def test_without_records_it_says_how_to_make_them(tmp_path):
    """Records of other scripts, of CPUs, are not taken for one of a GPU."""
    for name in ("wkv7_cpu.json", "wkv7_designs.json", "train_step_cpu.json", "plan.json"):
        (tmp_path / name).write_text("{}")
    page = gpu_page.page(tmp_path)
    assert "Nothing has been run on a GPU yet" in page and "make gpu-report" in page
    assert "| " not in page


def lines_with(page: str, *cells: str) -> list[str]:
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines()]
    return [" ".join(row) for row in rows if all(cell in row for cell in cells)]


def test_every_figure_has_a_place(results):
    page = gpu_page.page(results())
    assert "Nothing has been run" not in page and "make gpu-report" in page
    assert page.count(f"## {CARD}\n") == 1
    for name in RECORDS:
        assert lines_with(page, f"`{name}`", "580.65.06", "0.11.2", "abc1234", "2026-11-28")
    assert "A plain copy moves 2718 GB/s." in page
    shape = ("0.1b_micro_batch_8", "8", "4096", "12", "64")
    assert lines_with(page, *shape, "`pallas_triton`", "0.314", "63.7 %", "12.34", "–")
    assert lines_with(page, *shape, "`xla`", r"out of \| memory", "–")
    assert lines_with(page, "0.1b", "4096", "8", "1", "bf16", "71.53", "458,088", "31.7 %", "5.4")
    assert lines_with(page, "0.1b", "4096", "64", "1", "out of memory: 90 GiB")
    assert "`--micro_bsz 8`, `--grad_cp 1`: 450,000 tokens/s" in page
    assert "0.1b, ctx_len 4096, micro_bsz 8, grad_cp 1: 73.21 ms a step" in page
    assert "GPU busy for 98.7 % of it" in page
    assert lines_with(page, "wkv7", "20.25", "25.0 %")
    assert lines_with(page, "matrix products", "60.75", "75.0 %")
    assert lines_with(page, r"`wkv7\|backward`", "wkv7", "13.58", "16.8 %", "12")
    assert "`short8`" in page and "`short9`" not in page  # the ten longest
    assert lines_with(page, "`ours`", "WKV-7", shape[0], "forward", "0.333", "–", "1")
    assert lines_with(page, "`fla`", "WKV-7", shape[0], "forward", "0.700", "–", "2.10")
    assert lines_with(page, "`official_cuda`", "WKV-7", "nvcc: not found")
    step = "0.1b, ctx_len 4096, micro_bsz 8, grad_cp 1"
    assert lines_with(
        page, "`official_trainer`", "training step", step, "step", "104.2", "314,412", "1.46"
    )
    # Each table has as many cells in every line.
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_cards_are_apart_and_need_not_have_all_records(results, tmp_path):
    results({"profile": RECORDS["profile"]})
    other = copy.deepcopy(RECORDS["wkv7"]) | {"device_kind": "NVIDIA H200"}
    (tmp_path / "wkv7_nvidia_h200.json").write_text(json.dumps(other))
    page = gpu_page.page(tmp_path)
    h100, h200 = page.split("## NVIDIA H200\n")
    assert f"## {CARD}\n" in h100 and "### Where the time" in h100 and "### WKV-7" not in h100
    assert "### WKV-7" in h200 and "### Where the time" not in h200


def changed(name: str, *path, value=None) -> dict:
    """A record in which what is at `path` has another value, or, if None is given, is not there."""
    record = copy.deepcopy(RECORDS[name])
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    if value is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return record


@pytest.mark.parametrize(
    ("name", "record", "words"),
    [
        ("wkv7", changed("wkv7", "copy_gb_s"), "copy_gb_s is missing"),
        ("wkv7", changed("wkv7", "benchmark", value="rivals"), "benchmark is rivals, not wkv7"),
        ("wkv7", changed("wkv7", "device_kind", value="NVIDIA A100"), "device_kind is NVIDIA A100"),
        ("wkv7", changed("wkv7", "on_gpu", value=False), "on_gpu is false"),
        ("wkv7", changed("wkv7", "rows", value={}), "rows is {}"),
        ("wkv7", changed("wkv7", "rows", 1, "ms"), r"rows\[1\].ms is missing"),
        ("wkv7", changed("wkv7", "rows", 0, "pass", value="both"), r"rows\[0\].pass is both"),
        ("wkv7", changed("wkv7", "rows", 0, "batch", value=True), r"rows\[0\].batch is true"),
        ("wkv7", changed("wkv7", "machine", "gpu"), "machine.gpu is missing"),
        ("train_step", changed("train_step", "rows", 0, "mfu", value="x"), r'mfu is "x"'),
        ("train_step", changed("train_step", "rows", 0, value=3), r"rows\[0\].size is missing"),
        ("train_step", changed("train_step", "command", "ctx_len"), "command.ctx_len is missing"),
        ("profile", changed("profile", "parts", "wkv7", value=float("nan")), "wkv7 is NaN"),
        ("profile", changed("profile", "kernels", 0, "part"), r"kernels\[0\].part is missing"),
        ("rivals", changed("rivals", "rows", 1, "ratio"), r"rows\[1\].ratio is missing"),
        ("rivals", [], "benchmark is missing"),
    ],
)
def test_a_record_that_is_not_one_is_refused_by_file_and_key(results, name, record, words):
    with pytest.raises(UserError, match=rf"{name}_{FILES}\.json: .*{words}"):
        gpu_page.page(results(RECORDS | {name: record}))


def test_a_file_that_is_not_json_is_refused(results, tmp_path):
    results()
    (tmp_path / f"rivals_{FILES}.json").write_text("{")
    with pytest.raises(UserError, match=rf"rivals_{FILES}\.json: is not JSON"):
        gpu_page.page(tmp_path)


def test_the_command_writes_the_page(results, tmp_path, monkeypatch, capsys):
    path = tmp_path / "page.md"
    monkeypatch.setattr(
        "sys.argv", ["gpu_page", "--results", str(results()), "--output", str(path)]
    )
    gpu_page.main()
    assert path.read_text("utf-8") == gpu_page.page(tmp_path)
    assert capsys.readouterr().out == f"wrote {path}\n"
    assert not [x for x in Path(tmp_path).iterdir() if x.name.endswith(".tmp")]
