"""Which tokens are trained on at which step: the cubic-hash sampler over a token file.

The file is cut into slots of `ctx_len` tokens. Sample number n = 1, 2, … of a run lies in slot

    (factor · n³) mod p,        factor = ⌊p·(√5 − 1)/2⌋,

with p, the "magic prime", the largest prime ≡ 2 (mod 3) below the number of slots. For such p the
map n ↦ n³ is a bijection mod p, so p consecutive samples visit every slot < p once: a shuffle
without a buffer, in which the step number is all that a resumed run needs to know.
Source: RWKV-LM, RWKV-v7/train_temp/src/dataset.py.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import math
import os
import re
import weakref
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TypeVar

import numpy as np

from rwkv_jax import corpus, tokenizer
from rwkv_jax.binidx import BinIdx, beside, open_binidx
from rwkv_jax.corpus import SKIPPED, Corpus
from rwkv_jax.errors import UserError
from rwkv_jax.files import cache_folder, reporting_os_errors, scratch_folder, try_lock
from rwkv_jax.tokenizing import tokenize

MINIEPOCH = 40320  # samples; 8!, so that most batch sizes divide it
STALL_SECONDS = 10.0  # that a step waits for its batch before it is reported
_CACHE_FORMAT = 2  # part of a cached file's name: raise it when the output of `tokenize` changes
_CACHE_BYTES = 16 << 30  # of tokens that are kept beside those in use
_RECORD = ".blake2b"  # of a kept token file; its time is that of the last use
_KEPT = (SKIPPED, ".bin", ".idx", _RECORD)
_SCAN_TOKENS = 1 << 32  # a file up to this long is checked for stray ids before training


def sample_numbers(step: int, world_size: int, micro_bsz: int) -> np.ndarray:
    """The sample numbers n of one step: [W, micro_bsz] int64, row q those of rank q.

    The official trainer takes, with e the miniepoch and j the rank's own sample counter within it,
    n = 1 + e·40320 + j·W + q. Where W·micro_bsz divides 40320 (it requires so), that is

        n = 1 + step·W·micro_bsz + i·W + q        for the rank's i-th sample of the step,

    which needs no miniepoch, and so is the order for any batch size: consecutive steps take
    consecutive ranges of n, and none is left out.

    >>> sample_numbers(step=1, world_size=2, micro_bsz=3)
    array([[ 7,  9, 11],
           [ 8, 10, 12]])
    """
    batch = world_size * micro_bsz
    first = 1 + step * batch
    return np.arange(first, first + batch).reshape(micro_bsz, world_size).T


def largest_magic_prime(tokens: int, ctx_len: int) -> int | None:
    """The largest prime p ≡ 2 (mod 3) with p ≤ ⌊tokens/ctx_len⌋ − 1; None below 3 slots.

    >>> largest_magic_prime(1498226207, 512), largest_magic_prime(200499, 4096)
    (2926181, 47)
    """
    bound = tokens // ctx_len - 1
    for candidate in range(bound - (bound - 2) % 3, 1, -3):
        if _is_prime(candidate):
            return candidate
    return None


def _is_prime(number: int) -> bool:
    """By trial division: at most √number/2 steps, 16 thousand for 10⁹ slots."""
    if number < 4 or number % 2 == 0:
        return number in (2, 3)
    return all(number % divisor for divisor in range(3, math.isqrt(number) + 1, 2))


def choose_magic_prime(name: str, tokens: int, ctx_len: int, given: int | None = None) -> int:
    """The magic prime of a file of `tokens` tokens: the largest, or `given` after checking it.

    Fewer than 3 slots have no magic prime and are refused: there is nothing to shuffle, and a
    shorter `ctx_len` makes use of the text. A given prime needs p·ctx_len + 1 tokens, so that the
    last slot has its target, and, as in the official trainer, more than 0.9 of the slots (where the
    largest one has so many).

    Args:
        name: of the data, for the error.

    Raises:
        UserError: too few tokens for `ctx_len`, or `given` is no magic prime of this file.
    """
    if ctx_len < 1:
        raise UserError(f"ctx_len {ctx_len}: must be at least 1")
    largest = largest_magic_prime(tokens, ctx_len)
    if largest is None:
        way_out = f"ctx_len {tokens // 3} or less works" if tokens >= 3 else "give more text"
        raise UserError(
            f"{name}: {tokens} tokens are too few for ctx_len {ctx_len}, which needs at least "
            f"{3 * ctx_len} (3 samples): {way_out}"
        )
    if given is None:
        return largest
    if given * ctx_len + 1 > tokens:
        reason = (
            f"needs {given * ctx_len + 1} tokens at ctx_len {ctx_len}, of which it has {tokens}"
        )
    elif not _is_prime(given):
        reason = "is not a prime"
    elif given % 3 != 2:
        reason = f"leaves {given % 3}, not 2, when divided by 3"
    elif given < largest and given <= 0.9 * (tokens // ctx_len):
        reason = f"would visit only {given} of the {tokens // ctx_len} samples"
    else:
        return given
    raise UserError(f"{name}: magic_prime {given} {reason}; use {largest}, or leave it out")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A token file with its order of samples; `open_dataset` makes one.

    Attributes:
        name: path of the data, for messages.
        tokens: [tokens], memory-mapped, any integer or float dtype.
        ctx_len: T, tokens of a sample.
        magic_prime: slots that are visited.
        vocab_size: V; an id outside [0, V) is an error.
        skipped: lists the lines of the text that were skipped, one a line; None: there are none.
    """

    name: str
    tokens: np.ndarray
    ctx_len: int
    magic_prime: int
    vocab_size: int
    skipped: Path | None = None

    def offsets(self, numbers: np.ndarray) -> np.ndarray:
        """Token offsets of sample numbers, the same shape, int64. Exact for any size of file."""
        p = self.magic_prime
        factor = int(p * ((math.sqrt(5) - 1) / 2))
        # Python's integers: n³ alone passes 2⁶³ after two million samples.
        slots = [factor * pow(n, 3, p) % p for n in numbers.ravel().tolist()]
        return np.array(slots, np.int64).reshape(numbers.shape) * self.ctx_len

    def batch(
        self, step: int, world_size: int, micro_bsz: int, rows: range | None = None
    ) -> np.ndarray:
        """The samples of one step, [B, T + 1] int32 with B = W·micro_bsz: inputs and targets.

        Row q·micro_bsz + i is the i-th sample of rank q, so a batch that is split over W devices
        along its first axis gives device q what the official trainer gives rank q.

        Args:
            rows: only these are read and returned.

        Raises:
            UserError: an id is outside the vocabulary (of a file too long to check at the start).
        """
        numbers = sample_numbers(step, world_size, micro_bsz).ravel()
        starts = self.offsets(numbers if rows is None else numbers[rows]).tolist()
        samples = np.stack([self.tokens[start : start + self.ctx_len + 1] for start in starts])
        for start, sample in zip(starts, samples, strict=True):
            check_ids(self.name, sample, start, self.vocab_size)
        return samples.astype(np.int32)

    def check_all_ids(self) -> None:
        """Reads the file in search of an id outside the vocabulary, if its dtype has such numbers.

        One of more than 2³² tokens is left to `batch`.

        Raises:
            UserError: names the id and its position.
        """
        dtype = self.tokens.dtype
        every_id_fits = dtype.kind == "u" and np.iinfo(dtype).max < self.vocab_size
        if every_id_fits or len(self.tokens) > _SCAN_TOKENS:
            return
        chunk = 1 << 24
        for start in range(0, len(self.tokens), chunk):
            check_ids(self.name, self.tokens[start : start + chunk], start, self.vocab_size)


def check_ids(name: str, ids: np.ndarray, start: int, vocab_size: int) -> None:
    """Refuses what is no id: outside [0, V), or, of a float dtype, not whole.

    Args:
        name: of the token file.
        ids: some of its tokens.
        start: number of the first of them.

    Raises:
        UserError: names the id and its position.
    """
    whole = ids.dtype.kind != "f"
    if not ids.size or whole and ids.min() >= 0 and ids.max() < vocab_size:
        return
    bad = ~((ids >= 0) & (ids < vocab_size) & (ids == np.floor(ids)))
    if bad.any():
        at = int(bad.argmax())
        raise UserError(
            f"{name}: token {start + at} has id {ids[at]}, outside the vocabulary of "
            f"{vocab_size}: the text was tokenized for another model, or vocab_size is wrong"
        )


def open_dataset(
    data_file: str | Path,
    ctx_len: int,
    magic_prime: int | None = None,
    vocab_size: int = tokenizer.VOCAB_SIZE,
    text_key: str = "text",
    on_bad_line: str = "stop",
) -> Dataset:
    """Opens training data, checked as far as that can be done before training.

    Args:
        data_file: a binidx prefix (with or without `.bin` or `.idx`), or text: all that
            `corpus.find` takes. Text is tokenized once, in the order of the files (the sampler
            shuffles), and kept under `$XDG_CACHE_HOME/rwkv_jax` (`~/.cache/rwkv_jax`) by a hash of
            its content. Of these tokens, the least recently used are removed when they take more
            than 16 GiB.
        magic_prime: computed when None, checked when given.
        text_key: key of a jsonl, column of a Parquet file, that holds the text.
        on_bad_line: what cannot be used: "stop" raises an error, "skip" leaves it out.

    Raises:
        UserError: no such data, damaged, too short for `ctx_len`, a wrong `magic_prime`, or (in a
            file of up to 2³² tokens; a longer one is checked batch by batch) an id outside the
            vocabulary.
    """
    name, listed = str(data_file), None
    if corpus.is_binidx(name):
        tokens = open_binidx(name).tokens
    else:
        tokenizer.check_vocabulary(vocab_size, name)
        kept = _cached(corpus.find(name, text_key, on_bad_line))
        tokens, listed = kept.tokens, beside(kept.prefix, SKIPPED)
    prime = choose_magic_prime(name, len(tokens), ctx_len, magic_prime)
    skipped = listed if listed and listed.exists() else None
    dataset = Dataset(name, tokens, ctx_len, prime, vocab_size, skipped)
    dataset.check_all_ids()
    return dataset


def _cached(text: Corpus) -> BinIdx:
    """The token file of a text, written when it is not there or damaged.

    The name holds a hash of everything that its bytes depend on, a file beside it the hash of these
    bytes, and a writer renames complete files into place: two processes at once both write the
    same, and neither sees a half.
    """
    options = (tokenizer.VOCAB_NAME, _CACHE_FORMAT, text.text_key, text.skip_bad)
    content = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for path in text.files:
        with reporting_os_errors(path, "read"), path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        # The endings say how a file is read; the list of skipped lines names it.
        named = str(path) if text.skip_bad else "".join(path.suffixes[-2:]).lower()
        content.update(repr((digest, named)).encode())
    folder = cache_folder()
    prefix = folder / f"{text.stem[:32]}-{content.hexdigest()}"
    kept = _open_kept(prefix)
    if kept:
        return kept
    with scratch_folder(folder / "tokenizing") as scratch:
        made = scratch / "tokens"
        tokenize(text, made)
        with reporting_os_errors(prefix, "write"):
            beside(made, _RECORD).write_bytes(_content_hash(made))
            for ending in _KEPT:
                if beside(made, ending).exists():
                    os.replace(beside(made, ending), beside(prefix, ending))
    kept = _open_kept(prefix) or open_binidx(prefix)
    _limit_cache(folder)
    return kept


def _open_kept(prefix: Path) -> BinIdx | None:
    """Kept tokens, if they are there and whole; nobody removes them while the array lives."""
    try:
        record = os.open(beside(prefix, _RECORD), os.O_RDONLY)
    except OSError:
        return None
    try_lock(record, shared=True)
    with contextlib.suppress(OSError, UserError):
        if beside(prefix, _RECORD).read_bytes() == _content_hash(prefix):
            kept = open_binidx(prefix)
            weakref.finalize(kept.tokens, os.close, record)
            with contextlib.suppress(OSError):
                os.utime(beside(prefix, _RECORD))
            return kept
    os.close(record)
    return None


def _limit_cache(folder: Path) -> None:
    """Removes the least recently used tokens that nobody uses, down to `_CACHE_BYTES`."""
    entries: dict[Path, list[os.stat_result]] = {}
    ending = "|".join(map(re.escape, _KEPT))
    for path in folder.iterdir():
        match = re.fullmatch(rf"(.+-[0-9a-f]{{32}})(?:{ending})", path.name, re.S)
        if match:
            with contextlib.suppress(OSError):
                entries.setdefault(folder / match[1], []).append(path.stat())
    total = sum(stat.st_size for stats in entries.values() for stat in stats)
    for prefix in sorted(entries, key=lambda each: max(stat.st_mtime for stat in entries[each])):
        if total <= _CACHE_BYTES:
            return
        with contextlib.suppress(OSError):
            # Made where a kill has left the others without one.
            record = os.open(beside(prefix, _RECORD), os.O_RDWR | os.O_CREAT)
            if try_lock(record):
                for ending in reversed(_KEPT):
                    beside(prefix, ending).unlink(missing_ok=True)
                total -= sum(stat.st_size for stat in entries[prefix])
            os.close(record)


def _content_hash(prefix: Path) -> bytes:
    digests = []
    for path in (beside(prefix, ending) for ending in _KEPT[:-1]):
        if path.exists():
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, hashlib.blake2b).hexdigest())
    return "\n".join(digests).encode()


def fingerprint(tokens: np.ndarray) -> str:
    """Tells one token file from another: dtype, length, and a hash of 256 places in it.

    A file of up to 16 MiB is hashed whole. The places are spread evenly, the first and last tokens
    among them, so that a longer, shuffled or otherwise tokenized text is another one.
    """
    piece, places = (64 << 10) // tokens.itemsize, 256
    content = hashlib.blake2b(digest_size=8)
    for start in np.linspace(0, max(len(tokens) - piece, 0), places).astype(np.int64).tolist():
        content.update(np.ascontiguousarray(tokens[start : start + piece]).data)
        if len(tokens) <= piece:
            break
    return f"{content.hexdigest()} ({len(tokens)} {tokens.dtype.name})"


Batch = TypeVar("Batch")


def prefetch(
    make: Callable[[int], Batch],
    start: int,
    depth: int = 2,
    stalled: Callable[[float], None] = lambda seconds: None,
) -> Generator[Batch, None, None]:
    """Yields make(start), make(start + 1), …, computed in a thread up to `depth` ahead.

    An exception of `make` is raised by the `next` that would have returned its batch. Closing the
    iterator (`contextlib.closing`) cancels what is pending and waits for the thread.

    Args:
        stalled: called with the seconds waited when a batch is late: after `STALL_SECONDS`, and
            each time that has doubled.
    """

    def wait(batch: concurrent.futures.Future[Batch]) -> Batch:
        waited, limit = 0.0, STALL_SECONDS
        while not concurrent.futures.wait([batch], limit - waited).done:
            stalled(limit)
            waited, limit = limit, 2 * limit
        return batch.result()

    pool = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
    try:
        pending = deque(pool.submit(make, start + ahead) for ahead in range(depth))
        while True:
            batch = wait(pending.popleft())
            start += 1
            pending.append(pool.submit(make, start + depth - 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
