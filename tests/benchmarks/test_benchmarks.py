"""`python -m benchmarks.NAME` of every benchmark: --help teaches, and only --output writes."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import bf16_gradients, gpu_page, plan_table
from pallas_kernels.gpu_targets import GPU_TARGETS
from rwkv_jax.config import parse_train_options
from rwkv_jax.errors import UserError
from rwkv_jax.planning.memory import GIB, StepCost

ROOT = Path(__file__).parents[2]
LIBRARIES = {"__init__", "command", "gpu_inputs", "timing"}
NAMES = sorted({path.stem for path in (ROOT / "benchmarks").glob("*.py")} - LIBRARIES)


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_is_measured_and_how_to_keep_it(name, tmp_path, monkeypatch, capsys):
    """Also where torch, which some compare with, is not installed."""
    for module in ("torch", "triton", "fla"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    printed = capsys.readouterr().out
    assert caught.value.code == 0 and not list(tmp_path.iterdir())
    assert f"usage: python -m benchmarks.{name} " in printed
    assert f"\n    python -m benchmarks.{name}" in printed.replace(
        "JAX_PLATFORMS=cpu ", ""
    ).replace("TRITON_INTERPRET=1 ", ""), "an example of the command"
    _, _, options = printed.partition("\noptions:\n")
    assert "\n  --output " in options


@pytest.mark.parametrize("name", sorted(LIBRARIES - {"__init__"}))
def test_a_library_is_no_command(name):
    text = (ROOT / "benchmarks" / f"{name}.py").read_text("utf-8")
    assert "__main__" not in text and "def main" not in text


def run(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def committed() -> dict[Path, bytes]:
    """Every file that a benchmark has been used to make."""
    pages = [*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")]
    return {path: path.read_bytes() for path in (*pages, *(ROOT / "benchmarks/results").iterdir())}


def test_a_record_is_written_where_output_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bf16_gradients, "median_errors", lambda *_: {"att.r_k": 0.004321})
    before = committed()
    run(monkeypatch, bf16_gradients)
    assert "att.r_k                  0.43%" in capsys.readouterr().out
    run(monkeypatch, bf16_gradients, "--output", tmp_path / "new" / "x.json")
    assert committed() == before
    record = json.loads((tmp_path / "new" / "x.json").read_text())
    assert record["benchmark"] == "bf16_gradients" and record["machine"]["packages"]["jax"]
    assert record["median error"] == {"att.r_k": 0.00432}


def test_the_page_of_gpus_is_printed_or_written(tmp_path, monkeypatch, capsys):
    before = committed()
    run(monkeypatch, gpu_page)
    page = capsys.readouterr().out
    run(monkeypatch, gpu_page, "--output", tmp_path / "gpu.md")
    assert committed() == before
    assert (
        (tmp_path / "gpu.md").read_text("utf-8")
        == page
        == gpu_page.page(ROOT / "benchmarks" / "results")
    )


def test_the_table_of_plans_goes_into_its_place_in_each_page(tmp_path, monkeypatch, capsys):
    pages = [Path(shutil.copy(readme, tmp_path)) for readme in plan_table.READMES]
    before = committed()

    def plan(options, target, search):
        need = StepCost(GIB, 2 * GIB, 8 * GIB, 1, 1, 1.0)
        return SimpleNamespace(costs={options.micro_bsz: need})

    monkeypatch.setattr(plan_table, "plan", plan)
    monkeypatch.setattr(plan_table, "find_target", GPU_TARGETS.__getitem__)
    run(monkeypatch, plan_table, "--output", tmp_path / "plan.json", *pages)
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(plan_table.ROWS) and committed() == before
    records = json.loads((tmp_path / "plan.json").read_text())
    assert parse_train_options(records[0]["options"].split())[0].micro_bsz == 8
    for page, readme in zip(pages, plan_table.READMES, strict=True):
        old, new = (path.read_text("utf-8").splitlines() for path in (readme, page))
        different = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        assert [b for _, b in different] == rows  # the title of the table, and the rest, as before
    with pytest.raises(UserError, match="no place for the table"):
        (tmp_path / "other.md").write_text("no markers")
        run(monkeypatch, plan_table, "--output", tmp_path / "other.md")
