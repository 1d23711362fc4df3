"""Tokenized text, cached in the user's cache folder under a hash of its content."""

import contextlib
import hashlib
import os
import re
import weakref
from pathlib import Path

from rwkv_jax.errors import UserError
from rwkv_jax.files import cache_folder, reporting_os_errors, scratch_folder, try_lock
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import BinIdx, append_suffix, open_binidx
from rwkv_jax.text.corpus import SKIPPED, Corpus
from rwkv_jax.text.tokenization import tokenize

_CACHE_FORMAT = 2  # part of a cached file's name: increment when the output of `tokenize` changes
_CACHE_BYTES = 16 << 30  # limit of the cache, in addition to the tokens in use
# Suffix of the record of a cached token file: the hash of its content; its mtime is the last use.
_RECORD = ".blake2b"
_CACHED = (SKIPPED, ".bin", ".idx", _RECORD)


def cached_tokens(text: Corpus) -> BinIdx:
    """The token file of a text; it is written if it does not exist or is damaged.

    The file name has a hash of everything that the bytes depend on, the record has the hash of the
    bytes, and complete files are renamed into place, so concurrent processes never see a partial
    file.
    """
    options = (tokenizer.VOCAB_NAME, _CACHE_FORMAT, text.text_key, text.skip_bad)
    content = hashlib.blake2b(repr(options).encode(), digest_size=16)
    for path in text.files:
        with reporting_os_errors(path, "read"), path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        # The extensions determine how a file is read; the list of skipped lines contains its name.
        named = str(path) if text.skip_bad else "".join(path.suffixes[-2:]).lower()
        content.update(repr((digest, named)).encode())
    folder = cache_folder()
    prefix = folder / f"{text.stem[:32]}-{content.hexdigest()}"
    if cached := _open_cached(prefix):
        return cached
    with scratch_folder(folder / "tokenizing") as scratch:
        new = scratch / "tokens"
        tokenize(text, new)
        with reporting_os_errors(prefix, "write"):
            append_suffix(new, _RECORD).write_bytes(_content_hash(new))
            for ending in _CACHED:
                if append_suffix(new, ending).exists():
                    os.replace(append_suffix(new, ending), append_suffix(prefix, ending))
    tokens = _open_cached(prefix) or open_binidx(prefix)
    _limit_cache(folder)
    return tokens


def _open_cached(prefix: Path) -> BinIdx | None:
    """Cached tokens, if present and intact; locked against removal while the array lives."""
    try:
        record = os.open(append_suffix(prefix, _RECORD), os.O_RDONLY)
    except OSError:
        return None
    try_lock(record, shared=True)
    with contextlib.suppress(OSError, UserError):
        if append_suffix(prefix, _RECORD).read_bytes() == _content_hash(prefix):
            cached = open_binidx(prefix)
            weakref.finalize(cached.tokens, os.close, record)
            with contextlib.suppress(OSError):
                os.utime(append_suffix(prefix, _RECORD))
            return cached
    os.close(record)
    return None


def _limit_cache(folder: Path) -> None:
    """Removes the least recently used tokens that no process uses, down to `_CACHE_BYTES`."""
    entries: dict[Path, list[os.stat_result]] = {}
    ending = "|".join(map(re.escape, _CACHED))
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
            # Created here if a killed process did not get to create it.
            record = os.open(append_suffix(prefix, _RECORD), os.O_RDWR | os.O_CREAT)
            if try_lock(record):
                for ending in reversed(_CACHED):
                    append_suffix(prefix, ending).unlink(missing_ok=True)
                total -= sum(stat.st_size for stat in entries[prefix])
            os.close(record)


def _content_hash(prefix: Path) -> bytes:
    digests = []
    for path in (append_suffix(prefix, ending) for ending in _CACHED[:-1]):
        if path.exists():
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, hashlib.blake2b).hexdigest())
    return "\n".join(digests).encode()
