"""The sampler against the official formula, and `open_dataset` on good and bad data."""

import contextlib
import hashlib
import itertools
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.errors import UserError
from rwkv_jax.text import corpus, dataset, loader, token_cache, tokenization, tokenizer
from rwkv_jax.text.binidx import BinIdxWriter, open_binidx
from rwkv_jax.text.dataset import Dataset, fingerprint, open_dataset
from rwkv_jax.text.loader import prefetch
from rwkv_jax.text.sampler import choose_magic_prime, largest_magic_prime, sample_numbers

OFFICIAL = Path(__file__).parents[1] / "data" / "demo_official.jsonl"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rwkv_jax"


def binidx(folder, tokens, dtype=np.uint16):
    with BinIdxWriter(folder / "d", dtype) as writer:
        writer.append(tokens, [len(tokens)])
    return folder / "d"


def write_jsonl(folder, content):
    path = folder / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def official_offsets(magic_prime, ctx_len, world_size, micro_bsz, rank):
    """What one rank of the official trainer reads, batch after batch, for ever.

    Its loader hands out idx = 0, 1, … within a miniepoch of 40320 samples over all ranks.
    """
    for epoch in itertools.count():
        idx = 0
        for _ in range(40320 // (world_size * micro_bsz)):
            offsets = []
            for _ in range(micro_bsz):
                n = 1 + epoch * 40320 + idx * world_size + rank
                factor = int(magic_prime * (math.sqrt(5) - 1) / 2)
                offsets.append(((factor * n * n * n) % magic_prime) * ctx_len)
                idx += 1
            yield offsets


# --- the order of samples ---------------------------------------------------------------------


@pytest.mark.parametrize("magic_prime", [2926181, 1_000_000_000_061, 2])
@pytest.mark.parametrize(
    ("world_size", "micro_bsz"), [(1, 16), (2, 2520), (4, 1680), (7, 576), (8, 630)]
)
def test_offsets_are_the_official_ones(magic_prime, world_size, micro_bsz):
    """Through the first miniepoch, into the second and third."""
    steps = 2 * 40320 // (world_size * micro_bsz) + 3
    data = Dataset("d", np.empty(0), 512, magic_prime, 65536)
    checked = range(steps) if steps < 100 else [0, 1, 2519, 2520, 2521, 5040, 5042]
    ours = {step: data.offsets(sample_numbers(step, world_size, micro_bsz)) for step in checked}
    for rank in range(world_size):
        official = official_offsets(magic_prime, 512, world_size, micro_bsz, rank)
        for step, expected in zip(range(steps), official, strict=False):
            if step in ours:
                assert ours[step][rank].tolist() == expected


@pytest.mark.parametrize(("world_size", "micro_bsz"), [(1, 1), (1, 11), (3, 13), (5, 1)])
def test_any_batch_size_takes_every_number_once(world_size, micro_bsz):
    """Also across a miniepoch's end, where 11 and 39 do not fit."""
    batch = world_size * micro_bsz
    first = 40320 // batch - 2
    numbers = [sample_numbers(step, world_size, micro_bsz) for step in range(first, first + 5)]
    for step, rows in enumerate(numbers, first):
        assert rows.shape == (world_size, micro_bsz)
        assert sorted(rows.ravel().tolist()) == list(
            range(1 + step * batch, 1 + (step + 1) * batch)
        )
        for rank in range(world_size):
            assert rows[rank].tolist() == [
                1 + step * batch + i * world_size + rank for i in range(micro_bsz)
            ]


@pytest.mark.parametrize("magic_prime", [2, 5, 11, 47, 389, 10007])
def test_every_slot_is_visited_once(magic_prime):
    data = Dataset("d", np.empty(0), 3, magic_prime, 65536)
    for first in (1, 12345):
        offsets = data.offsets(np.arange(first, first + magic_prime))
        assert sorted(offsets.tolist()) == [3 * slot for slot in range(magic_prime)]


def test_rows_are_grouped_by_rank_and_hold_inputs_and_targets(tmp_path):
    data = open_dataset(binidx(tmp_path, np.arange(1000)), 16)
    assert data.magic_prime == 59
    batch = data.batch(7, 4, 3)
    assert batch.shape == (12, 17)
    assert batch.dtype == np.int32
    for rank in range(4):
        offsets = next(itertools.islice(official_offsets(59, 16, 4, 3, rank), 7, None))
        assert batch[3 * rank : 3 * rank + 3].tolist() == [
            list(range(offset, offset + 17)) for offset in offsets
        ]


# --- the magic prime --------------------------------------------------------------------------


def test_published_magic_primes():
    assert largest_magic_prime(200499, 4096) == 47
    assert largest_magic_prime(1498226207, 512) == 2926181


def test_magic_prime_is_the_largest_there_is():
    def brute_force(bound):
        for p in range(bound, 1, -1):
            if p % 3 == 2 and all(p % d for d in range(2, p)):
                return p
        return None

    for slots in range(0, 400):
        assert largest_magic_prime(slots * 8 + 5, 8) == brute_force(slots - 1), slots


def test_a_given_magic_prime_is_checked():
    assert choose_magic_prime("d", 200499, 4096, 47) == 47
    assert choose_magic_prime("d", 1498226207, 512, 2926169) == 2926169  # not the largest
    for given, reason in [
        (46, "is not a prime"),
        (35, "is not a prime"),
        (1, "is not a prime"),
        (0, "is not a prime"),
        (-47, "is not a prime"),
        (41, "would visit only 41 of the 48 samples"),
        (23, "would visit only 23 of the 48 samples"),  # of twice the ctx_len
        (43, "is 1 mod 3, not 2"),
        (3, "is 0 mod 3, not 2"),
        (53, "needs 217089 tokens at ctx_len 4096, but the data has 200499"),
        (10**40 + 1, "needs "),
    ]:
        with pytest.raises(
            UserError, match=f"d: magic_prime {given} {reason}.*use 47, or leave it"
        ):
            choose_magic_prime("d", 200499, 4096, given)


def test_the_last_slot_has_its_target():
    """29 slots exactly, no token after: the largest prime is 23, and 29 itself does not fit."""
    assert choose_magic_prime("d", 29 * 8, 8) == 23
    with pytest.raises(UserError, match="needs 233 tokens"):
        choose_magic_prime("d", 29 * 8, 8, 29)
    assert choose_magic_prime("d", 29 * 8 + 1, 8, 29) == 29


def test_data_shorter_than_ctx_len():
    with pytest.raises(UserError) as error:
        choose_magic_prime("d", 1000, 512)
    assert str(error.value) == (
        "d: 1000 tokens are too few for ctx_len 512, which needs at least 1536 (3 samples): "
        "ctx_len 333 or less works"
    )
    assert choose_magic_prime("d", 1000, 333) == 2
    with pytest.raises(UserError, match="ctx_len 333 or less"):
        choose_magic_prime("d", 1000, 334)
    with pytest.raises(UserError, match="2 tokens are too few for ctx_len 1.*give more text"):
        choose_magic_prime("d", 2, 1)
    with pytest.raises(UserError, match="ctx_len 0: must be at least 1"):
        choose_magic_prime("d", 1000, 0)


def test_the_smallest_data_that_works(tmp_path):
    data = open_dataset(binidx(tmp_path, [1, 2, 3]), 1)
    assert data.magic_prime == 2
    rows = data.batch(0, 1, 2).tolist()
    assert sorted(rows) == [[1, 2], [2, 3]]


# --- ids --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "id_at_70", "vocab_size"),
    [
        (np.uint16, 512, 512),
        (np.int32, 65536, 65536),
        (np.int32, -1, 512),
        (np.float32, np.nan, 512),
        (np.float32, 1.5, 512),
    ],
)
def test_an_id_outside_the_vocabulary(tmp_path, monkeypatch, dtype, id_at_70, vocab_size):
    """Found before training; in a file too long for that, in the batch that holds it."""
    tokens = np.ones(100, dtype)
    tokens[70] = id_at_70
    prefix = binidx(tmp_path, tokens, dtype)
    message = f"d: token 70 has id {id_at_70}.*outside the vocabulary of {vocab_size}"
    with pytest.raises(UserError, match=message):
        open_dataset(prefix, 8, vocab_size=vocab_size)
    monkeypatch.setattr(dataset, "_SCAN_TOKENS", 99)
    data = open_dataset(prefix, 8, vocab_size=vocab_size)
    with pytest.raises(UserError, match=message):
        data.batch(0, 1, data.magic_prime)


def test_the_highest_id_is_within(tmp_path):
    prefix = binidx(tmp_path, [511, 0] * 50)
    assert open_dataset(prefix, 8, vocab_size=512).batch(0, 1, 1).max() == 511


# --- jsonl and its cache ----------------------------------------------------------------------


def expected_tokens(texts):
    return [i for text in texts for i in [*tokenizer.encode(text), 0]]


def test_jsonl_directly(tmp_path):
    path = write_jsonl(
        tmp_path, '\ufeff{"text": "one 一"}\n\n  \r\n{"text": "", "n": 1}\r\n{"text": "\\u4e8c"}'
    )
    data = open_dataset(path, 1)
    assert data.tokens.tolist() == expected_tokens(["one 一", "", "二"])
    assert data.tokens.dtype == np.uint16


def test_a_long_name(tmp_path):
    path = tmp_path / ("语" * 80 + ".jsonl")  # 246 bytes; a file's name may have 255
    path.write_text('{"text": "one two three"}')
    assert open_dataset(path, 1).magic_prime == 2


def test_jsonl_is_tokenized_once(tmp_path, cache, monkeypatch):
    path = write_jsonl(tmp_path, '{"text": "one two three four"}\n')
    first = open_dataset(path, 1).tokens.tolist()
    monkeypatch.setattr(token_cache, "tokenize", lambda *_: pytest.fail("tokenized again"))
    assert open_dataset(path, 1).tokens.tolist() == first
    moved = path.rename(tmp_path / "cache" / "x.jsonl")
    assert open_dataset(moved, 1).tokens.tolist() == first
    monkeypatch.undo()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path, '{"text": "one two three five"}\n')
    assert open_dataset(path, 1).tokens.tolist() == expected_tokens(["one two three five"])
    assert len(list(cache.iterdir())) == 6


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "garbage", "one bit"])
def test_a_damaged_cache_is_written_anew(tmp_path, cache, ending, damage):
    path = write_jsonl(tmp_path, '{"text": "one two three four"}\n')
    expected = open_dataset(path, 1).tokens.tolist()
    (file,) = cache.glob(f"*{ending}")
    sound = file.read_bytes()
    if damage == "remove":
        file.unlink()
    else:
        flipped = sound[:1] + bytes([sound[1] ^ 1]) + sound[2:]
        damaged = {"truncate": sound[:-1], "empty": b"", "garbage": b"\x07" * 77}
        file.write_bytes({**damaged, "one bit": flipped}[damage])
    assert open_dataset(path, 1).tokens.tolist() == expected
    assert file.read_bytes() == sound
    assert len(list(cache.iterdir())) == 3


def test_two_processes_at_once(tmp_path, cache):
    script = (
        "import hashlib, sys; from rwkv_jax.text.dataset import open_dataset\n"
        f"print(hashlib.sha256(open_dataset({str(OFFICIAL)!r}, 64).tokens).hexdigest())"
    )
    command = [sys.executable, "-c", script]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    expected = hashlib.sha256(open_dataset(OFFICIAL, 64).tokens).hexdigest()
    assert outputs == [expected + "\n"] * 2
    assert len(list(cache.iterdir())) == 3


def test_several_processes_keep_the_order(tmp_path, monkeypatch):
    tokenization.tokenize(corpus.find(OFFICIAL), tmp_path / "one")
    monkeypatch.setattr(tokenization, "_WORKER_BYTES", 100_000)
    monkeypatch.setattr(corpus, "_PIECE_BYTES", 5_000)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    tokenization.tokenize(corpus.find(OFFICIAL), tmp_path / "two")
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"two{ending}").read_bytes() == (tmp_path / f"one{ending}").read_bytes()
    assert len(open_binidx(tmp_path / "two")) == 182

    lines = OFFICIAL.read_bytes().splitlines(keepends=True)
    path = write_jsonl(tmp_path, b"".join([*lines[:150], b"\n", b"{}\n", *lines[150:]]))
    with pytest.raises(UserError, match=r"x\.jsonl:152: "):
        tokenization.tokenize(corpus.find(path), tmp_path / "three")
    assert not list(tmp_path.glob("three*"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r'x\.jsonl: holds no text; each line should be \{"text": "…"\}'),
        (b"\n \n\r\n", r"x\.jsonl: holds no text"),
        (b'{"text": "a"}\n\nplain\n', r"x\.jsonl:3: is not valid JSON: Expecting value"),
        (b'{"text": "a"}{"text": "b"}\n', r"x\.jsonl:1: is not valid JSON: Extra data"),
        (b'{"text": "a"\n', r"x\.jsonl:1: is not valid JSON"),
        (b"[" * 100_000, r"x\.jsonl:1: is not valid JSON: maximum recursion depth"),
        (b'{"text": 1' + b"1" * 5000 + b"}", r"x\.jsonl:1: is not valid JSON: Exceeds the limit"),
        (b'{"Text": "a"}\n', r'x\.jsonl:1: is not .* no string "text"'),
        (b'{"text": ["a"]}\n', r'x\.jsonl:1: is not .* no string "text"'),
        (b'["text"]\n', r"x\.jsonl:1: is a JSON array; .* one object per line"),
        (b"1\n", r'x\.jsonl:1: is not .* no string "text"'),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"x\.jsonl:2: byte 10 is not UTF-8"),
        (b'{"text": "ab\\ud83d"}\n', r"x\.jsonl:1: character 2 of the text.* surrogate pair"),
    ],
)
def test_unusable_jsonl(tmp_path, cache, content, message):
    with pytest.raises(UserError, match=message) as error:
        open_dataset(write_jsonl(tmp_path, content), 1)
    assert "\n" not in str(error.value)
    assert not cache.exists() or not list(cache.iterdir())


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        open_dataset(tmp_path / "none.jsonl", 1)
    with pytest.raises(UserError, match=r"none: no such file, and no token files of that name"):
        open_dataset(tmp_path / "none", 1)
    with pytest.raises(UserError, match=r"none\.bin: no such file; a binidx PREFIX needs"):
        open_dataset(tmp_path / "none.bin", 1)
    (tmp_path / "x.csv").write_text("text")
    with pytest.raises(UserError, match=r"x\.csv: is neither a text file .* nor the PREFIX"):
        open_dataset(tmp_path / "x.csv", 1)


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path, '{"text": "a b c d e"}\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    assert len(open_dataset(path, 1).tokens) > 4
    assert "x.jsonl/rwkv_jax: Not a directory: the cache is not writable" in capsys.readouterr().err


# --- prefetch ---------------------------------------------------------------------------------


def test_resuming_gives_the_same_batches(tmp_path):
    data = open_dataset(binidx(tmp_path, np.arange(5000) % 65536), 16)

    def batches(start, stop):
        with contextlib.closing(prefetch(lambda step: data.batch(step, 2, 3), start)) as steps:
            return [next(steps).tolist() for _ in range(start, stop)]

    assert batches(0, 9) == batches(0, 4) + batches(4, 9)
    assert batches(0, 9) == [data.batch(step, 2, 3).tolist() for step in range(9)]


def test_prefetch_is_bounded_and_stops():
    made = []
    steps = prefetch(lambda step: made.append(step) or step, start=5, depth=3)
    assert [next(steps) for _ in range(4)] == [5, 6, 7, 8]
    steps.close()
    assert made == list(range(5, 5 + len(made)))
    assert 4 <= len(made) <= 4 + 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_works_ahead():
    ahead = threading.Event()
    with contextlib.closing(prefetch(lambda step: ahead.set() if step == 2 else step, 0)) as steps:
        assert next(steps) == 0
        assert ahead.wait(10)


def test_prefetch_raises_where_the_batch_would_have_come():
    def make(step):
        if step == 3:
            raise UserError("step 3")
        return step

    steps = prefetch(make, start=0, depth=4)
    assert [next(steps) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="step 3"):
        next(steps)


def test_a_late_batch_is_told(monkeypatch):
    monkeypatch.setattr(loader, "STALL_SECONDS", 0.02)
    release, told = threading.Event(), []

    def stalled(seconds):
        told.append(seconds)
        if len(told) == 3:
            release.set()

    with contextlib.closing(prefetch(lambda step: release.wait(), 0, stalled=stalled)) as steps:
        assert next(steps)
    assert told[:3] == [0.02, 0.04, 0.08]  # a slow thread may bring more


@pytest.mark.parametrize("at", [0, 500_000, 9_999_999])
def test_fingerprints_of_data(at):
    tokens = np.arange(10_000_000).astype(np.uint16)
    assert fingerprint(tokens) == fingerprint(tokens.copy())
    assert fingerprint(tokens) != fingerprint(tokens[:-1])
    assert fingerprint(tokens) != fingerprint(tokens.astype(np.int32))
    short = tokens[:1_000_000].copy()
    short[min(at, 999_999)] += 1
    assert fingerprint(tokens[:1_000_000]) != fingerprint(short)
