"""README and docs: both languages say the same, and what they say is there."""

import ast
import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pallas_kernels
import rwkv_jax
from rwkv_jax.config import parse_train_options

ROOT = Path(__file__).parents[2]
PAIRS = {
    ROOT / "README.md": ROOT / "README.zh-CN.md",
    **{ROOT / "docs" / page.name: page for page in sorted((ROOT / "docs" / "zh-CN").glob("*.md"))},
}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def fenced(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def commands(page: Path) -> list[str]:
    """The shell's lines, continuations joined."""
    blocks = [body for language, body in fenced(page.read_text("utf-8")) if language == "sh"]
    return [line for body in blocks for line in body.replace("\\\n", " ").splitlines() if line]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


@pytest.mark.parametrize(("english", "chinese"), PAIRS.items(), ids=lambda path: path.name)
def test_both_languages_have_the_same_structure(english, chinese):
    texts = [page.read_text("utf-8") for page in (english, chinese)]
    headings, tables, blocks, code = (
        [re.findall(r"^(#+) ", prose(text), re.M) for text in texts],
        [
            [line.count(" | ") for line in text.splitlines() if line.startswith("| ")]
            for text in texts
        ],
        [fenced(text) for text in texts],
        [set(re.findall(r"`(--\w+|[\w./-]+\.\w+)`", prose(text))) for text in texts],
    )
    assert headings[0] == headings[1]
    assert tables[0] == tables[1]
    assert blocks[0] == blocks[1]
    assert code[0] == code[1]
    targets = [
        {target.replace("zh-CN/", "") for target in re.findall(r"\]\((?!http)([^)#]+)", text)}
        for text in texts
    ]
    own = {path.name for path in (english, chinese)} | {f"../{english.name}"}
    assert targets[0] - own == targets[1] - own


def test_there_are_pages_in_both_languages():
    assert len(PAIRS) >= 5 and all(page.is_file() for page in PAIRS)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAIRS, ids=lambda path: path.name)
def test_commands_are_ones_that_exist(page):
    for line in commands(page):
        words = shlex.split(line.replace("$'", "'").removesuffix("&"))
        if words[:2] == ["python", "-m"]:
            path = ROOT / (words[2].replace(".", "/") + ".py")
            assert "run_command(main)" in path.read_text("utf-8"), line
        if words[:3] == ["python", "-m", "rwkv_jax.train"]:
            parse_train_options(words[3:])


def messages() -> str:
    """Every string in the source, what is filled in as …, a line each."""
    found = []
    for folder in ("rwkv_jax", "pallas_kernels", "data", "convert"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [
                        str(part.value) if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    ]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_troubleshooting_quotes_messages_that_we_raise():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = [message for message in re.findall(r"^\| `(.*?)` \|", page, re.M)]
    source = messages()
    assert len(quoted) > 20
    for message in quoted:
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert re.search(pattern, source), message


def modules() -> list[str]:
    return [
        module.name
        for package in (rwkv_jax, pallas_kernels)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]


def test_examples_in_docstrings():
    tried = 0
    for name in ["rwkv_jax", *modules()]:
        if name == "rwkv_jax.inference.lm_eval" and not importlib.util.find_spec("lm_eval"):
            continue
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
        assert result.failed == 0, name
        tried += result.attempted
    assert tried >= 7


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_layout_names_every_module_and_folder(page):
    layout = re.search(r"^    rwkv_jax/ .*?^$", (ROOT / page).read_text("utf-8"), re.M | re.S)[0]
    modules = {path.name for path in (ROOT / "rwkv_jax").glob("[a-z]*.py")}
    assert modules <= set(re.findall(r"\w+\.py", layout))
    rooms = {f"{path.parent.name}/" for path in (ROOT / "rwkv_jax").glob("*/__init__.py")}
    folders = rooms | {
        "rwkv_jax/",
        "pallas_kernels/",
        "data/",
        "convert/",
        "docs/",
        "notebooks/",
        "tests/",
    }
    assert folders <= set(layout.split())


@pytest.mark.parametrize("command", ["rwkv_jax.train", "data.make_data"])
def test_help_on_a_terminal_that_is_not_utf8(command):
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {command} ")
