"""Files from elsewhere, mutated: every outcome of a reader is a result or a `UserError`.

    python -m tests.support.fuzz --inputs 20000 --reader pth     (binidx, jsonl, checkpoint; or all)

An input is a function of the reader, the seed and its number, so a surprise can be had again:
`--seed S --first N --inputs 1`. Mutations know the formats: fields of fixed structures get values
at the edges, pickles get opcodes, JSON gets other types, and what a checksum protects is signed
anew. Watched are the kind of the error, the time (10 s an input), memory (`MAX_GROWTH` in all), and
a file that the hostile inputs would make if anything of theirs were run.
"""

import argparse
import contextlib
import copy
import hashlib
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_jax.checkpoints import pth, store, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.text import corpus, tokenization
from rwkv_jax.text.binidx import BinIdxWriter, open_binidx
from tests.support import malicious

SECONDS = 10
MAX_GROWTH = 512 << 20  # bytes of resident memory
EDGES = [0, 1, 2, 3, 7, 8, 63, 64, 127, 128, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000]
EDGES += [0xFFFFFFFF, 1 << 32, 1 << 47, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def mutate(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """One to four changes of any kind to bytes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 16, 64])
        match rng.randrange(7):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + (size if rng.random() < 0.7 else len(data))]
            case 2:
                data[at:at] = rng.randbytes(size)
            case 3:
                data[at:at] = data[at : at + size] * rng.choice([1, 2, 50])
            case 4:
                width = rng.choice("BHIQ")
                number = rng.choice(EDGES) & (1 << 8 * struct.calcsize(width)) - 1
                raw = struct.pack("<" + width, number)
                data[at : at + len(raw)] = raw
            case 5:
                other = rng.choice(others)
                start = rng.randrange(len(other) + 1)
                data[at : at + size] = other[start : start + size]
            case 6:
                data[at : at + size] = bytes(size)
    return bytes(data)


def edge_number(rng: random.Random) -> bytes:
    return malicious.number(rng.choice([*EDGES, -1, -2, 1 << 100]))


def random_pickle(rng: random.Random, command: str) -> bytes:
    """Opcodes of state dicts, honest and hostile pieces, in an order that no pickler writes."""
    pieces = [
        *(bytes([op]) for op in b"(t)\x85\x86\x87}su]aeNRbQ.\x88\x890212l\x81\x93oi"),
        malicious.REBUILD,
        malicious.ORDERED_DICT,
        b"ctorch\nFloatStorage\n",
        b"cos\nsystem\n",
        b"cbuiltins\neval\n",
        malicious.text(command),
        malicious.text("a"),
        malicious.text("../../etc/passwd"),
        malicious.storage(),
        malicious.tensor(),
        b"q\x00",
        b"h\x00",
        b"r\xff\xff\xff\x7f",
        b"j\x00\x00\x00\x00",
    ]
    made = [
        rng.choice(pieces) if rng.random() < 0.85 else edge_number(rng)
        for _ in range(rng.randrange(1, 40))
    ]
    body = b"\x80\x02" + b"".join(made)
    if rng.random() < 0.5:
        body = malicious.state_dict(a=b"".join(made)[:-1] if made else b"N", b=malicious.tensor())
    return body


def random_tensor(rng: random.Random) -> bytes:
    """A description of a tensor that is right but for some numbers."""

    def field(value: bytes) -> bytes:
        return edge_number(rng) if rng.random() < 0.3 else value

    def sizes(*values: int) -> bytes:
        return b"(" + b"".join(field(malicious.number(v)) for v in values) + b"t"

    stored = malicious.storage(
        key=rng.choice(["0", "0", "1", "../x"]),
        numel=rng.choice([6, 6, 6, *EDGES]),
        kind=rng.choice(["Float", "BFloat16", "Long", "Quint8", "Bool"]),
    )
    return malicious.state_dict(
        a=malicious.tensor(field(malicious.number(0)), sizes(2, 3), sizes(3, 1), stored)
    )


class Pth:
    """Archives and old containers, honest and malicious, and pickles that nobody wrote."""

    def __init__(self, folder: Path, canary: Path):
        self._path, self._command = folder / "x.pth", f"touch {canary}"
        tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
        pth.write(self._path, tensors)
        hostile = [make(self._command) for make, _ in malicious.PAYLOADS.values()]
        self._seeds = [self._path.read_bytes(), malicious.archive(), malicious.legacy()]
        self._seeds += [malicious.archive(pickle) for pickle in hostile]
        archives = [content for content, _ in malicious.ARCHIVES.values()]
        self._seeds += [content for content in archives if len(content) < 9999]

    def try_one(self, rng: random.Random) -> None:
        match rng.randrange(4):
            case 0:
                content = malicious.archive(random_pickle(rng, self._command))
            case 1:
                content = malicious.archive(random_tensor(rng))
            case 2:
                content = malicious.legacy(mutate(malicious.HONEST_OLD, rng, self._seeds))
            case _:
                content = mutate(rng.choice(self._seeds), rng, self._seeds)
        self._path.write_bytes(content)
        tensors = pth.read(self._path)
        for tensor in tensors.values():
            np.ascontiguousarray(tensor)  # reads every element
            assert tensor.nbytes <= pth.MAX_EXPANSION * len(content)
        with contextlib.suppress(UserError):
            weights.infer_config(tensors)


class Binidx:
    """A token file whose header and arrays lie."""

    def __init__(self, folder: Path, canary: Path):
        self._prefix = folder / "x"
        with BinIdxWriter(self._prefix) as writer:
            writer.append(np.arange(40), [10, 25, 5])
        self._good = {end: Path(f"{self._prefix}{end}").read_bytes() for end in (".idx", ".bin")}

    def try_one(self, rng: random.Random) -> None:
        files = dict(self._good)
        if rng.random() < 0.5:
            index = bytearray(files[".idx"])
            at, width = rng.choice(
                [(9, "Q"), (17, "B"), (18, "Q"), (26, "Q")]
                + [(34 + 4 * i, "I") for i in range(3)]
                + [(46 + 8 * i, "Q") for i in range(7)]
            )
            value = rng.choice([*EDGES, rng.randrange(100)]) & (1 << 8 * struct.calcsize(width)) - 1
            struct.pack_into("<" + width, index, at, value)
            files[".idx"] = bytes(index)
        else:
            ending = rng.choice([".idx", ".idx", ".bin"])
            files[ending] = mutate(files[ending], rng, list(self._good.values()))
        for ending, content in files.items():
            Path(f"{self._prefix}{ending}").write_bytes(content)
        data = open_binidx(self._prefix)
        for item in range(len(data)):
            assert len(data[item]) == data.sizes[item]
        assert int(np.sum(data.sizes)) == len(data.tokens)


class Jsonl:
    """Lines that are nearly JSON, text that is nearly Unicode."""

    VALUES = [
        '"text"', "null", "1e999", "-0", "[]", "{}", '"\\ud800"', '"\\u0000"', '"\\ud83d\\ude00"',
        "1" * 5000, "[" * 3000 + "]" * 3000, '{"text":' * 500 + "1" + "}" * 500, "NaN", "true",
        '"' + "a" * 3000 + '"', '"' + "é" * 1000 + '"', "'x'", '"\\x"', '"\t"', "",
    ]  # fmt: skip
    KEYS = ['"text"', '"text"', '"text"', '"Text"', '"\\u0074ext"', "text", "1", '""']

    def __init__(self, folder: Path, canary: Path):
        self._path = folder / "x.jsonl"
        lines = ['{"text": "one"}', "", '{"text": "zwei\\n\\n", "id": 2}', '{"text": "三 😀"}']
        self._good = "\n".join(lines).encode()

    def try_one(self, rng: random.Random) -> None:
        if rng.random() < 0.5:
            pairs = [
                f"{rng.choice(self.KEYS)}: {rng.choice(self.VALUES)}"
                for _ in range(rng.randrange(1, 4))
            ]
            line = "{" + ", ".join(pairs) + rng.choice(["}", "}", "}", "", "}}", ",}"])
            content = line.encode("utf-8", "surrogatepass")
        else:
            content = self._good
        if rng.random() < 0.7:
            content = mutate(content, rng, [self._good, b"\xef\xbb\xbf", b"\xed\xa0\x80"])
        self._path.write_bytes(content)
        for tokens, sizes, *_ in tokenization._tokenized(corpus.find(self._path), workers=0):
            assert sizes.sum() == len(tokens) <= len(content) + len(sizes)


class Checkpoint:
    """A checkpoint whose files were changed, and one whose author lies: signed anew."""

    def __init__(self, folder: Path, canary: Path):
        self._folder, self._canary = folder / "x", canary
        model = ModelConfig(n_layer=1, n_embd=16, vocab_size=8, head_size=16)
        store.save_model(self._folder, model, weights.to_official(init_params(model, 0)))
        self._good = {path: path.read_bytes() for path in self._folder.rglob("*") if path.is_file()}
        self._manifest = self._folder / store.MANIFEST
        self._described = json.loads(self._good[self._manifest].split(b"\n", 1)[1])

    def try_one(self, rng: random.Random) -> None:
        path = rng.choice(list(self._good))
        described = copy.deepcopy(self._described)
        signed = rng.random() < 0.15
        if signed and rng.random() < 0.5:
            path = self._manifest
            self._mutate_json(described, rng)
        elif path.suffix == "" and self._good[path].startswith(b"{") and rng.random() < 0.7:
            value = json.loads(self._good[path])
            self._mutate_json(value, rng)
            path.write_bytes(json.dumps(value).encode())
        elif rng.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(mutate(self._good[path], rng, list(self._good.values())))
        try:
            if signed:
                self._sign(described, path)
            store.load_newest(self._folder)
            store.open_newest(
                self._folder, lambda _, tensors: [np.asarray(value) for value in tensors.values()]
            )
        finally:
            for changed in {path, self._manifest}:
                changed.write_bytes(self._good[changed])

    def _sign(self, described: Any, path: Path) -> None:
        name = path.relative_to(self._folder).as_posix()
        if path.exists() and path != self._manifest:
            content = path.read_bytes()
            described["files"][name] = [len(content), hashlib.sha256(content).hexdigest()]
        body = json.dumps(described).encode()
        digest = hashlib.sha256(body).hexdigest().encode()
        self._manifest.write_bytes(digest + b"\n" + body)

    def _mutate_json(self, value: Any, rng: random.Random) -> None:
        """Changes something somewhere in a dict or list, in place."""
        inner = [v for v in (value.values() if isinstance(value, dict) else value) if v]
        inner = [v for v in inner if isinstance(v, dict | list)]
        if inner and rng.random() < 0.8:
            return self._mutate_json(rng.choice(inner), rng)
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return None
        key = rng.choice(keys)
        values = [None, True, -1, 1.5, "", "x", [], {}, [[]], "../" * 8 + str(self._canary)]
        if isinstance(value, dict) and rng.random() < 0.3:
            value[rng.choice(["../../x", "/etc/passwd", "", "x", "n_layer"])] = value.pop(key)
        elif rng.random() < 0.2:
            del value[key]
        else:
            value[key] = rng.choice([*values, *EDGES, 10**30])
        return None


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "pth": Pth,
    "binidx": Binidx,
    "jsonl": Jsonl,
    "checkpoint": Checkpoint,
}


class TooSlow(BaseException):
    """Not an Exception: no reader may catch it."""


def _too_slow(*_: object) -> None:
    raise TooSlow


def fuzz(reader: str, inputs: int, folder: Path, seed: int = 0, first: int = 0) -> str:
    """Tries so many inputs; returns a line that says what became of them.

    Raises:
        AssertionError: names the first surprise.
    """
    canary = folder / "canary"
    target = READERS[reader](folder, canary)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    slowest, refused, begin = 0.0, 0, time.monotonic()
    handler = signal.signal(signal.SIGALRM, _too_slow)
    try:
        for number in range(first, first + inputs):
            rng, began = random.Random(f"{reader} {seed} {number}"), time.monotonic()
            where = f"{reader}, --seed {seed} --first {number}"
            signal.alarm(SECONDS)
            try:
                target.try_one(rng)
            except UserError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1, f"{where}: more than a line: {error}"
            except (Exception, TooSlow) as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - began)
            assert not canary.exists(), f"{where}: something of the file's was run"
    finally:
        signal.signal(signal.SIGALRM, handler)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert growth < MAX_GROWTH, f"{reader}: memory grew by {growth >> 20} MiB"
    return (
        f"{reader}: {inputs} inputs, {refused} refused, the others read, no surprise; slowest "
        f"{slowest:.2f} s, memory +{growth >> 20} MiB, {time.monotonic() - begin:.0f} s in all"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--reader", choices=READERS, nargs="*", default=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    for reader in options.reader:
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(sys.stdout):
            print(fuzz(reader, options.inputs, Path(name), options.seed, options.first), flush=True)


if __name__ == "__main__":
    main()
