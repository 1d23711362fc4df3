"""Tokenized text, kept under the user's cache folder by a hash of its content."""

import contextlib
import hashlib
import os
import re
import weakref
from pathlib import Path

from rwkv_jax.errors import UserError
from rwkv_jax.files import cache_folder, reporting_os_errors, scratch_folder, try_lock
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import BinIdx, beside, open_binidx
from rwkv_jax.text.corpus import SKIPPED, Corpus
from rwkv_jax.text.tokenization import tokenize

_CACHE_FORMAT = 2  # part of a cached file's name: raise it when the output of `tokenize` changes
_CACHE_BYTES = 16 << 30  # of tokens that are kept beside those in use
_RECORD = ".blake2b"  # of a kept token file; its time is that of the last use
_KEPT = (SKIPPED, ".bin", ".idx", _RECORD)


def tokenized(text: Corpus) -> BinIdx:
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
