"""`rwkv-jax COMMAND`: every command under one name. A command's module is imported when it runs."""

import argparse
import difflib
import importlib
import sys
from typing import NoReturn

from rwkv_jax.errors import CommandParser, UserError, run_command

# By heading: name → the module whose `main` it runs, and its line in --help.
COMMANDS = {
    "training": {
        "train": ("rwkv_jax.train", "pretrain a model, continue an official one, or resume a run"),
        "plan": (
            "rwkv_jax.plan",
            "estimate the memory and speed of a run on an absent GPU",
        ),
        "plot": ("rwkv_jax.plot", "plot the loss curves of runs"),
        "doctor": ("rwkv_jax.doctor", "check drivers, packages and settings"),
    },
    "use of a model": {
        "generate": ("rwkv_jax.generate", "continue a text, or chat"),
        "evaluate": ("rwkv_jax.evaluate", "measure a model on text, LAMBADA or arithmetic"),
        "inspect": (
            "rwkv_jax.convert.describe",
            "show the contents of a model, or the differences of two",
        ),
        "verify": ("rwkv_jax.convert.verify", "check which programs can load a model"),
    },
    "text": {
        "make-data": ("rwkv_jax.text.make_data", "write text as a shuffled token file (binidx)"),
        "magic-prime": (
            "rwkv_jax.text.compute_magic_prime",
            "print the options to train on a token file",
        ),
        "arithmetic": ("rwkv_jax.text.arithmetic", "write a text of exact arithmetic"),
    },
    "conversion": {
        "pth-to-st": ("rwkv_jax.convert.pth_to_st", ".pth to the .st of web-rwkv and Ai00"),
        "st-to-pth": ("rwkv_jax.convert.st_to_pth", ".st to .pth"),
        "pth-to-hf": ("rwkv_jax.convert.pth_to_hf", ".pth to a Hugging Face folder"),
        "hf-to-pth": ("rwkv_jax.convert.hf_to_pth", "Hugging Face folder to .pth"),
        "pth-to-orbax": ("rwkv_jax.convert.pth_to_orbax", ".pth to a checkpoint"),
        "orbax-to-pth": ("rwkv_jax.convert.orbax_to_pth", "a run or a checkpoint to .pth"),
    },
}


def main() -> None:
    modules = {name: module for group in COMMANDS.values() for name, (module, _) in group.items()}
    sys.argv[0] = "rwkv-jax"
    name = next(iter(sys.argv[1:]), "--help")
    if name.startswith("-"):
        _parser().parse_args([name])
    if name not in modules:
        # The names of the `python -m` forms lead to the command, too.
        known = {module.rpartition(".")[2]: name for name, module in modules.items()}
        known |= {name: name for name in modules}
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {known[near[0]]}?" if near else "rwkv-jax --help lists the commands"
        raise UserError(f"{name}: no such command; {hint}")
    sys.argv[:2] = [f"rwkv-jax {name}"]
    importlib.import_module(modules[name]).main()


def _parser() -> CommandParser:
    rows = (
        f"\n{heading}:\n" + "".join(f"  {name:14}{line}\n" for name, (_, line) in group.items())
        for heading, group in COMMANDS.items()
    )
    return CommandParser(
        usage="%(prog)s COMMAND [option …]",
        description="Pretrain RWKV-7 models and use them.\n"
        "%(prog)s COMMAND --help shows the options of a command.",
        epilog="".join(rows).lstrip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run() -> NoReturn:
    """The console script."""
    run_command(main)
