"""Which tokens are trained on at which step: the cubic-hash sampler over a token file.

The file is cut into slots of `ctx_len` tokens. Sample number n = 1, 2, … of a run lies in slot

    (factor · n³) mod p,        factor = ⌊p·(√5 − 1)/2⌋,

with p, the "magic prime", the largest prime ≡ 2 (mod 3) below the number of slots. For such p the
map n ↦ n³ is a bijection mod p, so p consecutive samples visit every slot < p once: a shuffle
without a buffer, in which the step number is all that a resumed run needs to know.
Source: RWKV-LM, RWKV-v7/train_temp/src/dataset.py.
"""

import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np

from rwkv_jax.errors import UserError
from rwkv_jax.text import corpus, tokenizer
from rwkv_jax.text.binidx import beside, open_binidx
from rwkv_jax.text.corpus import SKIPPED
from rwkv_jax.text.sampler import choose_magic_prime, sample_numbers
from rwkv_jax.text.token_cache import tokenized

_SCAN_TOKENS = 1 << 32  # a file up to this long is checked for stray ids before training


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
        kept = tokenized(corpus.find(name, text_key, on_bad_line))
        tokens, listed = kept.tokens, beside(kept.prefix, SKIPPED)
    prime = choose_magic_prime(name, len(tokens), ctx_len, magic_prime)
    skipped = listed if listed and listed.exists() else None
    dataset = Dataset(name, tokens, ctx_len, prime, vocab_size, skipped)
    dataset.check_all_ids()
    return dataset


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
