"""Text files of every kind: the same tokens by every reader, and one line for what is none."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_jax import files
from rwkv_jax.errors import UserError
from rwkv_jax.inference import tasks
from rwkv_jax.text import corpus, make_data, token_cache, tokenization, tokenizer
from rwkv_jax.text.binidx import open_binidx
from rwkv_jax.text.corpus import find
from rwkv_jax.text.dataset import open_dataset

TEXTS = ["one two\nthree\r\n", "a\u2028b\u0085c\x0cd\x0be \x00", "“走吧”，😀", " "]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def lines_of(texts, key="text"):
    lines = [
        json.dumps({key: text, "id": n}, ensure_ascii=n % 2 > 0) for n, text in enumerate(texts)
    ]
    return "".join(line + "\n" for line in lines).encode()


def compressed(content: bytes, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.compress(content[:9], mtime=0) + gzip.compress(
            content[9:], mtime=0
        )  # members, as pigz has
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(content[:9]) + zstd.compress(content[9:])


def write_parquet(path, texts, key="text", kind="string"):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array(texts, getattr(pyarrow, kind)() if kind != "dictionary" else None)
    column = column.dictionary_encode() if kind == "dictionary" else column
    table = pyarrow.table({"id": list(range(len(texts))), key: column})
    parquet.write_table(table, path, row_group_size=3)


def write(name: str, texts=TEXTS, key="text") -> str:
    """Files that hold the texts, of the kind that the name says; returns what to give."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    kind, compression = corpus._endings(path)
    if name.endswith("/"):
        path.mkdir()
        for number, (text, ending) in enumerate(zip(texts, (".jsonl", ".JSONL.gz"), strict=False)):
            write(f"{name}{number}{ending}", [text], key)
        (path / "2").mkdir()
        write(f"{name}2/x.jsonl", texts[2:], key)
        for stray in (".DS_Store", "dataset_info.json", "z.pdf", "._0.jsonl", ".ipynb/0.jsonl"):
            (path / stray).parent.mkdir(exist_ok=True)
            (path / stray).write_bytes(b"{\xff")
    elif kind == ".parquet":
        write_parquet(path, texts, key)
    else:
        content = "".join(texts).encode() if kind == ".txt" else lines_of(texts, key)
        path.write_bytes(compressed(content, compression) if compression else content)
    return name


NAMES = (
    "d.jsonl", "D.JSONL", "d.json", "d.jsonl.gz", "d.jsonl.zst", "d.parquet", "folder/",
    "[x] 语.jsonl",
)  # fmt: skip


def by_every_reader(name: str, **options) -> list[list[int]]:
    """The documents' tokens as the trainer, make_data and evaluate have them: the same."""
    trained = open_dataset(name, 1, **options).tokens.tolist()
    arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
    make_data.main([name, "1", "1", "--output", "made", *arguments])
    made = open_binidx("made")
    items = [made[item].tolist() for item in range(len(made))]
    order = make_data.shuffled_order(len(items), 0, 0).tolist()
    documents = [items[order.index(number)] for number in range(len(items))]
    assert trained == sum(documents, [])
    evaluated = tasks.text_documents(find(name, **options).documents())
    assert [[*document.ids, 0] for document in evaluated] == documents
    return documents


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_by_every_reader(name, capsys):
    write(name)
    expected = [[*tokenizer.encode(text), 0] for text in TEXTS]
    assert by_every_reader(name) == expected
    err = capsys.readouterr().err
    assert ("skipped: dataset_info.json, z.pdf" in err) == (name == "folder/")
    if name != "folder/":
        assert by_every_reader(write("k-" + name, key="内容"), text_key="内容") == expected


@pytest.mark.parametrize("name", ["d.txt", "D.TXT.gz"])
def test_a_plain_file_is_one_document(name):
    text = "\ufeff" + "".join(TEXTS)
    assert by_every_reader(write(name, [text])) == [[*tokenizer.encode(text[1:]), 0]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("t/*.jsonl", ["t/a.jsonl", "t/b.jsonl"]),
        ("t/**/*.jsonl", ["t/a.jsonl", "t/b.jsonl", "t/sub/c.jsonl"]),
        ("t/*", ["t/a.jsonl", "t/b.jsonl", "t/n.json", "t/z.txt"]),
        ("t", ["t/a.jsonl", "t/b.jsonl", "t/sub/c.jsonl", "t/z.txt"]),
        ("t/n.json", ["t/n.json"]),
    ],
)
def test_which_files_count(given, expected):
    Path("t/sub").mkdir(parents=True)
    Path("t/.git").mkdir()
    for name in ("z.txt", "b.jsonl", "a.jsonl", "n.json", "x.csv", ".h.jsonl", ".git/g.txt"):
        Path("t", name).write_text("x")
    Path("t/sub/c.jsonl").write_text("x")
    assert [path.as_posix() for path in find(given).files] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a"}'.encode("utf-16"), "d.jsonl: is UTF-16: convert it with iconv"),
        ("d.jsonl", '{"text": "a"}'.encode("utf-16-le"), "d.jsonl: is UTF-16: convert"),
        ("d.txt", "a".encode("utf-16"), "d.txt: is UTF-16: convert"),
        ("d.txt", b"a\nb\nc\xff", r"d.txt:1: byte 5 \(line 3\) is not UTF-8; convert .*GB18030"),
        ("d.txt", b" \n", "d.txt: holds no text"),
        ("d.jsonl", gzip.compress(b"{}", mtime=0), r"d.jsonl: is gzip: give it the extension \.gz"),
        (
            "d.jsonl.gz",
            gzip.compress(b'{"text": "a"}', mtime=0)[:-3],
            "d.jsonl.gz: cannot be .* incomplete",
        ),
        ("d.jsonl.gz", b'{"text": "a"}', "d.jsonl.gz: cannot be decompressed: Not a gzipped file"),
        (
            "d.jsonl",
            b'{"text": "a"}\r{"text": "b"}',
            r"d.jsonl:1: is not valid JSON: .* tr '\\r' '\\n'",
        ),
        ("d.json", b'[\n{"text": "a"}\n]', r"d.json:1: is not valid JSON: .* jq -c '\.\[\]'"),
        ("d.json", b'[{"text": "a"}]', r"d.json:1: is a JSON array; .* jq -c '\.\[\]'"),
        ("d.json", b'{\n "text": "a"\n}', "d.json:1: is not valid JSON: .* on one line: use jq -c"),
        (
            "d.jsonl",
            b'{"text": "a"}{"text": "b"}',
            "d.jsonl:1: is not valid JSON: .* on its own line",
        ),
        ("d.jsonl", b'{"text": "a"}\n\x1a', r"d.jsonl:2: is not valid JSON: .* in '\\x1a'"),
        ("d.jsonl", b'{"a\\n": "x", "b": 1}', r'strings in it: "a\\n": choose one with --text_key'),
        ("d.jsonl", b'{"messages": []}', 'no string "text"; its keys are "messages"'),
        ("d.parquet", b"PAR1x", "d.parquet: cannot be read as Parquet: "),
        (
            "d.csv",
            b"a,b",
            r"d.csv: is neither a text file \(with the extension \.jsonl, .* nor the PREFIX",
        ),
        ("e.jsonl", b"{}", r"d.jsonl: no such file; did you mean e.jsonl\?"),
        ("d.jsonl.gz", b"{}", r"d.jsonl: no such file; did you mean d.jsonl.gz\?"),
    ],
)
def test_what_cannot_be_used_is_one_line(name, content, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    Path(name).write_bytes(content)
    given = "d.jsonl" if "no such file" in message else name
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        open_dataset(given, 1)
    assert os.listdir() == [name]


def test_a_pipe_is_refused():
    """Its second reader would wait forever."""
    os.mkfifo("d.jsonl")
    with pytest.raises(UserError, match="d.jsonl: is a pipe, but text is read twice"):
        open_dataset("d.jsonl", 1)


@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".jsonl.zst", ".parquet"])
def test_a_name_without_its_ending(ending):
    Path(f"l{ending}").write_bytes(b"{}")
    with pytest.raises(UserError, match=rf"^l: no such file; did you mean l{ending}\?$"):
        open_dataset("l", 1)


def test_folders_and_patterns_without_text():
    for given, message in [
        ("", "'' is not data"),
        ("/", "'/' is not data: give a text file, a folder"),
        (".", ".: no text in this folder"),
        ("*.jsonl", r"\*\.jsonl: matches no text file"),
    ]:
        with pytest.raises(UserError, match=message):
            find(given)
    Path("tok.idx").touch()
    with pytest.raises(UserError, match=r"for the token files in it, give tok$"):
        find(".")


def test_token_files_before_text():
    make_data.main([write("d.jsonl"), "1", "1"])  # d.bin and d.idx
    Path("d").mkdir()
    write("d/x.jsonl")
    assert corpus.is_binidx("d") and corpus.is_binidx("d.bin") and not corpus.is_binidx("d.jsonl")
    Path("d.idx").unlink()
    assert not corpus.is_binidx("d")


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_rows_of_parquet(kind):
    write_parquet(Path("p.parquet"), [*TEXTS, None, "end"], kind=kind)
    with pytest.raises(UserError, match=r"p\.parquet:5: is empty \(null\); --on_bad_line skip"):
        open_dataset("p.parquet", 1)
    texts = [text for _, text in find("p.parquet", on_bad_line="skip").documents()]
    assert texts == [*TEXTS, "end"]
    with pytest.raises(UserError, match='no column "words"; choose one with --text_key: id, text'):
        open_dataset("p.parquet", 1, text_key="words")
    with pytest.raises(UserError, match='the column "id" is int64, not text'):
        open_dataset("p.parquet", 1, text_key="id")


def test_a_package_that_is_missing(monkeypatch):
    for name, package in (("x.parquet", "pyarrow"), ("x.jsonl.zst", "backports.zstd")):
        Path(name).write_bytes(b"x")
        for module in (package, "compression.zstd"):
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf"pip install {package} \(the extra data\)$"):
            open_dataset(name, 1)


BAD = [b'{"text": 1}\n', b"[\n", b'{"text": "\\ud83d"}\n', b'{"text": "\xff"}\n']


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_skipped_counted_and_listed(workers, capsys, monkeypatch):
    monkeypatch.setattr(tokenization, "_WORKER_BYTES", 20)
    monkeypatch.setattr(corpus, "_PIECE_BYTES", 50)
    good = lines_of(TEXTS).splitlines(keepends=True)
    Path("x.jsonl").write_bytes(b"".join([good[0], *BAD[:2], good[1], b"\n", *BAD[2:], *good[2:]]))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(UserError, match=r"x\.jsonl:2: .*; --on_bad_line skip skips it$"):
        open_dataset("x.jsonl", 1)
    for cores in (workers, 1):  # the second time from the cache
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        data = open_dataset("x.jsonl", 1, on_bad_line="skip")
        rows = [row.split("\t") for row in data.skipped.read_text("utf-8").split("\n")]
        assert [row[0] for row in rows] == [f"x.jsonl:{n}" for n in (2, 3, 6, 7)] + [""]
    assert rows[0][1].startswith('is not {"text": "…"}') and json.loads(rows[0][2]) == '{"text": 1}'
    assert data.tokens.tolist() == [i for text in TEXTS for i in [*tokenizer.encode(text), 0]]

    make_data.main(["x.jsonl", "1", "1", "--on_bad_line", "skip"])
    assert Path("x.skipped.tsv").read_bytes() == data.skipped.read_bytes()
    err = capsys.readouterr().err
    assert "note: bad lines skipped: 4; x.skipped.tsv lists them" in err
    skipped = []
    assert len(list(find("x.jsonl", on_bad_line="skip").documents(skipped))) == len(TEXTS)
    assert [bad.row() for bad in skipped] == data.skipped.read_text("utf-8").splitlines(True)

    Path("x.jsonl").write_bytes(b"".join(BAD))
    with pytest.raises(UserError, match=r"no text: every line was skipped; x\.jsonl:1: is not"):
        open_dataset("x.jsonl", 1, on_bad_line="skip")
    Path("x.jsonl").write_bytes(good[0])
    assert open_dataset("x.jsonl", 1, on_bad_line="skip").skipped is None
    make_data.main(["x.jsonl", "1", "1"])
    assert not Path("x.skipped.tsv").exists()


def test_what_the_cache_depends_on(in_an_empty_folder):
    kept = in_an_empty_folder / "cache" / "rwkv_jax"

    def entries(*arguments, **options):
        open_dataset(*arguments, **options)
        return len(list(kept.glob("*.blake2b")))

    record = b'{"text": "a b c", "b": "d e f"}\n'
    Path("x.jsonl").write_bytes(record)
    assert entries("x.jsonl", 1) == 1 == entries("x.jsonl", 1)
    assert entries("x.jsonl", 1, text_key="b") == 2
    assert entries("x.jsonl", 1, on_bad_line="skip") == 3
    Path("x.txt").write_bytes(record)
    assert entries("x.txt", 1) == 4
    Path("f").mkdir()
    Path("f/1.jsonl").write_bytes(record)
    Path("f/2.jsonl").write_bytes(record)
    assert entries("f", 1) == 5
    Path("f/2.jsonl").write_bytes(record * 2)
    assert entries("f", 1) == 6


# --- what is left behind ----------------------------------------------------------------------


def test_the_cache_is_limited(in_an_empty_folder, monkeypatch):
    """The least recently used goes first; what is in use stays, whatever its age."""
    kept = in_an_empty_folder / "cache" / "rwkv_jax"
    monkeypatch.setattr(token_cache, "_CACHE_BYTES", 0)

    def opened(name):
        Path(f"{name}.jsonl").write_bytes(lines_of([f"{name} 12345"]))
        return open_dataset(f"{name}.jsonl", 1)

    def names():
        return sorted(path.name[0] for path in kept.glob("*.bin"))

    a, b = opened("a"), opened("b")
    (kept / "compiled").mkdir()
    assert names() == ["a", "b"]
    expected, size = a.tokens.tolist(), sum(path.stat().st_size for path in kept.glob("a*"))
    del b
    c = opened("c")
    assert names() == ["a", "c"] and a.tokens.tolist() == expected
    monkeypatch.setattr(token_cache, "_CACHE_BYTES", 3 * size)
    del a, c
    d = opened("d")
    assert names() == ["a", "c", "d"]
    for age, name in ((30, "a"), (60, "c")):
        (record,) = kept.glob(f"{name}*.blake2b")
        os.utime(record, (1e9 - age, 1e9 - age))
        for path in kept.glob(f"{name}*"):
            os.utime(path, (1e9 - age, 1e9 - age))
    a = opened("a")  # used again
    del a, d
    (broken,) = kept.glob("d-*.blake2b")
    broken.unlink()  # as a kill leaves it, between two renamings
    opened("e")
    assert names() == ["a", "d", "e"] and not list(kept.glob("c-*"))
    monkeypatch.setattr(token_cache, "_CACHE_BYTES", 0)
    f = opened("f")
    assert names() == ["f"] and len(f.tokens)


def test_scratch_folders_of_dead_processes_are_removed():
    target = Path("p[1]")
    script = (
        "import os, sys; from pathlib import Path; from rwkv_jax.files import scratch_folder\n"
        "with scratch_folder(Path('p[1]')) as folder:\n"
        "    (folder / 'half').touch(); print(folder, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        folder = Path(process.stdout.readline().strip())
        with files.scratch_folder(target):
            assert (folder / "half").exists()  # it is at work
        process.kill()
        process.wait()
        assert (folder / "half").exists()
        with files.scratch_folder(target) as ours:
            assert [path.name for path in Path().iterdir()] == [ours.name]
    assert os.listdir() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_scratch(number):
    with pytest.raises(SystemExit) as stopped, files.scratch_folder(Path("p")) as folder:
        (folder / "half").touch()
        os.kill(os.getpid(), number)
        pytest.fail("not stopped")
    assert stopped.value.code == 128 + number and os.listdir() == []
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_while_processes_tokenize(number, in_an_empty_folder):
    """No worker outlives its parent; the folder is removed, at the latest by the next run."""
    script = (
        "import os, sys; from pathlib import Path\n"
        "from rwkv_jax import files\nfrom rwkv_jax.text import corpus, tokenization\n"
        "tokenization._WORKER_BYTES, corpus._PIECE_BYTES, os.cpu_count = 20, 50, lambda: 2\n"
        "def pieces(self, pieces=corpus.Corpus.pieces):\n"
        "    for number, piece in enumerate(pieces(self)):\n"
        "        if number == 8:\n"
        "            print('there', flush=True); sys.stdin.read()\n"
        "        yield piece\n"
        "corpus.Corpus.pieces = pieces\n"
        "if __name__ == '__main__':\n"
        "    with files.scratch_folder(Path('o')) as folder:\n"
        "        tokenization.tokenize(corpus.find('x.jsonl'), folder / 't')\n"
    )
    (in_an_empty_folder / "script.py").write_text(script)
    Path("x.jsonl").write_bytes(lines_of(["a b c d e f g"] * 40))
    command = [sys.executable, str(in_an_empty_folder / "script.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"there\n"
        process.send_signal(number)
        # The workers share its standard output, whose end is that of the last of them. The limit is
        # for one that is left behind: it would never end.
        assert process.communicate(timeout=600)[0] == b""
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    if number == signal.SIGKILL:
        assert len(os.listdir()) == 2
        with files.scratch_folder(Path("o")):
            pass
    assert os.listdir() == ["x.jsonl"]
