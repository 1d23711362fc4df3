"""Runs every command of README and docs, and the notebook, as a reader would: in a fresh copy of
the checkout, by bash, one block after the other.

    python -m pytest tests/walkthrough.py

Takes minutes, so its name keeps it out of the suite; `.ci/run` runs it. What is typed is not
changed. But `python` and `pip` are shims, first in the path: training is made small, and planning
quick, by options that they add at the end, and pip installs nothing, it only checks that the extra
exists.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

from pallas_kernels.gpu_targets import can_compile

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/data.md",
    "docs/coming-from-rwkv-lm.md",
    "docs/many-gpus.md",  # what needs SLURM or other machines is fenced as bash, not sh
    "docs/arithmetic.md",
    pytest.param(
        "docs/plan.md",
        marks=pytest.mark.skipif(not can_compile(), reason="needs the compiler for GPUs: [plan]"),
    ),
)
SMALL = (
    "--n_layer 2 --n_embd 64 --ctx_len 32 --micro_bsz 1 --my_exit_tokens 256 --magic_prime 0 "
    "--epoch_begin 0 --accelerator cpu --devices 1 --precision fp32"
)
# Files that the pages take for granted, all of the small shape.
MODELS = ("rwkv7-g1-0.1b.pth", "out/L12-D768-x070/rwkv-3.pth")
# What the page's Python examples take for granted.
PREFACE = "import jax.numpy as jnp\ntokens = more = jnp.array([[24281, 59, 33]])\n"

PYTHON_SHIM = f"""\
#!/bin/bash
[ "$1 $2 $SMALL" = "-m rwkv_jax.train yes" ] && set -- "$@" {SMALL}
# A search compiles for minutes; one batch is compiled once, and the second time remembered.
[ "$1 $2" = "-m rwkv_jax.plan" ] && set -- "$@" --micro_bsz 2
exec {sys.executable} "$@"
"""
PIP_SHIM = """\
#!/bin/bash
for last; do true; done
case "$last" in .|.\\[*\\]) ;; *) echo "pip: what is $last?"; exit 1 ;; esac
for extra in $(echo "$last" | tr -d '.[]' | tr ',' ' '); do
  case " EXTRAS " in *" $extra "*) ;; *) echo "pip: there is no extra $extra"; exit 1 ;; esac
done
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A copy of what git knows of, with a .venv of shims and the files that the pages name."""
    folder = tmp_path / "rwkv-jax"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)

    bin = folder / ".venv" / "bin"
    bin.mkdir(parents=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = " ".join(project["optional-dependencies"])
    for name, text in {"python": PYTHON_SHIM, "pip": PIP_SHIM.replace("EXTRAS", extras)}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    (bin / "activate").touch()
    for cuda in ("cpu", "cuda12", "cuda13"):
        (folder / ".venv" / f".installed-{cuda}").touch()

    for name in ("PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, f"{bin if name == 'PATH' else folder}:{os.environ.get(name, '')}")
    monkeypatch.setenv("SMALL", "yes")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

    chats = [f'{{"text": "User: {n}+1=?\\n\\nAssistant: {n + 1}"}}' for n in range(300)]
    (folder / "mine.jsonl").write_text("\n".join(chats).replace("\n\n", "\\n\\n"))
    run(folder, "python -m data.make_data mine.jsonl 1 32 --output data/minipile")
    run(folder, "python -m rwkv_jax.train --train_stage 1 --proj_dir first")
    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "first" / "rwkv-init.pth", folder / name)
    return folder


def run(folder: Path, script: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{textwrap.indent(done.stdout, '    ')}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs(page, checkout):
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    for name in MODELS:
        if name not in text:  # a run in its folder would continue from it
            (checkout / name).unlink()
    for language, block in blocks:
        if language == "python":
            (checkout / "example.py").write_text(PREFACE + block)
            block = "python example.py"
        print(block, run(checkout, block), sep="\n")


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
def test_the_notebook_runs(checkout, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("SMALL", "no")
    notebook = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=None, resources={"metadata": {"path": str(checkout / "notebooks")}}
    )
    try:
        client.execute()
    finally:
        printed = "\n".join(
            output.get("text", "") + str(output.get("data", ""))
            for cell in notebook.cells
            for output in cell.get("outputs", ())
        )
        print(printed)
    # `!` does not stop a notebook when a command fails: look for what each says at its end.
    for words in (
        "nothing is wrong",
        "--magic_prime",
        "wrote out/sums/rwkv-final.pth",
        "out/sums-loss.html and",
        "<iframe",
        "emb.weight",
        "from-checkpoint.pth",
    ):
        assert words in printed, words
    assert "error:" not in printed
    assert (checkout / "out" / "sums" / "rwkv-final.pth").is_file()


def test_the_notebook_is_committed_without_output():
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / "colab.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells)
