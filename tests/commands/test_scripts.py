"""Commands as the official tutorial types them, `python make_data.py`, from whatever folder."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(
    path
    for folder in ("convert", "data", "rwkv_jax")
    for path in (ROOT / folder).glob("*.py")
    if '__main__":\n    run_command(main)' in path.read_text("utf-8")
)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_command_runs_as_a_script(path, tmp_path, monkeypatch, capsys):
    """It imports from its checkout, whatever is installed, and not from its own folder, whose names
    hide those of other packages. Imported, it leaves the path alone.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), "elsewhere", *sys.path])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(path), run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python {path.name} ")
    assert sys.path[:2] == [str(ROOT), "elsewhere"]

    # The path is set before the first import that needs it.
    before, _, after = path.read_text("utf-8").partition("\nif __spec__ is None:")
    own = ("import rwkv_jax", *(f"from {name}" for name in ("convert", "data", "rwkv_jax")))
    assert not any(line.startswith(own) for line in before.splitlines())
    assert "from rwkv_jax" in after


def test_the_commands_are_found():
    names = {f"{path.parent.name}.{path.stem}" for path in COMMANDS}
    assert {"data.make_data", "convert.verify", "rwkv_jax.train", "rwkv_jax.generate"} <= names
