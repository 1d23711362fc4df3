"""What every command does, whatever it is: its streams, signals, last words, and environment."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rwkv_jax import files
from rwkv_jax.device import nvidia, runtime
from rwkv_jax.errors import CommandParser, UserError, run_command
from tests.support import hostile

ROOT = Path(__file__).parents[2]


def python(code: str, redirections: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Runs a program by a shell, for what it does with the standard streams."""
    command = f'exec "$PYTHON" {variables.pop("options", "")} -c "$CODE" {redirections}'
    environment = {name: os.environ[name] for name in os.environ if name[:6] != "PYTHON"}
    environment |= {"PYTHON": sys.executable, "CODE": code, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", command], env=environment | variables, capture_output=True, text=True
    )


def command(main: str) -> str:
    """A program whose `main` has these lines."""
    lines = "\n    ".join(main.splitlines())
    return (
        "import os, signal, sys, tempfile, warnings\n"
        "from rwkv_jax.errors import UserError, run_command\n"
        f"def main():\n    {lines}\nrun_command(main)"
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_empty_or_takes_everything(closed, tmp_path):
    """And no file that is opened later gets its number."""
    code = command(
        "assert sys.stdin.read() == ''\nprint('result')\nprint('note', file=sys.stderr)\n"
        "file = open(os.environ['FILE'], 'w')\nfile.write(str(file.fileno()))"
    )
    done = python(code, closed if "<" in closed else f"{closed} < /dev/null", FILE=tmp_path / "x")
    assert done.returncode == 0
    assert int((tmp_path / "x").read_text()) > 2
    assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "result\n")
    assert done.stderr == ("" if "2>&-" in closed else "note\n")


@pytest.mark.parametrize(
    ("main", "redirections", "status", "says"),
    [
        ("print('result')", "> /dev/full", 2, "error: No space left on device\n"),
        ("print('result', flush=True)", "> /dev/full", 2, "error: No space left on device\n"),
        ("raise UserError('bad')", "2> /dev/full", 2, ""),
        ("raise UserError('a\\nb: \\x1b[2J bad')", "", 2, "error: a\\nb: \\x1b[2J bad\n"),
        ("open('missing/x')", "", 2, "error: missing/x: No such file or directory\n"),
        ("raise KeyboardInterrupt", "", 130, "interrupted\n"),
        (
            "raise MemoryError('Unable to allocate 9 TiB')", "", 2,
            "error: out of memory: Unable to allocate 9 TiB; use a smaller model or batch, or "
            "free some memory\n",
        ),
        ("warnings.warn('something of no use')", "", 0, ""),
    ],
)  # fmt: skip
def test_last_words(main, redirections, status, says):
    done = python(command(main), redirections)
    assert (done.returncode, done.stderr) == (status, says)


def test_warnings_that_were_asked_for_are_shown():
    assert "of use" in python(command("warnings.warn('of use')"), options="-W default").stderr


def test_a_bug_is_one_line_and_its_traceback_is_kept(tmp_path):
    done = python(command("{}['x\\ny']"), TMPDIR=str(tmp_path))
    found = re.fullmatch(
        r"error: unexpected KeyError: 'x\\ny'; please report it with the traceback in (\S+)\n",
        done.stderr,
    )
    assert done.returncode == 1 and found, done.stderr
    assert "Traceback" in Path(found[1]).read_text() and Path(found[1]).parent == tmp_path


@pytest.mark.parametrize("name", ["TERM", "HUP", "INT"])
def test_a_signal_leaves_nothing_half_done(name, tmp_path):
    code = command(
        f"with tempfile.TemporaryDirectory(dir=os.environ['WORK']):\n"
        f"    os.kill(os.getpid(), signal.SIG{name})\n    signal.pause()"
    )
    done = python(code, WORK=tmp_path)
    number = {"TERM": 15, "HUP": 1, "INT": 2}[name]
    assert done.returncode == 128 + number
    assert done.stderr == ("interrupted\n" if name == "INT" else "")
    assert not list(tmp_path.iterdir())


def test_jaxs_errors_are_one_line(capsys):
    def main():
        raise jax.errors.JaxRuntimeError("INTERNAL: no such thing\nmore of it")

    with pytest.raises(SystemExit) as exit:
        run_command(main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: jax: INTERNAL: no such thing\n"


def parse(*arguments: str) -> Path | int:
    parser = CommandParser()
    parser.add_argument("--path", type=Path)
    parser.add_argument("--number", type=int)
    options = parser.parse_args(arguments)
    return options.path or options.number


def test_paths_and_numbers_of_a_command_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parse("--path=~/x") == Path("/home/someone/x")
    assert parse("--path=./~") == Path("~") and parse("--number=１２") == 12
    refused = {
        "--path=": "it is empty",
        "--path=~nobody-of-this-name/x": "there is no such user",
        "--number=": "'' is not a whole number",
        "--number=1.5": "'1.5' is not a whole number",
        f"--number={2**63}": "beyond 64 bits",
        "": "unrecognized arguments",
    }
    if sys.version_info < (3, 13):  # from where on it is a name like others
        refused["--path=--"] = "expected one argument"
    for argument, reason in refused.items():
        with pytest.raises(UserError, match=reason):
            parse(argument)


def test_where_no_cache_can_be_written(monkeypatch, capsys):
    """No home (a container's unknown user), or one that is read-only: one note, and a folder."""
    folders = set()
    for home in ("~/.cache", "/dev/null/.cache"):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path, home=home: home)
        folders |= {files.cache_folder(), files.cache_folder()}
        notes = capsys.readouterr().err.splitlines()
        assert len(notes) == 1 and notes[0].startswith(f"note: {home}/rwkv_jax: "), notes
        assert "set XDG_CACHE_HOME" in notes[0]
    assert len(folders) == 2 and all(folder.is_dir() for folder in folders)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("JAX_ENABLE_X64", True), ("JAX_NUMPY_DTYPE_PROMOTION", "strict"), ("JAX_DEBUG_NANS", True)],
)
def test_the_environment_changes_no_result(variable, value, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(variable, "1")
    name, before = variable.lower(), jax.config.values[variable.lower()]
    try:
        jax.config.update(name, value)
        runtime.prepare_jax()
        assert jax.config.values[name] == runtime.SETTINGS[name]
    finally:
        jax.config.update(name, before)
    assert capsys.readouterr().err == f"note: {variable} has no effect on this command\n"


PLUGIN = """
import logging, os
os.write(2, b"cudart_stub.cc:31] Could not find cuda drivers\\n")
def initialize():
    logging.getLogger("jax._src.xla_bridge").error("Unable to load CUDA")
    raise RuntimeError("Unable to load cuDNN. Is it installed?")
"""


@pytest.mark.skipif(nvidia.has_driver(), reason="with a driver, such words are about it")
def test_a_plugin_without_a_driver_is_not_heard(tmp_path):
    """As after `pip install '.[plan]'`: jax's CUDA plugin reports a missing driver, often."""
    (tmp_path / "jax_plugins" / "noisy").mkdir(parents=True)
    (tmp_path / "jax_plugins" / "noisy" / "__init__.py").write_text(PLUGIN)
    (tmp_path / "jax_cuda12_plugin").mkdir()
    (tmp_path / "jax_cuda12_plugin" / "__init__.py").write_text(PLUGIN)
    done = python(
        "from rwkv_jax.device import runtime\nimport jax\nruntime.prepare_jax()\njax.devices()",
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        XDG_CACHE_HOME=str(tmp_path),
        JAX_PLATFORMS="",
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(x, marks=pytest.mark.slow if x == "rwkv_jax.train" else ())
        for x in hostile.commands()
    ],
)
def test_hostile_values(command, bench):
    """A part of the table; `python -m tests.support.hostile` runs all of it."""
    assert hostile.BASELINES.get(command), f"tests/support/hostile.py: BASELINES lacks {command}"
    outcomes = [bench.run(one) for one in hostile.part(command)]
    assert outcomes.count("refused") > 1


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return hostile.Bench(tmp_path_factory.mktemp("hostile") / "root")


def test_the_table_notices(bench, monkeypatch):
    """Each kind of surprise."""
    one = hostile.Combination("data.arithmetic", "output", "x", ("x", "--count", "1"))
    module = importlib.import_module("data.arithmetic")

    def bug():
        raise KeyError("x")

    def two_lines():
        print("error: one\nerror: two", file=sys.stderr)
        sys.exit(2)

    def elsewhere():
        Path("elsewhere").touch()

    def half():
        Path("x.1.tmp").touch()

    def slow():
        raise hostile.TooSlow

    for main in (bug, two_lines, elsewhere, half, slow):
        monkeypatch.setattr(module, "main", main)
        with pytest.raises(AssertionError, match="data.arithmetic output='x'"):
            bench.run(one)
