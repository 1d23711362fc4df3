"""Hostile and broken `.pth` files, built with the standard library only.

`PAYLOADS` are pickles that a plain `pickle.loads` would obey: given a command, it runs. `PICKLES`
and `ARCHIVES` are everything else a reader must refuse, with a part of the message it has to give.
"""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable

# Pieces of honest pickles, to build dishonest ones from.
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
ORDERED_DICT = b"ccollections\nOrderedDict\n"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<L", len(raw)) + raw


def number(value: int) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(
    key: str = "0",
    numel: int = 6,
    kind: str = "Float",
    location: str = "cpu",
    more: bytes = b"",
) -> bytes:
    identity = text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text(location)
    return b"(" + identity + number(numel) + more + b"tQ"


def tensor(
    offset: bytes = number(0),
    shape: bytes = numbers(2, 3),
    strides: bytes = numbers(3, 1),
    stored: bytes = storage(),
) -> bytes:
    hooks = ORDERED_DICT + b")R"
    return REBUILD + b"(" + stored + offset + shape + strides + b"\x89" + hooks + b"tR"


def state_dict(**values: bytes) -> bytes:
    items = b"".join(text(name) + value for name, value in values.items())
    return b"\x80\x02}(" + items + b"u."


HONEST = state_dict(a=tensor())
HONEST_OLD = state_dict(a=tensor(stored=storage(more=b"N")))  # of the old container
SIX_FLOATS = struct.pack("<6f", *range(6))


def archive(
    description: bytes = HONEST,
    *,
    data: bytes | None = SIX_FLOATS,
    compression: int = zipfile.ZIP_STORED,
    top: str = "archive",
    more: tuple[tuple[str, bytes], ...] = (),
) -> bytes:
    """A zip container of one storage."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(f"{top}/data.pkl", description)
        if data is not None:
            file.writestr(f"{top}/data/0", data)
        file.writestr(f"{top}/version", "3\n")
        for name, content in more:
            file.writestr(name, content)
    return buffer.getvalue()


LEGACY_HEAD = (
    pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    + pickle.dumps(1001, 2)
    + pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
)


def legacy(
    description: bytes = HONEST_OLD,
    *,
    keys: object = ("0",),
    count: int = 6,
    data: bytes = SIX_FLOATS,
) -> bytes:
    """The container of five pickles, with one storage."""
    keys = list(keys) if isinstance(keys, tuple) else keys
    return LEGACY_HEAD + description + pickle.dumps(keys, 2) + struct.pack("<q", count) + data


# What a plain unpickler would obey -----------------------------------------------------------


def _quoted(command: str) -> bytes:
    return f"S{command!r}\n".encode()


PAYLOADS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "os.system": (lambda c: b"cos\nsystem\n(" + text(c) + b"tR.", "os.system"),
    "posix.system": (lambda c: b"cposix\nsystem\n(" + text(c) + b"tR.", "posix.system"),
    "subprocess": (
        lambda c: b"csubprocess\ncheck_call\n((" + text("sh") + text("-c") + text(c) + b"ltR.",
        "subprocess.check_call",
    ),
    "eval": (
        lambda c: b"cbuiltins\neval\n(" + text(f"__import__('os').system({c!r})") + b"tR.",
        "builtins.eval",
    ),
    "exec": (
        lambda c: b"cbuiltins\nexec\n(" + text(f"import os; os.system({c!r})") + b"tR.",
        "builtins.exec",
    ),
    "eval of python 2": (
        lambda c: b"c__builtin__\neval\n(" + text(f"__import__('os').system({c!r})") + b"tR.",
        "__builtin__.eval",
    ),
    "getattr": (
        lambda c: (
            b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n("
            + (text("os") + b"tR" + text("system") + b"tR(" + text(c) + b"tR.")
        ),
        "builtins.getattr",
    ),
    "inside a state dict": (
        lambda c: state_dict(a=b"cos\nsystem\n(" + text(c) + b"tR", b=tensor()),
        "os.system",
    ),
    "INST": (lambda c: b"(" + _quoted(c) + b"ios\nsystem\n.", "opcode STRING"),
    "INST without arguments": (lambda c: b"(" + text(c) + b"ios\nsystem\n.", "opcode INST"),
    "OBJ": (lambda c: b"(cos\nsystem\n" + text(c) + b"o.", "os.system"),
    "STACK_GLOBAL": (
        lambda c: b"\x80\x04" + text("os") + text("system") + b"\x93(" + text(c) + b"tR.",
        "protocol 4",
    ),
    "STACK_GLOBAL in protocol 2": (
        lambda c: b"\x80\x02" + text("os") + text("system") + b"\x93(" + text(c) + b"tR.",
        "opcode STACK_GLOBAL",
    ),
    "a dotted name": (
        lambda c: (
            b"\x80\x04" + text("pickle") + text("sys.modules") + b"\x93" + b"0"
            b"cos\nsystem\n(" + text(c) + b"tR."
        ),
        "protocol 4",
    ),
    "NEWOBJ": (
        lambda c: (
            b"cbuiltins\ntuple\n(cbuiltins\nmap\n(cos\nsystem\n(" + (text(c) + b"lt\x81t\x81.")
        ),
        "builtins.tuple",
    ),
    "BUILD of a class": (
        lambda c: (
            b"ccollections\nOrderedDict\n)R}" + (text("x") + b"cos\nsystem\n(" + text(c) + b"tRsb.")
        ),
        "os.system",
    ),
    "PUT, GET and text opcodes": (
        lambda c: b"cos\nsystem\np7\n0g7\n(V" + c.encode() + b"\ntR.",
        "os.system",
    ),
}

# Other pickles to be refused -----------------------------------------------------------------

_NESTED = 200_000

PICKLES: dict[str, tuple[bytes, str]] = {
    # Names and opcodes.
    "an unknown name of torch": (b"ctorch._utils\n_rebuild_tensor\n.", "torch._utils._rebuild_t"),
    "a loader of torch": (b"ctorch\nload\n.", "torch.load"),
    "Counter": (b"ccollections\nCounter\n.", "collections.Counter"),
    "codecs": (b"c_codecs\nencode\n.", "_codecs.encode"),
    "numpy": (b"cnumpy.core.multiarray\n_reconstruct\n.", "numpy.core.multiarray"),
    "a name that hides in control characters": (b"cos\x1b[2K\nsys\r\ntem\n.", r"os\x1b[2K.sys\r"),
    "a name that is not text": (b"c\xff\xfe\n\x00\n.", "its pickle names"),
    "an endless name": (b"c" + b"a" * 100_000 + b"\nb\n.", "its pickle names 'aaa"),
    "INST": (b"(ios\nsystem\n.", "opcode INST"),
    "OBJ": (b"(" + REBUILD + b"o.", "opcode OBJ"),
    "NEWOBJ": (ORDERED_DICT + b")\x81.", "opcode NEWOBJ"),
    "NEWOBJ_EX": (ORDERED_DICT + b")}\x92.", "opcode NEWOBJ_EX"),
    "EXT1": (b"\x82\x01.", "opcode EXT1"),
    "EXT2": (b"\x83\x01\x00.", "opcode EXT2"),
    "EXT4": (b"\x84\x01\x00\x00\x00.", "opcode EXT4"),
    "PERSID": (b"Pos.system\n.", "opcode PERSID"),
    "DUP": (b"}2.", "opcode DUP"),
    "LONG4": (b"\x8b\xff\xff\xff\x7f.", "opcode LONG4"),
    "INT of many digits": (b"I" + b"9" * 100_000 + b"\n.", "opcode INT"),
    "FRAME": (b"\x95" + b"\xff" * 8, "opcode FRAME"),
    "BINUNICODE8": (b"\x8d" + b"\xff" * 8, "opcode BINUNICODE8"),
    "BYTEARRAY8": (b"\x96" + b"\xff" * 8, "opcode BYTEARRAY8"),
    "an opcode that does not exist": (b"\xff", "opcode 0xff"),
    "protocol 3": (b"\x80\x03}.", "protocol 3"),
    # Calls and states of what may be on the stack.
    "REDUCE of a tensor": (state_dict(a=tensor() + b")R"), "not a function"),
    "REDUCE of a storage": (state_dict(a=storage() + b")R"), "not a function"),
    "REDUCE of a string": (state_dict(a=text("os.system") + b")R"), "not a function"),
    "REDUCE with a list": (state_dict(a=REBUILD + b"]R"), "not a function"),
    "REDUCE of a storage type": (b"ctorch\nFloatStorage\n)R.", "torch.FloatStorage"),
    "OrderedDict of pairs": (ORDERED_DICT + b"(]tR.", "unusual arguments"),
    "rebuild without arguments": (REBUILD + b")R.", "unusual arguments"),
    "rebuild from a global": (state_dict(a=tensor(stored=ORDERED_DICT)), "unusual arguments"),
    "a parameter of no tensor": (
        b"ctorch._utils\n_rebuild_parameter\n(}\x89}tR.",
        "unusual arguments",
    ),
    "BUILD on a tensor": (state_dict(a=tensor() + b"}" + text("offset") + number(9) + b"sb"), "no"),
    "BUILD on a storage": (
        state_dict(a=tensor(stored=storage() + b"}" + text("numel") + number(9) + b"sb")),
        "sets the state of something that is not a dict",
    ),
    "BUILD on a function": (
        REBUILD + b"N}" + text("__code__") + b"Ns\x86b.",
        "sets the state of something that is not a dict",
    ),
    "SETITEMS of a list": (b"](" + text("a") + b"Nu.", "not a dict"),
    "SETITEMS of an odd number": (b"}(" + text("a") + b"u.", "not a dict"),
    "APPENDS to a dict": (b"}(Ne.", "not a list"),
    "a tensor as a key": (b"}" + tensor() + b"Ns.", "keys that are not strings"),
    "a deep tuple as a key": (b"})" + b"\x85" * _NESTED + b"Ns.", "keys that are not strings"),
    "a list as a key": (b"}]Ns.", "keys that are not strings"),
    # Persistent ids.
    "persistent id: number": (b"K\x01Q.", "not a tensor storage"),
    "persistent id: string": (text("0") + b"Q.", "not a tensor storage"),
    "persistent id: None": (b"NQ.", "not a tensor storage"),
    "persistent id: global": (ORDERED_DICT + b"Q.", "not a tensor storage"),
    "persistent id: module": (
        b"(" + text("module") + b"ctorch\nFloatStorage\n" + text("") * 2 + b"K\x01tQ.",
        "not a tensor storage",
    ),
    "persistent id: type is a string": (
        b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x06tQ.",
        "not a tensor storage",
    ),
    "persistent id: type is a function": (
        b"(" + text("storage") + REBUILD + text("0") + text("cpu") + b"K\x06tQ.",
        "not a tensor storage",
    ),
    "persistent id: key is a number": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\nK\x00" + text("cpu") + b"K\x06tQ.",
        "not a tensor storage",
    ),
    "persistent id: size is negative": (
        state_dict(a=tensor(stored=storage(numel=-6))),
        "not a tens",
    ),
    "persistent id: size is huge": (
        state_dict(a=tensor(stored=storage(numel=1 << 70))),
        "not a tens",
    ),
    "persistent id: size is a bool": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"\x88tQ.",
        "not a tensor storage",
    ),
    "one storage, two sizes": (
        state_dict(a=tensor(), b=tensor(stored=storage(numel=3))),
        "described in two ways",
    ),
    "one storage, two types": (
        state_dict(a=tensor(), b=tensor(stored=storage(kind="Int"))),
        "described in two ways",
    ),
    "a storage that leads elsewhere": (
        state_dict(a=tensor(stored=storage(key="../data.pkl"))),
        "storage '../data.pkl' is missing",
    ),
    # Shapes.
    "beyond the storage by its shape": (state_dict(a=tensor(shape=numbers(3, 3))), "beyond"),
    "beyond the storage by its offset": (state_dict(a=tensor(offset=number(1))), "beyond"),
    "beyond the storage by its strides": (state_dict(a=tensor(strides=numbers(4, 1))), "beyond"),
    "an expanded scalar": (
        state_dict(a=tensor(shape=numbers(1 << 40), strides=numbers(0))),
        "beyond its storage of 6",
    ),
    "overlapping rows": (
        state_dict(a=tensor(shape=numbers(3, 3), strides=numbers(1, 1))),
        "beyond its storage of 6",
    ),
    "a negative size": (state_dict(a=tensor(shape=numbers(-2, 3))), "unusual arguments"),
    "a negative stride": (state_dict(a=tensor(strides=numbers(-3, 1))), "unusual arguments"),
    "a negative offset": (state_dict(a=tensor(offset=number(-1))), "unusual arguments"),
    "an offset that is no number": (state_dict(a=tensor(offset=b"N")), "unusual arguments"),
    "sizes that are bools": (state_dict(a=tensor(shape=b"\x88\x88\x86")), "unusual arguments"),
    "sizes that wrap around 64 bits": (
        state_dict(a=tensor(shape=numbers(1 << 63, 2))),
        "unusual arguments",
    ),
    "an empty tensor of a huge size": (
        state_dict(a=tensor(shape=numbers(0, 1 << 47, 1 << 47), strides=numbers(1, 1, 1))),
        "beyond",
    ),
    "as many strides as no sizes": (state_dict(a=tensor(strides=numbers(1))), "unusual arguments"),
    "a hundred dimensions": (
        state_dict(a=tensor(shape=numbers(*[1] * 100), strides=numbers(*[1] * 100))),
        "unusual arguments",
    ),
    # Sizes and nesting.
    "a memo index without end": (b"}r\xff\xff\xff\xff.", "memo"),
    "a memo entry that is not there": (b"h\x09.", "truncated or damaged"),
    "a string longer than the file": (b"X\xff\xff\xff\xffabc", "truncated or damaged"),
    "a string that is not text": (b"X\x02\x00\x00\x00\xff\xff.", "truncated or damaged"),
    "an empty stack": (b".", "truncated or damaged"),
    "no mark": (b"t.", "truncated or damaged"),
    "nested lists": (b"]" * _NESTED + b"a" * (_NESTED - 1) + b".", "no dict of tensors"),
    "nested tuples": (b")" + b"\x85" * _NESTED + b".", "no dict of tensors"),
    "nested dicts": (
        b"}" + b"".join([b"}"] * 10) + b".",
        "no tensors",
    ),
    "a dict in itself": (b"}q\x00" + text("state_dict") + b"h\x00s.", "no tensors"),
    "a pickle without end": (b"\x80\x02}" + b"N" * (5 << 20) + b".", "are read"),
    # No state dict.
    "a number": (b"K\x01.", "no dict of tensors"),
    "a list of tensors": (b"]" + tensor() + b"a.", "no dict of tensors"),
    "no tensor": (state_dict(epoch=b"K\x01"), "no tensors"),
}


def _patched(content: bytes, signature: bytes, offset: int, field: bytes) -> bytes:
    """`content` with `field` written at `offset` into the last structure of this signature."""
    at = content.rindex(signature) + offset
    return content[:at] + field + content[at + len(field) :]


def _twice(name: str) -> bytes:
    """An archive that holds a record of this name two times."""
    other = name[:-1] + "~"
    content = archive(more=((name, b"x"), (other, b"y")))
    return content.replace(other.encode(), name.encode())


CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"
_ZEROS = bytes(64 << 20)

ARCHIVES: dict[str, tuple[bytes, str]] = {
    "a compressed bomb for a pickle": (
        archive(_ZEROS, compression=zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
    "a compressed bomb for data": (
        archive(data=_ZEROS, compression=zipfile.ZIP_BZIP2),
        "compressed or encrypted",
    ),
    "an encrypted record": (_patched(archive(), CENTRAL, 8, b"\x01\x00"), "encrypted"),
    "a compressed record of equal size": (_patched(archive(), CENTRAL, 10, b"\x08"), "compressed"),
    "a record outside the folder": (archive(more=(("other/x", b""),)), "'other/x' is outside"),
    "an absolute name": (archive(more=(("/etc/passwd", b""),)), "'/etc/passwd' is outside"),
    "a name that climbs": (archive(more=(("../../x", b""),)), "'../../x' is outside"),
    "a name that climbs inside": (archive(more=(("archive/../../x", b""),)), "is outside"),
    "two folders": (archive(more=(("other/data.pkl", HONEST),)), "needs one FOLDER/data.pkl"),
    "no folder": (archive(top="archive/deep"), "needs one FOLDER/data.pkl"),
    "a record twice": (_twice("archive/data/1"), "'archive/data/1' occurs twice"),
    "big-endian": (archive(more=(("archive/byteorder", b"big"),)), "little-endian"),
    "many names for one storage": (
        archive(
            state_dict(
                **{
                    f"t{i}": tensor(
                        shape=numbers(30_000), strides=numbers(1), stored=storage(numel=30_000)
                    )
                    for i in range(100)
                }
            ),
            data=bytes(120_000),
        ),
        "share storage so often",
    ),
    "no data": (archive(data=None), "storage '0' is missing"),
    "too little data": (archive(data=SIX_FLOATS[:-1]), "has 23 bytes"),
    "too much data": (archive(data=SIX_FLOATS + b"\0"), "has 25 bytes"),
    "a directory that claims 65535 records": (
        _patched(archive(), END, 10, b"\xff\xff"),
        "damaged",
    ),
    "a directory beyond the file": (_patched(archive(), END, 16, b"\xff\xff\xff\x7f"), "damaged"),
    "a directory of another place": (
        _patched(archive(), END, 16, b"\x01\x00\x00\x00"),
        "directory",
    ),
    "a record beyond the file": (_patched(archive(), CENTRAL, 42, b"\xff\xff\xff\x7f"), "damaged"),
    "a record of another name": (_patched(archive(), LOCAL, 30, b"b"), "is not where"),
    "a record longer than the file": (
        _patched(_patched(archive(), CENTRAL, 20, b"\0\0\0\x7f"), CENTRAL, 24, b"\0\0\0\x7f"),
        "is not where",
    ),
    "a record whose sizes disagree": (_patched(archive(), CENTRAL, 24, b"\x09"), "compressed"),
    "a record that says zip64 but is not": (
        _patched(archive(), CENTRAL, 42, b"\xff\xff\xff\xff"),
        "damaged",
    ),
    "old container: unknown version": (LEGACY_HEAD[:15] + b"\x80\x02K\x01." + b"N." * 9, "unknown"),
    "old container: big-endian": (legacy().replace(b"\x88", b"\x89", 1), "little-endian"),
    "old container: keys are no list": (legacy(keys=b"0"), "_codecs.encode"),
    "old container: keys are no strings": (legacy(keys=(1,)), "list of storages"),
    "old container: a key too few": (legacy(keys=()), "storage '0' is missing"),
    "old container: a key too many": (legacy(keys=("0", "1")), "storage '1' differs from its"),
    "old container: another count": (legacy(count=5), "storage '0' differs from its"),
    "old container: a count below zero": (legacy(count=-1), "storage '0' differs from its"),
    "old container: code": (legacy(b"cos\nsystem\n."), "os.system"),
}
