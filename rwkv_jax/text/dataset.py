"""A token file with its order of samples.

The file is divided into slots of `ctx_len` tokens. Sample number n = 1, 2, … of a run is slot

    (factor · n³) mod p,        factor = ⌊p·(√5 − 1)/2⌋,

with p, the "magic prime", the largest prime ≡ 2 (mod 3) below the number of slots. For such p the
map n ↦ n³ is a bijection mod p, so p consecutive samples visit every slot < p once. This is a
shuffle without a buffer; to resume, only the step number is needed.
Source: RWKV-LM, RWKV-v7/train_temp/src/dataset.py.
"""

import dataclasses
import hashlib
import math
from pathlib import Path

import numpy as np

from rwkv_jax.errors import UserError
from rwkv_jax.text import corpus, tokenizer
from rwkv_jax.text.binidx import append_suffix, open_binidx
from rwkv_jax.text.corpus import SKIPPED
from rwkv_jax.text.sampler import choose_magic_prime, sample_numbers
from rwkv_jax.text.token_cache import cached_tokens

_SCAN_TOKENS = 1 << 32  # files up to this length are checked for invalid ids before training


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A token file with its order of samples; created by `open_dataset`.

    Attributes:
        name: path of the data, for messages.
        tokens: [tokens], memory-mapped, any integer or float dtype.
        ctx_len: T, tokens per sample.
        magic_prime: number of slots that are visited.
        vocab_size: V; an id outside [0, V) is an error.
        skipped: file with the skipped lines of the text, one per line; None: none were skipped.
    """

    name: str
    tokens: np.ndarray
    ctx_len: int
    magic_prime: int
    vocab_size: int
    skipped: Path | None = None

    def offsets(self, numbers: np.ndarray) -> np.ndarray:
        """Token offsets of sample numbers, same shape, int64. Exact for any file size."""
        p = self.magic_prime
        factor = int(p * ((math.sqrt(5) - 1) / 2))
        # Python integers, because n³ exceeds 2⁶³ after two million samples.
        slots = [factor * pow(n, 3, p) % p for n in numbers.ravel().tolist()]
        return np.array(slots, np.int64).reshape(numbers.shape) * self.ctx_len

    def batch(
        self, step: int, world_size: int, micro_bsz: int, rows: range | None = None
    ) -> np.ndarray:
        """The samples of one step, [B, T + 1] int32 with B = W·micro_bsz: inputs and targets.

        Row q·micro_bsz + i is the i-th sample of rank q, so a batch that is sharded over W devices
        along its first axis gives device q the samples of rank q in the official trainer.

        Args:
            rows: reads and returns only these.

        Raises:
            UserError: an id is outside the vocabulary (in a file too long to check at the start).
        """
        numbers = sample_numbers(step, world_size, micro_bsz).ravel()
        starts = self.offsets(numbers if rows is None else numbers[rows]).tolist()
        samples = np.stack([self.tokens[start : start + self.ctx_len + 1] for start in starts])
        for start, sample in zip(starts, samples, strict=True):
            check_ids(self.name, sample, start, self.vocab_size)
        return samples.astype(np.int32)

    def check_all_ids(self) -> None:
        """Checks the file for ids outside the vocabulary, if its dtype has such values.

        Files of more than 2³² tokens are checked by `batch` instead.

        Raises:
            UserError: an id is outside; the message has the id and its position.
        """
        dtype = self.tokens.dtype
        every_id_fits = dtype.kind == "u" and np.iinfo(dtype).max < self.vocab_size
        if every_id_fits or len(self.tokens) > _SCAN_TOKENS:
            return
        chunk = 1 << 24
        for start in range(0, len(self.tokens), chunk):
            check_ids(self.name, self.tokens[start : start + chunk], start, self.vocab_size)


def check_ids(name: str, ids: np.ndarray, start: int, vocab_size: int) -> None:
    """Refuses values that are not token ids: outside [0, V), or, for a float dtype, not whole.

    Args:
        name: of the token file.
        ids: some of its tokens.
        start: index of the first of them.

    Raises:
        UserError: a value is not a token id; the message has the value and its position.
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
    """Opens training data and checks it as far as possible before training.

    Args:
        data_file: a binidx prefix (with or without `.bin` or `.idx`), or text: anything that
            `corpus.find` accepts. Text is tokenized once, in the order of the files (the sampler
            shuffles), and cached in `$XDG_CACHE_HOME/rwkv_jax` (`~/.cache/rwkv_jax`), keyed by a
            hash of its content. Above 16 GiB, the least recently used tokens are removed.
        magic_prime: None: computed; else checked.
        text_key: key of a jsonl, or column of a Parquet file, with the text.
        on_bad_line: what to do with a line that cannot be used: "stop" raises an error, "skip"
            skips it.

    Raises:
        UserError: the data does not exist, is damaged or too short for `ctx_len`, `magic_prime` is
            wrong, or (in a file of up to 2³² tokens; a longer one is checked batch by batch) an id
            is outside the vocabulary.
    """
    name, listed = str(data_file), None
    if corpus.is_binidx(name):
        tokens = open_binidx(name).tokens
    else:
        tokenizer.check_vocabulary(vocab_size, name)
        cached = cached_tokens(corpus.find(name, text_key, on_bad_line))
        tokens, listed = cached.tokens, append_suffix(cached.prefix, SKIPPED)
    prime = choose_magic_prime(name, len(tokens), ctx_len, magic_prime)
    skipped = listed if listed and listed.exists() else None
    dataset = Dataset(name, tokens, ctx_len, prime, vocab_size, skipped)
    dataset.check_all_ids()
    return dataset


def fingerprint(tokens: np.ndarray) -> str:
    """A fingerprint of a token file: dtype, length, and a hash of 256 evenly spaced places.

    A file of up to 16 MiB is hashed completely. The places include the first and the last tokens,
    so that a longer, shuffled or differently tokenized text has another fingerprint.
    """
    piece, places = (64 << 10) // tokens.itemsize, 256
    content = hashlib.blake2b(digest_size=8)
    for start in np.linspace(0, max(len(tokens) - piece, 0), places).astype(np.int64).tolist():
        content.update(np.ascontiguousarray(tokens[start : start + piece]).data)
        if len(tokens) <= piece:
            break
    return f"{content.hexdigest()} ({len(tokens)} {tokens.dtype.name})"
