"""The arrays of a checkpoint on disk: reads and writes them in pieces, and checks that all exist.

Orbax stores a tree as a database in a folder (OCDBT), with a zarr array for each leaf. It reads and
writes whole leaves, which stack all layers; the underlying tensorstore can access any part.
"""

import collections
import contextlib
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError

PIECE = 32 << 20  # bytes read, written or converted at once
_LITERAL = re.compile(r"(?!/(gs|s3|az|hf)/)[\w/.,+=@~ -]{1,1024}")  # letters of any script


@contextlib.contextmanager
def literal(folder: Path) -> Iterator[Path]:
    """A path to `folder` without characters that orbax and tensorstore interpret: the folder itself
    or a symlink.

    They expand patterns (`[v1]`, `a*b`), split at backslashes, treat `/s3/` and `gs:/` as cloud
    storage, resolve `link/..` to the folder of the link or reject it, and reject non-UTF-8 paths.

    Raises:
        UserError: no such path can be created.
    """
    if ".." in folder.parts:
        folder = folder.resolve()
    if _LITERAL.fullmatch(str(folder)):
        yield folder
        return
    if jax.process_count() > 1:  # orbax requires the same path in all processes
        raise UserError(
            f"{folder}: several processes need a path of letters, digits, spaces and _/.,+=@~-"
        )
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="rwkv_jax-"))
            link = Path(temporary) / "folder"
            link.symlink_to(folder)
        except OSError as error:
            raise UserError(
                f"{folder}: a path with these characters needs a link in a temporary folder, which "
                f"cannot be created: {error.strerror}; set TMPDIR, or use letters and digits"
            ) from None
        if not _LITERAL.fullmatch(str(link)):
            raise UserError(f"TMPDIR {link.parents[1]}: set it to a path of letters and digits")
        yield link


@contextlib.contextmanager
def read(folder: Path, config: ModelConfig) -> Iterator[dict[str, pth.Array]]:
    """Opens the database in `folder`: official name → tensor, in the official order.

    Values are read when they are used (`np.asarray`, to any dtype), only within the context, and
    are not cached.

    Raises:
        UserError: an array does not belong to such a model; or, when values are read, is damaged.
        ValueError: tensorstore's error for a damaged database.
    """
    with literal(folder) as path:
        yield _read(path, config, folder)


def _read(path: Path, config: ModelConfig, folder: Path) -> dict[str, pth.Array]:
    opening = {leaf: ts.open(_spec(path, leaf)) for leaf in _leaves(config)}
    arrays = {leaf: future.result() for leaf, future in opening.items()}
    for leaf, shape in _leaves(config).items():
        array = arrays[leaf]
        if array.shape != shape or array.dtype != ts.float32:
            raise UserError(
                f"{leaf} is {array.dtype.name} {list(array.shape)}, not float32 {list(shape)}"
            )
        if math.prod(_chunk(array)) > math.prod(shape):  # reading would allocate a whole chunk
            raise UserError(f"{leaf} is stored in pieces of {list(_chunk(array))}")
    tensors: dict[str, pth.Array] = {}
    for name, shape in weights.official_shapes(config).items():
        leaf, layer = _leaf(name)
        array = arrays[leaf] if layer is None else arrays[leaf][layer]
        tensors[name] = _Tensor(array, shape, folder)
    return tensors


def write(folder: Path, config: ModelConfig, tensors: Mapping[str, pth.Array]) -> None:
    """Replaces the arrays of the database in `folder` by these tensors, in float32.

    Args:
        folder: orbax has written a tree with the leaves of such a model here, of any shapes.
        tensors: all tensors of `weights.official_shapes`.
    """
    with literal(folder) as path:
        _write(path, config, tensors)


def _write(folder: Path, config: ModelConfig, tensors: Mapping[str, pth.Array]) -> None:
    # With a cache, all arrays share one open database; otherwise each opens its own and their
    # commits conflict.
    context = ts.Context({"cache_pool": {"total_bytes_limit": 1}})
    creating = {
        leaf: ts.open(
            _spec(folder, leaf) | {"metadata": _metadata(leaf, shape)},
            context=context,
            create=True,
            delete_existing=True,
        )
        for leaf, shape in _leaves(config).items()
    }
    failures = [future.exception() for future in creating.values()]  # waits for all of them
    for failure in filter(None, failures):
        raise failure
    arrays = {leaf: future.result() for leaf, future in creating.items()}
    batch, size = ts.Transaction(atomic=True), 0  # each commit creates files, so not one per piece
    for name, shape in weights.official_shapes(config).items():
        leaf, layer = _leaf(name)
        array = arrays[leaf] if layer is None else arrays[leaf][layer]
        values = np.asarray(tensors[name]).reshape(weights.tree_shape(shape))
        for part in _pieces(values.shape):
            if size > PIECE:
                batch.commit_sync()
                batch, size = ts.Transaction(atomic=True), 0
            array.with_transaction(batch)[part] = values[part].astype(np.float32)
            size += 4 * values[part].size
    batch.commit_sync()


def check(folder: Path, arrays: Iterable[Any]) -> None:
    """Checks that every piece of every array that the database in `folder` should hold is on disk.

    A missing piece would be read as zeros, without an error.

    Args:
        arrays: anything with the `shape` and `dtype` of each; their names do not matter.

    Raises:
        ValueError: a piece is missing, or the shapes and dtypes differ.
    """
    with literal(folder) as path:
        database = ts.KvStore.open(_database(path)).result()
        keys = {key.decode() for key in database.list().result()}
        names = [key.removesuffix("/zarr.json") for key in keys if key.endswith("/zarr.json")]
        opening = {name: ts.open(_spec(path, name)) for name in names}
        opened = {name: future.result() for name, future in opening.items()}
    expected = collections.Counter((array.shape, np.dtype(array.dtype)) for array in arrays)
    found = collections.Counter((a.shape, a.dtype.numpy_dtype) for a in opened.values())
    if found != expected:
        differing = next(iter((expected - found) + (found - expected)))
        raise ValueError(
            f"{expected[differing]} arrays {list(differing[0])} of {differing[1]} cannot be read "
            f"back: {found[differing]} exist"
        )
    for name, array in opened.items():
        counts = np.ceil(np.divide(array.shape, _piece(array))).astype(int)
        for index in np.ndindex(*counts):
            if "/".join([name, "c", *map(str, index)]) not in keys:
                raise ValueError(f"a piece of {name} cannot be read back")


class _Tensor:
    """An array of the database, or one layer of it, in its official shape."""

    dtype = np.dtype(np.float32)

    def __init__(self, array: Any, shape: tuple[int, ...], folder: Path):
        self.shape = shape
        self._array, self._folder = array, folder

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.empty(self._array.shape, dtype or self.dtype)
        for part in _pieces(values.shape, _chunk(self._array)[0]):
            try:
                read = self._array[part].read().result()
            except ValueError as error:
                raise UserError(f"{self._folder}: damaged: {str(error)[:200]!a}") from None
            values[part] = read
        return values.reshape(self.shape)


def _leaf(name: str) -> tuple[str, int | None]:
    """Orbax's name of the leaf that contains an official tensor, and the row in it."""
    path, layer = weights.parameter_path(name)
    return ".".join(path), layer


def _leaves(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of the leaves of the model's tree."""
    shapes = {}
    for name, shape in weights.official_shapes(config).items():
        leaf, layer = _leaf(name)
        row = weights.tree_shape(shape)
        shapes[leaf] = row if layer is None else (config.n_layer, *row)
    return shapes


def _chunk(array: Any) -> tuple[int, ...]:
    """The shape of the unit of reading (the chunk)."""
    return array.chunk_layout.read_chunk.shape


def _piece(array: Any) -> tuple[int, ...]:
    """The shape of the values stored under one key."""
    return array.chunk_layout.write_chunk.shape or ()


def _pieces(shape: tuple[int, ...], least: int = 1) -> list[slice]:
    """Ranges of the first axis, of about equal length, each at most `PIECE` bytes of float32.

    Only the last may be shorter than `least`, which has precedence over `PIECE`.

    >>> _pieces((10, PIECE // 16))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    rows = shape[0]
    count = min(rows, math.ceil(4 * math.prod(shape) / PIECE))
    step = max(math.ceil(rows / count), least)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _database(folder: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}


def _spec(folder: Path, leaf: str) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {**_database(folder), "path": f"{leaf}/"},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def _metadata(leaf: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The zarr metadata of an array whose chunks are the pieces that are written."""
    stacked = leaf.startswith("blocks.")
    row = shape[1:] if stacked else shape
    piece = (_pieces(row)[0].stop, *row[1:])
    chunk = {"chunk_shape": (1, *piece) if stacked else piece}
    return {
        "shape": shape,
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": chunk},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
