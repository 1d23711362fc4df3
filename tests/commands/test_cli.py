"""`rwkv-jax COMMAND`, the script that the wheel installs."""

import importlib
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import rwkv_jax
from rwkv_jax import cli
from tests.support import hostile

ROOT = Path(__file__).parents[2]
TABLE = {name: entry for group in cli.COMMANDS.values() for name, entry in group.items()}


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls what pyproject.toml names as the script: exit status, stdout, stderr."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    ((module, function),) = [target.split(":") for target in project["scripts"].values()]
    script = getattr(importlib.import_module(module), function)

    def run(*arguments: str) -> tuple[object, str, str]:
        main = types.ModuleType("__main__")  # a script's has no __spec__, unlike pytest's
        monkeypatch.setitem(sys.modules, "__main__", main)
        monkeypatch.setattr(sys, "argv", ["/usr/bin/rwkv-jax", *arguments])
        with pytest.raises(SystemExit) as caught:
            script()
        return caught.value.code, *capsys.readouterr()

    return run


def test_the_script_is_called_as_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert list(project["scripts"]) == [project["name"]] == ["rwkv-jax"]


def test_every_command_is_in_the_table():
    """A command is a module that runs its `main`; `python -m` and the script run the same one."""
    mains = [importlib.import_module(name).main for name in hostile.commands()]
    assert {importlib.import_module(module).main for module, _ in TABLE.values()} == set(mains)
    assert len(TABLE) == len(mains) == 17


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_lists_each_command_with_a_line(run, arguments):
    status, out, err = run(*arguments)
    assert (status, err) == (0, "") and out.startswith("usage: rwkv-jax COMMAND [option …]\n")
    lines = out.splitlines()
    for name, (_, line) in TABLE.items():
        assert [row for row in lines if row.split()[:1] == [name]] == [f"  {name:14}{line}"]
    assert {f"{heading}:" for heading in cli.COMMANDS} <= set(lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", TABLE)
def test_help_of_a_command_shows_how_it_was_called(run, name):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "") and out.startswith(f"usage: rwkv-jax {name} ")
    example = " ".join(out.split()).partition("example: ")[2]
    assert not example or example.startswith(f"rwkv-jax {name} ")


def test_a_command_gets_its_arguments(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("arithmetic", "sums.jsonl", "--count", "40", "--sums", "2")
    assert status == 0 and out.startswith("sums.jsonl: 40 sums, ")
    status, out, _ = run("make-data", "sums.jsonl", "2", "8")
    assert status == 0 and out.startswith("sums: 80 items, ")
    assert run("magic-prime", "sums", "8") == (0, out, "")
    status, _, err = run("magic-prime", "sums", "0")
    assert status == 2 and err.startswith("error: ctx_len 0: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("trian", "did you mean train?"),
        ("make_data", "did you mean make-data?"),
        ("compute_magic_prime", "did you mean magic-prime?"),
        ("describe", "did you mean inspect?"),
        ("pth_to_hf", "did you mean pth-to-hf?"),
        ("xyzzy", "rwkv-jax --help lists the commands"),
        ("", "rwkv-jax --help lists the commands"),
        ("\x1b[2J", "rwkv-jax --help lists the commands"),
    ],
)
def test_an_unknown_command_is_one_line(run, name, hint):
    shown = name.replace("\x1b", r"\x1b")
    assert run(name) == (2, "", f"error: {shown}: no such command; {hint}\n")


def test_options_of_the_script(run):
    assert run("--version") == (0, f"rwkv-jax {rwkv_jax.__version__}\n", "")
    for option, hint in [("--verison", "; did you mean --version?"), ("--size=1", ""), ("-", "")]:
        message = f"error: unrecognized arguments: {option}{hint} (--help lists the options)\n"
        assert run(option, "train") == (2, "", message)
    status, out, err = run("--")  # which Pythons since 3.13 drop
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")


@pytest.mark.parametrize(
    ("command", "called", "after"),
    [
        ("-m rwkv_jax magic-prime", "rwkv-jax magic-prime", "demo 4096"),
        ("-m data.compute_magic_prime", "python -m data.compute_magic_prime", "demo 4096"),
        ("data/compute_magic_prime.py", "python compute_magic_prime.py", "demo 4096"),
        ("-m convert.inspect", "python -m convert.inspect", "[-h]"),  # a folder; has no example
    ],
)
def test_help_shows_the_command_line_that_was_typed(command, called, after):
    done = subprocess.run(
        [sys.executable, *shlex.split(command), "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {called} [-h]")
    assert f": {called} {after}" in done.stdout
