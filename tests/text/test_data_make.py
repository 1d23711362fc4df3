"""The commands make_data and compute_magic_prime."""

import collections
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.errors import UserError, run_command
from rwkv_jax.text import compute_magic_prime, make_data, tokenizer
from rwkv_jax.text.binidx import open_binidx
from rwkv_jax.text.corpus import find
from rwkv_jax.text.tokenization import tokenize

ROOT = Path(__file__).parents[2]
OFFICIAL = Path(__file__).parents[1] / "data" / "demo_official.jsonl"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def texts_of(data):
    return [tokenizer.decode(data[item].tolist()) for item in range(len(data))]


def write_jsonl(texts):
    path = Path("x.jsonl")
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n\n" for text in texts), encoding="utf-8"
    )
    return path


def test_published_figures(capsys):
    make_data.main([str(OFFICIAL), "3", "4096"])
    out = capsys.readouterr().out
    assert out == (
        "demo_official: 546 items, 200499 tokens\n"
        "--my_exit_tokens 200499 --magic_prime 47 --ctx_len 4096\n"
    )
    assert sorted(path.name for path in Path().iterdir()) == [
        "demo_official.bin",
        "demo_official.idx",
    ]

    compute_magic_prime.main(["demo_official", "4096"])
    assert capsys.readouterr().out == out

    texts = [json.loads(line)["text"] for line in OFFICIAL.read_bytes().splitlines()]
    written = texts_of(open_binidx("demo_official"))
    passes = [written[start : start + 182] for start in (0, 182, 364)]
    for one in passes:
        assert collections.Counter(one) == collections.Counter(texts)
        assert one != texts
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_items_are_the_tokens_and_their_end():
    make_data.main([str(write_jsonl(["one", "", "一"])), "1", "1", "--output", "sub/v1.5.bin"])
    data = open_binidx("sub/v1.5")
    assert data.tokens.dtype == np.uint16
    items = sorted(data[item].tolist() for item in range(3))
    assert items == sorted([*tokenizer.encode(text), 0] for text in ["one", "", "一"])


def test_the_seed_decides_the_order():
    source = str(write_jsonl(map(str, range(50))))
    for prefix, seed in [("a", "1"), ("b", "1"), ("c", "2")]:
        make_data.main([source, "2", "8", "--output", prefix, "--seed", seed])
    a, b, c = (texts_of(open_binidx(prefix)) for prefix in "abc")
    assert a == b
    assert sorted(a) == sorted(c)
    assert a != c
    # Pinned: files made with a seed stay reproducible from release to release of NumPy.
    assert make_data.shuffled_order(8, 1, 0).tolist() == [2, 4, 7, 5, 0, 6, 3, 1]
    assert sorted(make_data.shuffled_order(1000, 1, 1).tolist()) == list(range(1000))


def test_verify_sees_a_difference(monkeypatch):
    source = write_jsonl(["one two three", "b", "c", "d", "e"])
    corpus = find(source)
    tokenize(corpus, Path("documents"))
    documents = open_binidx("documents")
    monkeypatch.setattr(make_data, "shuffled_order", lambda items, seed, number: np.arange(items))
    make_data.main([str(source), "2", "1", "--output", "written"])
    written = open_binidx("written")
    make_data.verify(corpus, documents, written, 2, 0)

    def refused(data, passes):
        with pytest.raises(UserError, match="differs when read back"):
            make_data.verify(corpus, documents, data, passes, 0)

    refused(written, 1)  # more than was to be written
    tokens = written.tokens
    text, end = tokens.copy(), tokens.copy()
    text[-2] = 99
    end[1] = 99
    refused(dataclasses.replace(written, tokens=text), 2)
    refused(dataclasses.replace(written, tokens=end), 2)
    monkeypatch.setattr(make_data, "shuffled_order", lambda items, *_: np.arange(items)[::-1])
    refused(written, 2)
    monkeypatch.setattr(make_data, "_VERIFIED_ITEMS", 0)
    refused(written, 2)  # by the lengths of the items


def test_what_does_not_verify_is_not_left_behind(monkeypatch):
    def fail(*_):
        raise UserError("differs")

    source = write_jsonl(["one two three"])
    monkeypatch.setattr(make_data, "verify", fail)
    with pytest.raises(UserError, match="differs"):
        make_data.main([str(source), "1", "1"])
    assert list(Path().iterdir()) == [source]


def error_of(main, argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main([str(argument) for argument in argv]))
    assert exit_.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_errors(capsys):
    good = write_jsonl(["one two three"])
    Path("empty.jsonl").write_bytes(b"\n")
    Path("bad.jsonl").write_bytes(b'{"text": "a"}\n\n{"txt": "b"}\n')
    Path("folder").mkdir()
    before = sorted(Path().iterdir())
    for argv, message in [
        (["none.jsonl", 1, 1], "none.jsonl: no such file"),
        (["folder", 1, 1], "folder: no text in this folder"),
        (["empty.jsonl", 1, 1], "empty.jsonl: holds no text"),
        (["bad.jsonl", 1, 1], "bad.jsonl:3: is not"),
        ([good, 0, 1], "N 0: "),
        ([good, 1, 0], "ctx_len 0: "),
        ([good, 1, -5], "ctx_len -5: "),
        ([good, 1, 2], "x.jsonl: 4 tokens are too few for ctx_len 2, "),
        ([good, 1, 1, "--seed", "-1"], "--seed -1: "),
        ([good, 1, 1, "--output", "x.jsonl/y"], "x.jsonl/y: cannot write: "),
    ]:
        assert error_of(make_data.main, argv, capsys).startswith(f"error: {message}"), argv
    assert sorted(Path().iterdir()) == before

    make_data.main(["x.jsonl", "1", "1"])
    for argv, message in [
        (["none", 1], "none.bin: no such file"),
        (["x", 2], "x: 4 tokens are too few for ctx_len 2, "),
        (["x", 0], "ctx_len 0: "),
    ]:
        assert error_of(compute_magic_prime.main, argv, capsys).startswith(f"error: {message}")


def test_as_a_person_runs_it():
    """From a checkout, as processes: exit codes, no traceback, and no seconds spent on JAX."""
    command = [sys.executable, "-X", "importtime", "-m", "data.make_data", "none.jsonl", "1", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: none.jsonl: no such file" in result.stderr
    assert "Traceback" not in result.stderr
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "rwkv_jax.text.make_data" in imported
    assert "jax" not in imported


@pytest.mark.parametrize("command", [make_data, compute_magic_prime])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(["--help"])
    assert exit_.value.code == 0
    assert "\nexample: " in capsys.readouterr().out


def test_the_name_of_a_file_is_printed_as_it_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("[bold]sums.jsonl").write_text('{"text": "1+1=2"}\n' * 20)
    make_data.main(["[bold]sums.jsonl", "1", "2"])
    assert "tokenizing [bold]sums.jsonl" in capsys.readouterr().err
