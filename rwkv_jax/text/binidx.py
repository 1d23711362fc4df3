"""Megatron's binidx token file: `NAME.bin` has the token ids, `NAME.idx` the position of each item.

`NAME.bin`: little-endian ids, item after item. `NAME.idx`, little-endian:

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     dtype code (`DTYPES`)
    uint64    number of items n
    uint64    number of document marks m
    int32     sizes[n], in tokens
    int64     pointers[n], in bytes from the start of NAME.bin
    int64     document marks[m]: the item at which each document starts, then n

The files written here have one document per item.
"""

import contextlib
import dataclasses
import os
import secrets
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from rwkv_jax.errors import UserError
from rwkv_jax.files import reporting_os_errors

DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"),
    2: np.dtype("<i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    6: np.dtype("<f8"),
    7: np.dtype("<f4"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 20  # entries of an index array in memory at once


@dataclasses.dataclass(frozen=True, eq=False)
class BinIdx:
    """An open token file. The arrays are memory-mapped and read-only.

    Attributes:
        prefix: path without `.bin` / `.idx`.
        tokens: [tokens], all items end to end, in the file's dtype.
        sizes: [items] int32, tokens of each item.
        pointers: [items] int64, byte offset of each item in the `.bin`.
    """

    prefix: Path
    tokens: np.ndarray
    sizes: np.ndarray
    pointers: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, item: int) -> np.ndarray:
        """Tokens of one item, [sizes[item]], including its closing token 0."""
        start = int(self.pointers[item]) // self.tokens.itemsize
        return self.tokens[start : start + int(self.sizes[item])]


def append_suffix(prefix: Path, ending: str) -> Path:
    """`prefix` with `ending` appended; `Path.with_suffix` would shorten `v1.5` to `v1`.

    Raises:
        UserError: the prefix is `.`, `..` or `/`, which has no name.
    """
    if prefix.name in ("", ".."):
        raise UserError(f"{prefix}: is a folder; add a name, {prefix / 'NAME'}")
    return prefix.with_name(prefix.name + ending)


def prefix_of(name: str | Path) -> Path:
    """The prefix of a token file, from the prefix or the path of either file."""
    return Path(str(name).removesuffix(".bin").removesuffix(".idx"))


def open_binidx(name: str | Path) -> BinIdx:
    """Memory-maps a token file after checking every number in its index.

    Args:
        name: the prefix, or the path of either file.

    Raises:
        UserError: a file is missing, empty, damaged or of another format.
    """
    prefix = prefix_of(name)
    bin_path, idx_path = append_suffix(prefix, ".bin"), append_suffix(prefix, ".idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; a binidx PREFIX needs PREFIX.bin and PREFIX.idx"
            )

    with reporting_os_errors(idx_path, "read"):
        idx_bytes = idx_path.stat().st_size
        with idx_path.open("rb") as file:
            header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{idx_path}: not a binidx index (it does not start with MMIDIDX)")
    _, version, code, items, marks = _HEADER.unpack(header)
    if version != 1:
        raise UserError(f"{idx_path}: format version {version}; only version 1 is supported")
    if code not in DTYPES:
        raise UserError(f"{idx_path}: dtype code {code} is not one of {sorted(DTYPES)}")
    expected = _HEADER.size + items * 12 + marks * 8
    if idx_bytes != expected:
        raise UserError(
            f"{idx_path}: {items} items and {marks} document marks take {expected} bytes, but the "
            f"file has {idx_bytes}: the copy is incomplete or damaged"
        )
    dtype = DTYPES[code]
    with reporting_os_errors(bin_path, "read"):
        bin_bytes = bin_path.stat().st_size
    if items == 0 or bin_bytes == 0:
        raise UserError(f"{bin_path}: has no tokens")
    if bin_bytes % dtype.itemsize:
        raise UserError(
            f"{bin_path}: {bin_bytes} bytes is not a whole number of {dtype.name} tokens: "
            "the copy is incomplete or damaged"
        )

    sizes_at = _HEADER.size
    pointers_at = sizes_at + items * 4
    marks_at = pointers_at + items * 8
    sizes = _map(idx_path, "<i4", sizes_at, items)
    pointers = _map(idx_path, "<i8", pointers_at, items)
    _check_items(idx_path, bin_bytes, dtype.itemsize, sizes, pointers)
    if marks:
        _check_marks(idx_path, items, _map(idx_path, "<i8", marks_at, marks))
    tokens = _map(bin_path, dtype, 0, bin_bytes // dtype.itemsize)
    return BinIdx(prefix, tokens, sizes, pointers)


def _map(path: Path, dtype: npt.DTypeLike, offset: int, count: int) -> np.ndarray:
    with reporting_os_errors(path, "map"):
        return np.memmap(path, dtype, "r", offset, (count,)).view(np.ndarray)


def _check_items(
    path: Path, bin_bytes: int, itemsize: int, sizes: np.ndarray, pointers: np.ndarray
) -> None:
    total = 0
    for start in range(0, len(sizes), _CHUNK):
        nbytes = sizes[start : start + _CHUNK].astype(np.int64) * itemsize
        where = pointers[start : start + _CHUNK]
        bad = (nbytes < 0) | (where < 0) | (where % itemsize != 0) | (where > bin_bytes - nbytes)
        if bad.any():
            item = start + int(bad.argmax())
            raise UserError(
                f"{path}: item {item} has {sizes[item]} tokens at byte {pointers[item]}, which is "
                f"not inside the {bin_bytes} bytes of the .bin: the two files do not belong "
                "together, or one is incomplete or damaged"
            )
        total += int(nbytes.sum())
    if total != bin_bytes:
        raise UserError(
            f"{path}: its items take {total} bytes, but the .bin has {bin_bytes}: the two files do "
            "not belong together, or one is incomplete or damaged"
        )


def _check_marks(path: Path, items: int, marks: np.ndarray) -> None:
    previous = 0
    for start in range(0, len(marks), _CHUNK):
        chunk = marks[start : start + _CHUNK]
        if chunk[0] < previous or chunk[-1] > items or (chunk[1:] < chunk[:-1]).any():
            raise UserError(
                f"{path}: its document marks do not ascend from 0 to the {items} items: "
                "the file is damaged"
            )
        previous = int(chunk[-1])


class BinIdxWriter:
    """Writes a token file in constant memory; both files appear at the end, or not at all.

        with BinIdxWriter(prefix) as writer:
            writer.append(tokens, sizes)

    They are written under temporary names and renamed when the block ends without an exception.
    Concurrent writers of the same prefix do not conflict: the last to finish wins.

    Raises (each method):
        UserError: a file cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike = np.uint16) -> None:
        self._prefix = Path(prefix)
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._code = _CODES[self._dtype]
        self.items = 0
        self.tokens = 0

    def __enter__(self) -> Self:
        tag = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        self._temporary = {e: append_suffix(self._prefix, e + tag) for e in (".bin", ".idx")}
        self._files: dict[str, BinaryIO] = {}
        try:
            for ending, path in self._temporary.items():
                with reporting_os_errors(append_suffix(self._prefix, ending), "write"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self._files[ending] = path.open("x+b")
        except UserError:
            self._discard()
            raise
        self._files[".idx"].write(bytes(_HEADER.size))  # the counts are known at the end
        return self

    def append(self, tokens: npt.ArrayLike, sizes: npt.ArrayLike) -> None:
        """Appends items.

        Args:
            tokens: [sum of sizes] ids, the items end to end.
            sizes: [items], tokens of each.

        Raises:
            ValueError: an id does not fit the dtype, or the sizes do not add up.
        """
        ids = np.asarray(tokens)
        lengths = np.asarray(sizes)
        if lengths.sum() != ids.size or (lengths < 0).any():
            raise ValueError(f"sizes add up to {lengths.sum()}, not to the {ids.size} tokens")
        if lengths.size and lengths.max() > np.iinfo(np.int32).max:
            raise UserError(
                f"{self._prefix}: an item has {lengths.max()} tokens; the format's limit is "
                "2147483647"
            )
        stored = ids.astype(self._dtype)
        if stored.dtype != ids.dtype and not np.array_equal(stored, ids):
            raise ValueError(f"ids from {ids.min()} to {ids.max()} do not fit {self._dtype.name}")
        with reporting_os_errors(self._prefix, "write"):
            self._files[".bin"].write(stored.tobytes())
            self._files[".idx"].write(lengths.astype("<i4").tobytes())
        self.items += lengths.size
        self.tokens += ids.size

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with reporting_os_errors(self._prefix, "write"):
                    self._finish()
        finally:
            self._discard()

    def _discard(self) -> None:
        """Closes and removes the temporary files."""
        for ending, file in self._files.items():
            with contextlib.suppress(OSError):  # a full disk fails again on this flush
                file.close()
            self._temporary[ending].unlink(missing_ok=True)

    def _finish(self) -> None:
        index = self._files[".idx"]
        byte = 0
        for start in range(0, self.items, _CHUNK):
            count = min(_CHUNK, self.items - start)
            index.seek(_HEADER.size + start * 4)
            nbytes = np.frombuffer(index.read(count * 4), "<i4").astype(np.int64)
            ends = byte + np.cumsum(nbytes * self._dtype.itemsize)
            index.seek(0, os.SEEK_END)
            index.write((ends - nbytes * self._dtype.itemsize).astype("<i8").tobytes())
            byte = int(ends[-1])
        for start in range(0, self.items + 1, _CHUNK):
            marks = np.arange(start, min(start + _CHUNK, self.items + 1), dtype="<i8")
            index.write(marks.tobytes())
        index.seek(0)
        index.write(_HEADER.pack(_MAGIC, 1, self._code, self.items, self.items + 1))
        for ending, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            os.replace(self._temporary[ending], append_suffix(self._prefix, ending))
