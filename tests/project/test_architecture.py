"""What may import what, read off the source."""

import ast
import contextlib
import functools
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import rwkv_jax

ROOT = Path(__file__).parents[2]
# Each package and those that it may import, beside the libraries.
LAYERS = {
    "pallas_kernels": {"pallas_kernels"},
    "rwkv_jax": {"rwkv_jax", "pallas_kernels"},
    "data": {"rwkv_jax"},
    "convert": {"rwkv_jax"},
}
OURS = {*LAYERS, "tests", "benchmarks"}
# The rooms of rwkv_jax, in the order of their imports. The commands may import them all.
ROOMS = [
    "errors", "files", "official_options", "config", "device", "text", "tracking", "model",
    "parallel", "checkpoints", "convert", "inference", "training", "planning", "diagnosis",
]  # fmt: skip
COMMANDS = {"train", "generate", "evaluate", "plan", "plot", "doctor", "cli", "__main__"}


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file, under any alias."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from rwkv_jax import pth` may name a module: both readings count.
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, package
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_imports_run_one_way(package):
    for path in files(package):
        assert roots(path) & OURS <= LAYERS[package], path


def room(path: Path) -> str:
    return path.relative_to(ROOT / "rwkv_jax").parts[0].removesuffix(".py")


def test_rooms_import_those_before_them():
    """The package's own `__init__` is the way in for a user, whose imports stand in functions."""
    for path in files("rwkv_jax"):
        at = room(path)
        if at in COMMANDS | {"__init__"}:
            continue
        allowed = {*ROOMS[: ROOMS.index(at) + 1], "__version__", "load_params", "load_tuned"}
        used = {name.split(".")[1] for name in imported(path) if name.startswith("rwkv_jax.")}
        assert used <= allowed, f"{path} imports {used - allowed}"


@pytest.mark.parametrize("folder", ["data", "convert"])
def test_the_folders_of_commands_are_thin(folder):
    """Whoever installs the wheel does not have them, so all code is in the package."""
    for path in files(folder):
        nodes = {type(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))}
        assert not nodes & {ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For}, path


def test_every_module_has_a_room_that_lists_it():
    folders = {path for path in (ROOT / "rwkv_jax").iterdir() if (path / "__init__.py").exists()}
    assert {path.name for path in folders} <= set(ROOMS)
    for folder in folders:
        modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        listed = re.findall(r"^ *(\w+\.py)  *\w", (folder / "__init__.py").read_text("utf-8"), re.M)
        assert sorted(listed) == sorted(modules), folder


def test_tests_mirror_the_rooms():
    tested = {path.name for path in (ROOT / "tests").iterdir() if list(path.glob("test_*.py"))}
    rooms = {path.parent.name for path in (ROOT / "rwkv_jax").glob("*/__init__.py")}
    assert tested == rooms | {"commands", "kernels", "benchmarks", "project"}


def test_orbax_is_imported_in_one_place():
    users = [path for package in LAYERS for path in files(package) if "orbax" in roots(path)]
    assert [path.relative_to(ROOT).as_posix() for path in users] == [
        "rwkv_jax/checkpoints/store.py"
    ]


def test_torch_is_for_comparison_alone():
    for package in LAYERS:
        for path in files(package):
            assert not roots(path) & {"torch", "rwkv", "deepspeed", "lightning"}, path


def test_optional_services_are_imported_on_demand():
    """wandb takes a second and writes to the home folder: nobody who does not ask pays for it."""
    for path in files("rwkv_jax"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("wandb" in ast.unparse(node) for node in top), path


def test_modules_do_not_import_each_other_in_circles():
    graph = {}
    for path in files("rwkv_jax") + files("pallas_kernels"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        graph[".".join(parts).removesuffix(".__init__")] = imported(path)
    graph = {module: (names & set(graph)) - {module} for module, names in graph.items()}
    # A package's own __init__ may import its modules and stand for it: neither is a circle.
    graph = {
        module: {name for name in names if not module.startswith(f"{name}.")}
        for module, names in graph.items()
    }
    del graph["rwkv_jax"]  # its imports stand in functions, so that `import rwkv_jax` is quick
    while graph:
        leaves = {module for module, names in graph.items() if not names & set(graph)}
        assert leaves, f"in a circle: {sorted(graph)}"
        graph = {module: names for module, names in graph.items() if module not in leaves}


# Where jax has a CUDA plugin and no driver, it is imported ahead, for the plugin to be silent.
WITHOUT_PLUGIN = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if "jax_cuda" in name else find(name, *more)
"""


def test_commands_on_data_run_without_jax():
    """Neither they nor what they import: a file is tokenized on any machine, and at once."""
    modules = [f"data.{path.stem}" for path in files("data") if path.stem != "__init__"]
    code = WITHOUT_PLUGIN + (
        f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\n"
        "print(sorted({'jax', 'torch', 'orbax', 'flax', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"


def test_no_function_is_longer_than_a_screen():
    """60 lines, but for the body of a kernel, which is one computation."""
    long = []
    for package in LAYERS:
        for path in files(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef) and not path.match("wkv7/triton/kernels.py"):
                    if node.end_lineno - node.lineno >= 60:
                        long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not long


def test_the_picture_is_drawn_from_this_source():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    assert drawn["OUTPUT"].read_text("utf-8") == drawn["draw"](drawn["graph"]())
    assert set(drawn["graph"]()) >= set(ROOMS) - {"errors", "files", "official_options", "config"}


def test_the_list_of_commands_is_quick():
    """`rwkv-jax --help` imports no command, and so neither jax nor numpy."""
    code = WITHOUT_PLUGIN + (
        "import sys\nsys.argv = ['rwkv-jax', '--help']\nfrom rwkv_jax import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n"
        "    print(sorted({'jax', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith("usage: ") and done.stdout.endswith("\n[]\n")


@functools.cache
def names_in(path: Path) -> set[str]:
    """What can be imported from a module: what it binds at its top level."""
    bound: set[str] = set()
    statements = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        else:
            stored = (x for x in ast.walk(node) if isinstance(x, ast.Name))
            bound |= {x.id for x in stored if isinstance(x.ctx, ast.Store)}
            statements += [x for x in ast.iter_child_nodes(node) if isinstance(x, ast.stmt)]
    return bound


@functools.cache
def exists(module: str, name: str) -> bool:
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if (path / f"{name}.py").exists() or (path / name).is_dir():
        return True
    if module == "rwkv_jax" and name in rwkv_jax._PUBLIC:
        return True
    return file.exists() and name in names_in(file)


@pytest.mark.slow
def test_every_import_of_our_own_finds_its_name():
    """Also within functions, and in programs that tests hold as text."""
    missing, tried = [], 0
    for path in (path for package in OURS for path in files(package)):
        trees = [ast.parse(path.read_text(encoding="utf-8"))]
        for node in ast.walk(trees[0]):
            if isinstance(node, ast.Constant) and "import " in str(node.value):
                with contextlib.suppress(SyntaxError):
                    trees.append(ast.parse(textwrap.dedent(str(node.value))))
        for node in (node for tree in trees for node in ast.walk(tree)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OURS:
                tried += len(node.names)
                missing += [
                    f"{path.relative_to(ROOT)}: from {node.module} import {alias.name}"
                    for alias in node.names
                    if not exists(str(node.module), alias.name)
                ]
    assert not missing and tried > 1000


def test_public_modules_are_imported_from_the_package():
    code = WITHOUT_PLUGIN + (
        "import sys\nfrom rwkv_jax import pth, tokenizer, weights\n"
        "print(tokenizer.encode('a'), pth.read.__name__, weights.save_pth.__name__)\n"
        "print('jax' in sys.modules, hasattr(sys.modules['rwkv_jax'], 'initial_model'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[98] read save_pth\nFalse False\n"
