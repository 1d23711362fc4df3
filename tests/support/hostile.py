"""Hostile values for each option of each command: a result, or one line of error.

    python -m tests.support.hostile       (or --command rwkv_jax.plot --option --output)

The table is made from the commands' own parsers, so that a new option is in it by itself. Each
combination of a command, an option and a value is a run of the command's `main` in this process,
on the smallest model and data that it works on. Watched are the exit status, what is printed (one
line "error: …" where the status is not 0, and never a traceback), the time, and the files: what a
command writes is what its command line names, and what fails leaves nothing that is half done.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.errors import CommandParser, run_command
from rwkv_jax.official_options import OFFICIAL_OPTIONS
from rwkv_jax.parallel import sharding
from rwkv_jax.planning import memory
from rwkv_jax.training.step import Metrics, TrainState

ROOT = Path(__file__).parents[2]
SECONDS = 60
MEMORY = 8 << 30  # bytes

NUMBERS = [
    "", " ", "x", "-1", "0", "-0", "1", " 1 ", "+1", "1.5", "1e-400", "1e999", "-1e999", "nan",
    "-nan", "inf", str(2**63), str(-(2**63) - 1), str(10**30), "9" * 5000, "１２", "²", "1_000",
    "0x10", "1,000", "1 2", "\n", "-", "--", "--help", "[red]", "%s", "\udcff",
]  # fmt: skip
TEXTS = [
    "", " ", "x", "-1", "-", "--", "%s%d%(x)s", "{}", "[/red]", "\n", "\x01",
    "\x1b[2J", "\udcff", "文字😀", "１", "a" * 10_000, "$HOME", "'\"", "../..", "None", "nan",
]  # fmt: skip
# Names in braces are of `fixtures`.
PATHS = [
    "", ".", "./", "/", "..", "../", "~", "~nobody-here/x", "missing", "missing/deep/x", "missing/",
    "{folder}", "{folder}/", "{garbage}", "{garbage}/x", "{empty}", "{loop}",
    "{unreadable}", "/dev/null", "/dev/full", "/proc/self/mem", "new\nline", "[/red]", "100%s",
    "-", "--", "-x", " ", "文 字😀", "\udcff", "x" * 300, "x" * 10_000, "{model}", "{text}", ".bin",
    ".idx", ".jsonl", ".pth",
]  # fmt: skip

# The smallest command line that works: what is positional, and options. Outputs are relative.
BASELINES: dict[str, tuple[list[str], list[str]]] = {
    "rwkv_jax.train": (
        [],
        "--n_layer 1 --n_embd 64 --vocab_size 512 --ctx_len 16 --micro_bsz 1 --devices 1 "
        "--my_exit_tokens 32 --data_file {data} --proj_dir out --enable_progress_bar False".split(),
    ),
    "rwkv_jax.generate": ([], "--load_model {model} --prompt 1 --length 2 --seed 0".split()),
    "rwkv_jax.evaluate": ([], "--load_model {model} --data_file {text}".split()),
    "rwkv_jax.plot": (["{log}"], []),
    "rwkv_jax.plan": (
        [],
        "--gpu h100 --n_layer 1 --n_embd 64 --vocab_size 512 --ctx_len 16 --micro_bsz 1".split(),
    ),
    "rwkv_jax.doctor": ([], []),
    "data.make_data": (["{text}", "1", "8"], ["--output", "made"]),
    "data.compute_magic_prime": (["{data}", "8"], []),
    "data.arithmetic": (["sums.jsonl"], ["--count", "3"]),
    "convert.describe": (["{model}"], []),
    "convert.verify": (["{model}"], []),
    "convert.pth_to_orbax": (["{model}", "checkpoint"], []),
    "convert.orbax_to_pth": (["{checkpoint}", "model.pth"], []),
    "convert.pth_to_hf": (["{model}", "hf"], []),
    "convert.hf_to_pth": (["{hf}", "model.pth"], []),
    "convert.pth_to_st": (["{model}", "model.st"], []),
    "convert.st_to_pth": (["{st}", "model.pth"], []),
}


def commands() -> list[str]:
    """The modules that are commands."""
    folders = ("rwkv_jax", "data", "convert")
    files = sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))
    return [
        f"{path.parent.name}.{path.stem}"
        for path in files
        if '__main__":\n    run_command(main)' in path.read_text(encoding="utf-8")
    ]


def parser_of(command: str) -> list[argparse.Action]:
    """The arguments that a command defines; plan takes those of train as well."""

    class Caught(BaseException):
        pass

    def catch(self: CommandParser, *_: Any) -> None:
        raise Caught(self)

    main = importlib.import_module(command).main
    with (
        mock.patch.object(CommandParser, "parse_known_args", catch),
        mock.patch.object(sys, "argv", [command]),
    ):
        try:
            main()
        except Caught as caught:
            actions = list(caught.args[0]._actions)
    if command == "rwkv_jax.plan":
        known = {name for action in actions for name in action.option_strings}
        more = parser_of("rwkv_jax.train")
        actions += [action for action in more if not known & set(action.option_strings)]
    return actions


def kind_of(parse: Any) -> str:
    """path, number or text: by what an argument's type makes of some words."""
    made = []
    for word in ("~", "1"):
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            made.append((parse or str)(word))
    if parse is Path or os.path.expanduser("~") in map(str, made):
        return "path"
    return "number" if any(isinstance(value, int | float) for value in made) else "text"


@dataclasses.dataclass(frozen=True)
class Combination:
    """A run: what it is called, and its command line with names of fixtures in braces."""

    command: str
    option: str
    value: str
    argv: tuple[str, ...]


def combinations(command: str) -> Iterator[Combination]:
    """All of a command."""
    positional, options = BASELINES[command]
    place = 0
    for action in parser_of(command):
        if action.dest in ("help", "version"):
            continue
        kind = kind_of(action.type)
        values = {"path": PATHS, "number": NUMBERS, "text": TEXTS}[kind]
        if action.choices and not isinstance(action.choices, range):
            values = [*TEXTS, *(str(choice) for choice in action.choices)]
        elif kind == "text" and action.option_strings:
            values = [*TEXTS, *PATHS]  # also of a path that is read as a text
        if action.nargs == 0:
            values = ["x", ""]
        for value in dict.fromkeys(values):
            if action.option_strings:
                argv = [*positional, *options, f"{action.option_strings[-1]}={value}"]
            else:
                argv = [*positional[:place], value, *positional[place + 1 :], *options]
                if value.startswith("-") and value not in ("-", "--"):
                    argv = [*options, "--", *positional[:place], value, *positional[place + 1 :]]
            name = action.option_strings[-1] if action.option_strings else action.dest
            yield Combination(command, name, value, tuple(argv))
        if action.nargs == 0:
            flag = action.option_strings[-1]
            yield Combination(command, flag, "(given)", (*positional, *options, flag))
        elif action.option_strings:
            flag = action.option_strings[-1]
            yield Combination(command, flag, "(none)", (*positional, *options, flag))
        else:
            place += 1
    for argument in ("-", "--", "--nonsense", "--help", "-h", "\udcff", "[/red]", "--=", "-1", ""):
        yield Combination(command, "(extra)", argument, (*positional, *options, argument))
    if positional or options:
        yield Combination(command, "(none at all)", "", ())
        yield Combination(command, "(as it works)", "", (*positional, *options))


def fixtures(folder: Path) -> dict[str, str]:
    """Files of each kind, that no command may change."""
    from rwkv_jax.checkpoints.weights import save_pth
    from rwkv_jax.config import ModelConfig
    from rwkv_jax.model.initialisation import init_params
    from rwkv_jax.text.binidx import BinIdxWriter

    folder.mkdir(parents=True)
    model = folder / "model.pth"
    config = ModelConfig(n_layer=1, n_embd=64, vocab_size=512)
    save_pth(model, init_params(config, 0))
    made = {"pth_to_orbax": "checkpoint", "pth_to_hf": "hf", "pth_to_st": "st.st"}
    for name, target in made.items():
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(f"rwkv_jax.convert.{name}").main(
                [str(model), str(folder / target)]
            )
    with BinIdxWriter(folder / "data") as writer:
        writer.append(np.arange(400) % 99 + 1, [100] * 4)
    lines = [json.dumps({"text": "1 2 + 3 4 = 4 6"}) + "\n"] * 8
    (folder / "text.jsonl").write_text("".join(lines))
    (folder / "log").mkdir()
    log = "0 4.875856 131.0871 0.00059906 2024-01-01 00:00:00.000000 0\n"
    (folder / "log" / "train_log.txt").write_text(log)
    (folder / "folder").mkdir()
    (folder / "folder" / "note.txt").write_text("a note\n")
    (folder / "garbage").write_bytes(bytes(range(256)) * 8)
    (folder / "empty").touch()
    (folder / "unreadable").write_bytes(b"secret")
    (folder / "unreadable").chmod(0)
    (folder / "loop").symlink_to("loop")
    names = {path.stem: str(path) for path in folder.iterdir()}
    return names | {"data": str(folder / "data")}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Each name below a folder: size and time of the last change."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path)] = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


class TooSlow(BaseException):
    """Not an Exception: no command may catch it."""


def _too_slow(*_: object) -> None:
    raise TooSlow


def _no_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, Metrics]:
    """A step of training that has nothing to compile: all around it is as it is."""
    return state, Metrics(jnp.float32(1), jnp.float32(1), jnp.bool_(False))


class Bench:
    """Where combinations are run: files, a home, a cache, and an empty folder for each."""

    def __init__(self, root: Path):
        self.root = root
        self.names = fixtures(root / "in")
        self.took = 0.0
        if jax.config.values["jax_compilation_cache_dir"] is None:  # it is not, under pytest
            # Beside the root, and so kept from one run to the next.
            jax.config.update("jax_compilation_cache_dir", str(root.parent / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        for name in ("home", "cache"):
            (root / name).mkdir()

    def run(self, one: Combination) -> str:
        """What became of it: result, refused (an error in one line), or help.

        Raises:
            AssertionError: anything else.
        """
        work = self.root / "work" / "here"
        shutil.rmtree(self.root / "work", ignore_errors=True)
        work.mkdir(parents=True)
        argv = [_fill(argument, self.names) for argument in one.argv]
        before = snapshot(self.root)
        out, err = io.StringIO(), io.StringIO()
        settings = {"HOME": str(self.root / "home"), "XDG_CACHE_HOME": str(self.root / "cache")}
        where, began, status = os.getcwd(), time.process_time(), -1
        numbers = (signal.SIGPROF, signal.SIGALRM)
        before_handlers = {number: signal.signal(number, _too_slow) for number in numbers}
        about = f"{one.command} {one.option}={one.value[:60]!r}"
        measure = mock.Mock(return_value=memory.StepCost(1, 1, 1, 1, 1, 1.0))
        with (
            mock.patch.dict(os.environ, settings),
            mock.patch.object(sys, "argv", [one.command, *argv]),
            mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO())),
            mock.patch("rwkv_jax.training.run.build_step", lambda *_: _no_step),
            # A plan compiles nothing either, and needs no CUDA plugin.
            mock.patch("rwkv_jax.planning.plans.measure", measure),
            mock.patch("rwkv_jax.planning.batch_size.measure", measure),
            mock.patch("rwkv_jax.planning.plans.device_mesh", lambda *_: sharding.make_mesh(1)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            os.chdir(work)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of processor time
            signal.alarm(10 * SECONDS)
            try:
                run_command(importlib.import_module(one.command).main)
            except SystemExit as exit:
                status = exit.code if isinstance(exit.code, int) else int(bool(exit.code))
            except TooSlow:
                raise AssertionError(f"{about}: not done after {SECONDS} s") from None
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
                for number, handler in before_handlers.items():
                    signal.signal(number, handler)
                os.chdir(where)
        try:
            return self._judge(one, about, status, out.getvalue(), err.getvalue(), argv, before)
        finally:
            self.took = time.process_time() - began
            shutil.rmtree(self.root / "work", ignore_errors=True)
            for name in ("home", "cache"):
                shutil.rmtree(self.root / name, ignore_errors=True)
                (self.root / name).mkdir()

    def _judge(
        self,
        one: Combination,
        about: str,
        status: int,
        out: str,
        err: str,
        argv: list[str],
        before: dict[str, tuple[int, int]],
    ) -> str:
        shown = f"{about}: status {status}\n{out[-500:]}{err[-1500:]}"
        assert "Traceback" not in out + err, shown
        assert "error: unexpected" not in err, shown
        after = snapshot(self.root)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        cache = str(self.root / "cache")
        strange = [
            name for name in changed if not name.startswith(cache) and not self._named(name, argv)
        ]
        assert not strange, f"{shown}\nchanged: {strange}"
        halves = [name for name in changed if Path(name).name.endswith((".tmp", ".partial"))]
        assert not halves, f"{shown}\nhalf done: {halves}"
        if status == 0:
            return "help" if "usage:" in out else "result"
        if status == 1:  # plan: does not fit; train: stopped; doctor: something is wrong
            assert one.command in ("rwkv_jax.plan", "rwkv_jax.doctor"), shown
            return "result"
        assert status == 2, shown
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and err.splitlines()[-1] == errors[0], shown
        return "refused"

    def _named(self, changed: str, argv: list[str]) -> bool:
        """Whether a command line names a path, or the folder that it lies in, or its beginning."""
        here = self.root / "work" / "here"
        home = str(self.root / "home")
        for argument in argv:
            for word in (argument, argument.partition("=")[2]):
                if word:
                    word = home + word[1:] if word == "~" or word.startswith("~/") else word
                    path = os.path.normpath(here / word)
                    if changed.startswith(path) or path.startswith(changed + "/"):
                        return True
        return changed.startswith(str(here / "loss."))  # plot's default


def _fill(argument: str, names: dict[str, str]) -> str:
    for name, path in names.items():
        argument = argument.replace(f"{{{name}}}", path)
    return argument


def skipped(one: Combination) -> bool:
    """What must not be tried: files in /, by root."""
    option = one.option.removeprefix("--")
    return option == "proj_dir" and one.value == "/" and os.access("/", os.W_OK)


def table(command: str) -> list[Combination]:
    """What is run of a command."""
    return [one for one in combinations(command) if not skipped(one)]


def part(command: str) -> list[Combination]:
    """What the suite runs: of each option some values, which differ from option to option."""
    chosen: dict[str, list[Combination]] = {}
    for one in table(command):
        default = one == Combination("rwkv_jax.train", "(none at all)", "", ())  # 0.1b: gigabytes
        if one.option != "(as it works)" and not default:
            chosen.setdefault(one.option, []).append(one)
    step = 23  # prime to the lengths of the lists, so that all of a list is reached
    assert all(math.gcd(step, len(values)) == 1 for values in chosen.values())
    few = {f"--{name}" for name in OFFICIAL_OPTIONS}  # most of which run the whole trainer
    some = (
        values[(step * number + more) % len(values)]
        for number, (option, values) in enumerate(chosen.items())
        for more in range(1 if option in few else 2 if len(chosen) > 30 else 3)
    )
    return list(dict.fromkeys(some))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--command", choices=commands(), nargs="*", default=commands())
    parser.add_argument("--option", help="only this one, without dashes")
    parser.add_argument("--keep_going", action="store_true", help="list every surprise")
    parser.add_argument("--verbose", action="store_true", help="a line for each combination")
    options = parser.parse_args()
    # What wants more memory than a machine has is refused, and not this process killed.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ.setdefault("WANDB_MODE", "disabled")
    began, total, surprises = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name).resolve() / "root")
        for command in options.command:
            outcomes: collections.Counter[str] = collections.Counter()
            start = time.monotonic()
            for one in table(command):
                if options.option in (None, one.option.removeprefix("--")):
                    try:
                        outcome = bench.run(one)
                    except AssertionError as surprise:
                        if not options.keep_going:
                            raise
                        outcome = "SURPRISE"
                        print(f"--- {surprise}", flush=True)
                    outcomes[outcome] += 1
                    if options.verbose:
                        print(outcome, round(bench.took, 2), one.option, repr(one.value[:60]))
            total += outcomes.total()
            surprises += outcomes["SURPRISE"]
            counts = ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items()))
            seconds = time.monotonic() - start
            print(f"{command}: {outcomes.total()} runs: {counts}; {seconds:.0f} s", flush=True)
    print(f"{total} runs, {surprises} surprises, {time.monotonic() - began:.0f} s")
    sys.exit(bool(surprises))


if __name__ == "__main__":
    main()
