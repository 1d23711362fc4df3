"""PyTorch's `.pth` container, read and written without PyTorch: `read`, `write`.

A `.pth` is a pickle that describes tensors plus the raw bytes of their storages. Two containers
are in use: a zip of uncompressed records (`NAME/data.pkl`, `NAME/data/0`, …), written by
`torch.save` since 1.6, and the older sequence of five pickles followed by the storages.

Files are untrusted. The pickle runs on a small stack machine (`_unpickle`) that supports only the
opcodes and names of a state dict, and refuses all others by name; it builds plain Python values and
immutable records, and calls nothing that a file names. Tensors become views of the mapped file only
after their bounds have been checked. Member names are looked up, never used as paths. The memory
that a file can make us allocate is bounded by constants here and, for the tensors, by
`MAX_EXPANSION` times the file's own size.
"""

import mmap
import os
import pickle
import pickletools
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from rwkv_jax.errors import UserError
from rwkv_jax.files import flush_folder, written_whole

MAX_PICKLE = 2 << 20  # bytes; the 13.3b model's is 0.3 MB
MAX_DIRECTORY = 8 << 20  # bytes; the 13.3b model's is 0.2 MB
MAX_EXPANSION = 4  # bytes of tensors per byte of file; tied embedding and head take up to 2
_MAX_COUNT = 1 << 48  # elements, strides and offsets beyond this are invalid
_STORAGES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}


class Array(Protocol):
    """A tensor for `write`: its shape is needed first, its values (`np.asarray`) later."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def __array__(self) -> np.ndarray: ...


class _Refused(Exception):
    """The reason why a file cannot be used; `read` makes it a `UserError` that names the path."""


# ------------------------------------------------------------------------------------- reading


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a `.pth`, by name, as read-only views of the mapped file.

    Nothing is copied or converted: bfloat16 stays `ml_dtypes.bfloat16`, tied tensors share
    memory, and bytes are read from the disk when an array is used (so checksums are not verified).
    The mapping lives as long as any of its arrays. Meanwhile, replacing the file is safe, but
    truncating it in place is not.

    A state dict nested under `state_dict`, `module` or `model` is found; entries that are not
    tensors are omitted.

    Raises:
      UserError: the file is missing, truncated, of another kind, or has a name or opcode that a
        state dict of plain tensors does not need.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: the file is empty") from None
    try:
        head = mapped[:64]
        if head.startswith(b"PK\x03\x04"):
            value, storages, places = _read_zip(mapped)
        elif head.startswith(_LEGACY_MAGIC):
            value, storages, places = _read_legacy(mapped)
        else:
            raise _Refused(_what_is(head))
        tensors = _find_state_dict(value)
        total = sum(_check_bounds(name, tensor) for name, tensor in tensors.items())
        if total > MAX_EXPANSION * len(mapped):
            raise _Refused(
                f"its tensors share storage so often that {len(mapped)} bytes expand to {total}"
            )
        return {name: _view(mapped, places, tensor) for name, tensor in tensors.items()}
    except _Refused as reason:
        raise UserError(f"{path}: {reason}") from None


# First bytes of files that users mistake for models.
_OTHER_FILES = {
    b"version https://git-lfs": "a Git LFS pointer, not the model: download the file itself",
    b"<": "a web page, not a model: download the file itself",
    b"\xef\xbb\xbf<": "a web page, not a model: download the file itself",
    b"GGUF": "a GGUF file of llama.cpp, not a .pth: download the model's .pth",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"7z\xbc\xaf": "compressed with 7-Zip: unpack it first",
    bytes(64): "only zeros, not a .pth: the download is incomplete; start it again",
    b"\x80": "a pickle that torch.save did not write, not a .pth",
}


def _what_is(head: bytes) -> str:
    if is_safetensors(head):
        return (
            "is a safetensors file, not a .pth: convert it with rwkv-jax st-to-pth, or the "
            "folder of a Hugging Face model with rwkv-jax hf-to-pth"
        )
    for begin, what in _OTHER_FILES.items():
        if head.lstrip(b"\r\n\t ").startswith(begin):
            return f"is {what}"
    return "is not a .pth: it starts with neither a zip record nor PyTorch's old magic number"


def is_safetensors(head: bytes) -> bool:
    """Whether a file starts like safetensors: with a length, then a JSON object of that length."""
    return head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < 1 << 32


class _Global(NamedTuple):
    """A name from a GLOBAL opcode; never resolved to anything."""

    module: str
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in elements, as the fields below
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_ORDERED_DICT = _Global("collections", "OrderedDict")
_REBUILD_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_KNOWN_GLOBALS = frozenset(
    [
        _ORDERED_DICT,
        _REBUILD_TENSOR,
        _REBUILD_PARAMETER,
        *(_Global("torch", name) for name in _STORAGES),
    ]
)

# Opcodes by their letters in the pickle protocol.
_BINPUT, _LONG_BINPUT, _BINGET, _LONG_BINGET = b"qrhj"
_MARK, _TUPLE, _EMPTY_TUPLE, _TUPLE1, _TUPLE2, _TUPLE3 = b"(t)\x85\x86\x87"
_EMPTY_DICT, _SETITEM, _SETITEMS, _EMPTY_LIST, _APPEND, _APPENDS = b"}su]ae"
_BINUNICODE, _BININT, _BININT1, _BININT2, _LONG1, _BINFLOAT = b"XJKM\x8aG"
_NONE, _NEWTRUE, _NEWFALSE = b"N\x88\x89"
_PROTO, _GLOBAL, _REDUCE, _BUILD, _BINPERSID, _STOP = b"\x80cRbQ."
_CONSTANTS = {_NONE: None, _NEWTRUE: True, _NEWFALSE: False}
_TUPLES = {_TUPLE1: 1, _TUPLE2: 2, _TUPLE3: 3}


def _unpickle(data: bytes, pos: int, storages: dict[str, _Storage]) -> tuple[Any, int]:
    """The value of the pickle at `data[pos:]` and the position after it.

    Values are None, bool, int, float, str, tuple, list, dict and the records above. `storages`
    collects every storage that is referred to. Every opcode takes at least one byte and makes at
    most one object, so time and memory are linear in the pickle's size. A truncated argument is
    detected when the next opcode is missing.
    """
    machine = _StackMachine(data, pos, storages)
    try:
        while True:
            op = data[machine.pos]
            machine.pos += 1
            if op == _STOP:
                return machine.stack.pop(), machine.pos
            execute = _OPCODES.get(op)
            if execute is None:
                names = {ord(known.code): known.name for known in pickletools.opcodes}
                name = names.get(op, f"{op:#04x}")
                raise _Refused(
                    f"its pickle uses opcode {name}, which a dict of tensors does not need: "
                    "not loaded, as such an opcode can run code"
                )
            execute(machine, op)
    except (IndexError, KeyError, ValueError, struct.error):
        raise _Refused("its pickle is truncated or damaged") from None


class _StackMachine:
    """The state of `_unpickle`, with a method for each group of opcodes."""

    def __init__(self, data: bytes, pos: int, storages: dict[str, _Storage]):
        self.data, self.pos, self.storages = data, pos, storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def _argument(self, size: int) -> bytes:
        self.pos += size
        return self.data[self.pos - size : self.pos]

    def _byte(self) -> int:
        self.pos += 1
        return self.data[self.pos - 1]

    def _integer(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self._argument(size), "little", signed=signed)

    def memoize(self, op: int) -> None:
        if op == _BINPUT:
            index = self._byte()
        else:
            index = self._integer(4)
            if index > len(self.memo):  # picklers count up; arbitrary keys can slow a dict
                raise _Refused("its pickle numbers its memo in an unusual way")
        self.memo[index] = self.stack[-1]

    def recall(self, op: int) -> None:
        self.stack.append(self.memo[self._byte() if op == _BINGET else self._integer(4)])

    def push_number(self, op: int) -> None:
        value: int | float
        if op == _BININT1:
            value = self._byte()
        elif op == _BININT2:
            value = self._integer(2)
        elif op == _BININT:
            value = self._integer(4, signed=True)
        elif op == _LONG1:
            value = self._integer(self._byte(), signed=True)
        else:
            value = struct.unpack(">d", self._argument(8))[0]
        self.stack.append(value)

    def push_text(self, op: int) -> None:
        self.stack.append(self._argument(self._integer(4)).decode("utf-8", "surrogatepass"))

    def push_constant(self, op: int) -> None:
        self.stack.append(_CONSTANTS[op])

    def push_empty(self, op: int) -> None:
        empty: Any = {} if op == _EMPTY_DICT else [] if op == _EMPTY_LIST else ()
        self.stack.append(empty)

    def push_global(self, op: int) -> None:
        end = self.data.index(b"\n", self.data.index(b"\n", self.pos) + 1)
        module, name = self.data[self.pos : end].decode("utf-8", "replace").split("\n")
        if _Global(module, name) not in _KNOWN_GLOBALS:
            raise _Refused(
                f"its pickle names {_show(module + '.' + name)}, which a dict of tensors "
                "does not need: not loaded, as such a name can run code"
            )
        self.stack.append(_Global(module, name))
        self.pos = end + 1

    def mark(self, op: int) -> None:
        self.marks.append(len(self.stack))

    def build_tuple(self, op: int) -> None:
        if op == _TUPLE:
            mark = self.marks.pop()
            self.stack[mark:] = [tuple(self.stack[mark:])]
        else:
            size = _TUPLES[op]
            self.stack[-size] = tuple(self.stack[-size:])
            del self.stack[len(self.stack) - size + 1 :]

    def set_items(self, op: int) -> None:
        mark = self.marks.pop() if op == _SETITEMS else len(self.stack) - 2
        keys, values = self.stack[mark::2], self.stack[mark + 1 :: 2]
        del self.stack[mark:]
        if type(self.stack[-1]) is not dict or len(keys) != len(values):
            raise _Refused("its pickle sets items of something that is not a dict")
        if not all(type(k) is str or type(k) is int and 0 <= k < 1 << 24 for k in keys):
            raise _Refused("its pickle has a dict with keys that are not strings")
        self.stack[-1].update(zip(keys, values, strict=True))

    def append_items(self, op: int) -> None:
        mark = self.marks.pop() if op == _APPENDS else len(self.stack) - 1
        items = self.stack[mark:]
        del self.stack[mark:]
        if type(self.stack[-1]) is not list:
            raise _Refused("its pickle appends to something that is not a list")
        self.stack[-1].extend(items)

    def reduce(self, op: int) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _reduce(self.stack[-1], arguments)

    def build(self, op: int) -> None:
        # torch sets the attribute _metadata of a state dict's OrderedDict: dropped.
        del self.stack[-1]
        if type(self.stack[-1]) is not dict:
            raise _Refused("its pickle sets the state of something that is not a dict")

    def push_storage(self, op: int) -> None:
        storage = _storage(self.stack[-1])
        if self.storages.setdefault(storage.key, storage) != storage:
            raise _Refused(f"storage {_show(storage.key)} is described in two ways")
        self.stack[-1] = storage

    def check_protocol(self, op: int) -> None:
        if (version := self._byte()) != 2:
            raise _Refused(f"its pickle has protocol {version}; torch.save writes 2")


_OPCODES: dict[int, Callable[[_StackMachine, int], None]] = {
    **dict.fromkeys((_BINPUT, _LONG_BINPUT), _StackMachine.memoize),
    **dict.fromkeys((_BINGET, _LONG_BINGET), _StackMachine.recall),
    **dict.fromkeys((_BININT, _BININT1, _BININT2, _LONG1, _BINFLOAT), _StackMachine.push_number),
    _BINUNICODE: _StackMachine.push_text,
    **dict.fromkeys(_CONSTANTS, _StackMachine.push_constant),
    **dict.fromkeys((_EMPTY_DICT, _EMPTY_LIST, _EMPTY_TUPLE), _StackMachine.push_empty),
    _GLOBAL: _StackMachine.push_global,
    _MARK: _StackMachine.mark,
    **dict.fromkeys((_TUPLE, *_TUPLES), _StackMachine.build_tuple),
    **dict.fromkeys((_SETITEM, _SETITEMS), _StackMachine.set_items),
    **dict.fromkeys((_APPEND, _APPENDS), _StackMachine.append_items),
    _REDUCE: _StackMachine.reduce,
    _BUILD: _StackMachine.build,
    _BINPERSID: _StackMachine.push_storage,
    _PROTO: _StackMachine.check_protocol,
}


def _take(data: bytes, pos: int, size: int) -> bytes:
    piece = data[pos : pos + size]
    if len(piece) != size:
        raise IndexError
    return piece


def _show(text: str) -> str:
    """Quotes a file's text for a one-line message: escaped, and at most 80 characters."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _reduce(function: Any, arguments: Any) -> Any:
    """The result of REDUCE for the three callables of a state dict."""
    if type(function) is not _Global or type(arguments) is not tuple:
        raise _Refused("its pickle calls something that is not a function")
    if function == _ORDERED_DICT and len(arguments) == 0:
        return {}
    if function == _REBUILD_PARAMETER and len(arguments) == 3:
        if type(arguments[0]) is _Tensor:
            return arguments[0]  # requires_grad and hooks have no meaning here
    if function == _REBUILD_TENSOR and len(arguments) in (6, 7):
        storage, offset, shape, strides = arguments[:4]
        if (
            type(storage) is _Storage
            and _is_count(offset)
            and type(shape) is tuple
            and type(strides) is tuple
            and len(shape) == len(strides) <= 8
            and all(map(_is_count, shape))
            and all(map(_is_count, strides))
        ):
            return _Tensor(storage, offset, shape, strides)
    raise _Refused(f"its pickle calls {function.module}.{function.name} with unusual arguments")


def _storage(identity: Any) -> _Storage:
    """The persistent id `('storage', type, key, location, numel)`; the old container adds None."""
    if type(identity) is tuple and (
        len(identity) == 5 or len(identity) == 6 and identity[5] is None
    ):
        tag, kind, key, location, numel = identity[:5]
        if (
            type(tag) is str
            and tag == "storage"
            and type(kind) is _Global
            and kind.module == "torch"
            and type(key) is str
            and type(location) is str
            and _is_count(numel)
        ):
            return _Storage(key, _STORAGES[kind.name], numel)
    raise _Refused("its pickle refers to something that is not a tensor storage")


def _find_state_dict(value: Any) -> dict[str, _Tensor]:
    """The tensors of the outer dict or, if it has none, of the dict nested in it."""
    if type(value) is not dict:
        raise _Refused("has no dict of tensors: save model.state_dict()")
    for candidate in [value, *(value.get(key) for key in ("state_dict", "module", "model"))]:
        if type(candidate) is dict:
            tensors = {
                name: tensor
                for name, tensor in candidate.items()
                if type(name) is str and type(tensor) is _Tensor
            }
            if tensors:
                return tensors
    raise _Refused("has no tensors")


def _check_bounds(name: str, tensor: _Tensor) -> int:
    """The bytes of a copy of `tensor`; refuses a tensor that reaches beyond its storage."""
    numel, last, sized = 1, tensor.offset, 1
    for size, stride in zip(tensor.shape, tensor.strides, strict=True):
        numel *= size
        sized *= max(size, 1)
        last += (size - 1) * stride
    stored = tensor.storage.numel
    # numel > stored: an expanded (stride 0) tensor, which may represent any amount of memory.
    if numel > stored or (last >= stored if numel else sized >= _MAX_COUNT):
        raise _Refused(
            f"tensor {_show(name)} of shape {list(tensor.shape)} and strides "
            f"{list(tensor.strides)} reaches beyond its storage of {stored} elements"
        )
    return numel * tensor.storage.dtype.itemsize


def _view(mapped: mmap.mmap, places: Mapping[str, int], tensor: _Tensor) -> np.ndarray:
    dtype = tensor.storage.dtype
    if 0 in tensor.shape:
        return np.empty(tensor.shape, dtype)
    strides = [
        stride * dtype.itemsize if size > 1 else dtype.itemsize
        for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    start = places[tensor.storage.key] + tensor.offset * dtype.itemsize
    return np.ndarray(tensor.shape, dtype, mapped, start, strides)


# --------------------------------------------------------------------------- the two containers

_Contents = tuple[Any, dict[str, _Storage], dict[str, int]]  # value, storages, their positions

# Fixed parts of a zip file's structures, as in PKWARE's APPNOTE.TXT.
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")


class _Record(NamedTuple):
    start: int
    size: int


def _read_zip(mapped: mmap.mmap) -> _Contents:
    records = _zip_records(mapped)
    tops = [name[: -len("/data.pkl")] for name in records if re.fullmatch("[^/]+/data.pkl", name)]
    if len(tops) != 1:
        raise _Refused(_what_zip_is(records))
    top = tops[0] + "/"
    for name in records:
        if not name.startswith(top) or ".." in name.split("/"):
            raise _Refused(f"record {_show(name)} is outside the folder {_show(top)}")

    def content(record: _Record) -> bytes:
        return mapped[record.start : record.start + record.size]

    byteorder = records.get(top + "byteorder")
    if byteorder and (byteorder.size != 6 or content(byteorder) != b"little"):
        raise _Refused("its byte order is not little-endian")
    description = records[top + "data.pkl"]
    if description.size > MAX_PICKLE:
        raise _Refused(f"its data.pkl has {description.size} bytes; at most {MAX_PICKLE} are read")
    storages: dict[str, _Storage] = {}
    value, _ = _unpickle(content(description), 0, storages)
    places = {}
    for key, storage in storages.items():
        record = records.get(f"{top}data/{key}")
        if record is None:
            raise _Refused(f"storage {_show(key)} is missing")
        if record.size != storage.numel * storage.dtype.itemsize:
            raise _Refused(
                f"storage {_show(key)} has {record.size} bytes, not those of {storage.numel} "
                f"elements of {storage.dtype.name}"
            )
        places[key] = record.start
    return value, storages, places


def _what_zip_is(names: Iterable[str]) -> str:
    if any(name.endswith("data.pkl") for name in names):
        return "is a zip, but not PyTorch's: it needs one FOLDER/data.pkl"
    first = next(iter(names), "nothing")
    if first.endswith(".npy"):
        return "is NumPy's .npz, not a .pth; give a state of --save_state to --load_state"
    return f"is a zip of {_show(first)}, not a .pth: unpack it first"


def _zip_records(mapped: mmap.mmap) -> dict[str, _Record]:
    """Name → position of every record, from the central directory and each local header."""
    try:
        count, size, start = _zip_end(mapped)
        if size > MAX_DIRECTORY:
            raise _Refused(f"its zip directory has {size} bytes; at most {MAX_DIRECTORY} are read")
        directory = mapped[start : start + size]
        records: dict[str, _Record] = {}
        pos = 0
        for _ in range(count):
            fields = _CENTRAL.unpack_from(directory, pos)
            signature, flags, method = fields[0], fields[3], fields[4]
            packed, unpacked, name_size, extra_size, comment_size = fields[8:13]
            header = fields[16]
            pos += _CENTRAL.size
            raw_name = _take(directory, pos, name_size)
            extra = _take(directory, pos + name_size, extra_size)
            pos += name_size + extra_size + comment_size
            name = raw_name.decode("utf-8", "replace")
            if 0xFFFFFFFF in (packed, unpacked, header):
                unpacked, packed, header = _zip64_fields(extra, unpacked, packed, header)
            if flags & 1 or method != 0 or packed != unpacked:
                if "/" not in name:
                    raise _Refused(_what_zip_is([name]))
                raise _Refused(
                    f"record {_show(name)} is compressed or encrypted, which torch.save never "
                    "does: save it again with torch.save"
                )
            local = _LOCAL.unpack_from(mapped, header)
            name_at = header + _LOCAL.size
            begin = name_at + local[9] + local[10]
            if (
                signature != b"PK\x01\x02"
                or local[0] != b"PK\x03\x04"
                or mapped[name_at : name_at + local[9]] != raw_name
                or begin + unpacked > start
            ):
                raise _Refused(f"record {_show(name)} is not where the zip directory says")
            if name in records:
                raise _Refused(f"record {_show(name)} occurs twice")
            records[name] = _Record(begin, unpacked)
    except (struct.error, IndexError, OverflowError):
        raise _Refused("its zip directory is truncated or damaged") from None
    return records


def _zip_end(mapped: mmap.mmap) -> tuple[int, int, int]:
    """Number of records, size and start of the central directory."""
    end = mapped.rfind(b"PK\x05\x06", max(0, len(mapped) - _END.size - 0xFFFF))
    if end < 0:
        raise _Refused("is truncated: the directory at the end of the zip is missing")
    _, _, _, _, count, size, start, _ = _END.unpack_from(mapped, end)
    locator = end - _LOCATOR.size
    if locator >= 0 and mapped[locator : locator + 4] == b"PK\x06\x07":
        end = _LOCATOR.unpack_from(mapped, locator)[2]
        if end > locator:
            raise IndexError
        signature, *_, count, size, start = _END64.unpack_from(mapped, end)
        if signature != b"PK\x06\x06":
            raise IndexError
    if start + size > end or count * _CENTRAL.size > size:
        raise IndexError
    return count, size, start


def _zip64_fields(extra: bytes, *values: int) -> list[int]:
    """`values` with those of 0xFFFFFFFF replaced, in order, from the zip64 extra field."""
    pos = 0
    while pos < len(extra):
        tag, size = struct.unpack_from("<2H", extra, pos)
        pos += 4
        if tag == 1:
            wide = struct.iter_unpack("<Q", _take(extra, pos, size // 8 * 8))
            return [next(wide, (v,))[0] if v == 0xFFFFFFFF else v for v in values]
        pos += size
    raise IndexError


# The pickle of 0x1950a86a20f9469cfc6c, with which the old container starts.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def _read_legacy(mapped: mmap.mmap) -> _Contents:
    """Pickles of magic, 1001, system facts, the value, the keys; then count and bytes per key."""
    head = mapped[:MAX_PICKLE]
    storages: dict[str, _Storage] = {}
    pos = len(_LEGACY_MAGIC)
    protocol, pos = _unpickle(head, pos, {})
    system, pos = _unpickle(head, pos, {})
    if type(protocol) is not int or protocol != 1001 or type(system) is not dict:
        raise _Refused("is an old .pth of an unknown version")
    if system.get("little_endian") is not True:
        raise _Refused("its byte order is not little-endian")
    value, pos = _unpickle(head, pos, storages)
    keys, pos = _unpickle(head, pos, {})
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise _Refused("its list of storages is damaged")
    places: dict[str, int] = {}
    for key in keys:
        storage = storages.get(key)
        count = int.from_bytes(mapped[pos : pos + 8], "little")
        if storage is None or count != storage.numel:
            raise _Refused(f"storage {_show(key)} differs from its description in the pickle")
        places[key] = pos + 8
        pos += 8 + count * storage.dtype.itemsize
        if pos > len(mapped):
            raise _Refused(f"is truncated: storage {_show(key)} ends beyond the file")
    for key in storages:
        if key not in places:
            raise _Refused(f"storage {_show(key)} is missing")
    return value, storages, places


# ------------------------------------------------------------------------------------- writing


def write(path: str | os.PathLike[str], tensors: Mapping[str, Array], dtype: Any = None) -> None:
    """Writes `tensors` as `torch.save` would write a dict of them, atomically.

    The same tensors give the same bytes. Shapes are needed first, values one tensor at a time and
    in order, so with lazy values only one tensor is in memory. Storages are aligned to 64 bytes, so
    that readers can map them. `torch.load(path, weights_only=True, mmap=True)` reads the file.

    Args:
      path: replaced when everything is written and flushed; unchanged on any failure.
      tensors: name → anything with `shape`, `dtype` and `__array__`.
      dtype: the dtype to convert to, rounding to nearest even; None: each tensor's own.

    Raises:
      UserError: the file cannot be written, or a finite value overflows float16.
    """
    path = Path(path)
    try:
        with written_whole(path) as temporary, temporary.open("wb") as file:
            _write_zip(file, _records(tensors, dtype))
            file.flush()
            os.fsync(file.fileno())
        flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    except _Refused as reason:
        raise UserError(f"{path}: {reason}") from None


def _records(tensors: Mapping[str, Array], dtype: Any) -> Iterator[tuple[str, Any]]:
    dtypes = {
        name: np.dtype(tensor.dtype if dtype is None else dtype) for name, tensor in tensors.items()
    }
    yield "data.pkl", _describe({n: (dtypes[n], t.shape) for n, t in tensors.items()})
    yield "byteorder", b"little"
    for index, (name, tensor) in enumerate(tensors.items()):
        with np.errstate(over="raise"):
            try:
                values = np.ascontiguousarray(np.asarray(tensor, dtypes[name]))
            except FloatingPointError:
                raise _Refused(f"{name} has values beyond the range of {dtypes[name]}") from None
        yield f"data/{index}", values.reshape(-1).view(np.uint8).data
    yield "version", b"3\n"


def _describe(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The pickle of a dict of contiguous tensors whose storages are numbered in order."""
    memo: dict[str, int] = {}

    def name_of(module_and_name: str) -> bytes:
        if module_and_name in memo:
            return bytes([_BINGET, memo[module_and_name]])
        memo[module_and_name] = len(memo)
        return f"c{module_and_name}\n".encode() + bytes([_BINPUT, memo[module_and_name]])

    def text(value: str) -> bytes:
        raw = value.encode()
        return b"X" + struct.pack("<L", len(raw)) + raw

    def number(value: int) -> bytes:
        return pickle.dumps(int(value), protocol=2)[2:-1]  # without PROTO and STOP

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    parts = [b"\x80\x02}("]
    for index, (name, (dtype, shape)) in enumerate(tensors.items()):
        numel = int(np.prod(shape, dtype=np.int64))
        strides, step = [], 1
        for size in reversed(shape):
            strides.append(step)
            step *= size
        parts += [
            text(name),
            name_of("torch._utils\n_rebuild_tensor_v2"),
            b"((" + text("storage"),
            name_of(f"torch\n{_STORAGE_NAMES[dtype]}"),
            text(str(index)) + text("cpu") + number(numel) + b"tQK\x00",
            numbers(shape),
            numbers(tuple(reversed(strides))),
            b"\x89" + name_of("collections\nOrderedDict") + b")RtR",
        ]
    return b"".join(parts) + b"u."


_ALIGNMENT = 64
_FOLDER = "archive"  # torch's default without a file name
_NEEDS_ZIP64 = 0xFFFFFFFF
_DOS_DATE = 1 << 5 | 1  # 1980-01-01, so that the bytes do not depend on the clock


def _write_zip(file: IO[bytes], records: Iterator[tuple[str, Any]]) -> None:
    """Stored records, each aligned by an extra field (tag FB, as torch does), and a directory."""
    directory = []
    for name, content in records:
        raw_name = f"{_FOLDER}/{name}".encode()
        header, size, crc = file.tell(), len(content), zlib.crc32(content)
        wide = struct.pack("<2H2Q", 1, 16, size, size) if size >= _NEEDS_ZIP64 else b""
        short = 0xFFFFFFFF if wide else size
        unpadded = header + _LOCAL.size + len(raw_name) + len(wide) + 4
        padding = b"FB" + struct.pack("<H", -unpadded % _ALIGNMENT)
        padding += b"Z" * (-unpadded % _ALIGNMENT)
        common = (0, 0, 0, _DOS_DATE, crc, short, short, len(raw_name))
        need = 45 if wide else 20
        extra_size = len(wide) + len(padding)
        file.write(_LOCAL.pack(b"PK\x03\x04", need, *common, extra_size))
        file.write(raw_name + wide + padding)
        file.write(content)
        large = ([size, size] if wide else []) + ([header] if header >= _NEEDS_ZIP64 else [])
        extra = struct.pack(f"<2H{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        short_header = 0xFFFFFFFF if header >= _NEEDS_ZIP64 else header
        need = 45 if large else 20
        fixed = _CENTRAL.pack(
            b"PK\x01\x02", need, need, *common, len(extra), 0, 0, 0, 0, short_header
        )
        directory.append(fixed + raw_name + extra)
    start, count = file.tell(), len(directory)
    file.write(b"".join(directory))
    end = file.tell()
    size = end - start
    if count >= 0xFFFF or end >= _NEEDS_ZIP64:
        file.write(_END64.pack(b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start))
        file.write(_LOCATOR.pack(b"PK\x06\x07", 0, end, 1))
        count, size, start = min(count, 0xFFFF), 0xFFFFFFFF, 0xFFFFFFFF
    file.write(_END.pack(b"PK\x05\x06", 0, 0, count, count, size, start, 0))
