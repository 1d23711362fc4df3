"""The binidx reader and writer, against bytes put together by hand from the format."""

import random
import struct

import numpy as np
import pytest

from rwkv_jax.errors import UserError
from rwkv_jax.text import binidx
from rwkv_jax.text.binidx import BinIdxWriter, open_binidx

# Two documents, 258 1 0 and 7 0, as uint16.
BIN = bytes([2, 1, 1, 0, 0, 0, 7, 0, 0, 0])
IDX = (
    b"MMIDIDX\x00\x00"
    + bytes([1, 0, 0, 0, 0, 0, 0, 0])  # version
    + bytes([8])  # uint16
    + bytes([2, 0, 0, 0, 0, 0, 0, 0])  # items
    + bytes([3, 0, 0, 0, 0, 0, 0, 0])  # document marks
    + bytes([3, 0, 0, 0, 2, 0, 0, 0])  # sizes
    + bytes([0] * 8 + [6, 0, 0, 0, 0, 0, 0, 0])  # pointers
    + bytes([0] * 8 + [1, 0, 0, 0, 0, 0, 0, 0] + [2, 0, 0, 0, 0, 0, 0, 0])  # marks
)


def write_pair(prefix, bin_bytes=BIN, idx_bytes=IDX):
    prefix.with_name(prefix.name + ".bin").write_bytes(bin_bytes)
    prefix.with_name(prefix.name + ".idx").write_bytes(idx_bytes)
    return prefix


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_writes_the_bytes_of_the_format(tmp_path):
    with BinIdxWriter(tmp_path / "d") as writer:
        writer.append([258, 1, 0], [3])
        writer.append([7, 0], [2])
    assert (tmp_path / "d.bin").read_bytes() == BIN
    assert (tmp_path / "d.idx").read_bytes() == IDX
    assert names(tmp_path) == ["d.bin", "d.idx"]


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_reads_the_bytes_of_the_format(tmp_path, ending):
    write_pair(tmp_path / "v1.5")
    data = open_binidx(tmp_path / f"v1.5{ending}")
    assert data.prefix == tmp_path / "v1.5"
    assert data.tokens.tolist() == [258, 1, 0, 7, 0]
    assert len(data) == 2
    assert [data[item].tolist() for item in range(2)] == [[258, 1, 0], [7, 0]]
    assert not data.tokens.flags.writeable


@pytest.mark.parametrize(
    ("code", "letter"),
    [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (6, "d"), (7, "f"), (8, "H")],
)
def test_every_dtype_code(tmp_path, code, letter):
    """Read from bytes packed by `struct`, and written again as the same bytes."""
    ids = [0, 1, 127, 100, 0]
    itemsize = struct.calcsize(letter)
    bin_bytes = struct.pack(f"<5{letter}", *ids)
    idx_bytes = (
        IDX[:17] + bytes([code]) + IDX[18:42] + struct.pack("<2q", 0, 3 * itemsize) + IDX[58:]
    )
    data = open_binidx(write_pair(tmp_path / "given", bin_bytes, idx_bytes))
    assert data.tokens.tolist() == ids
    assert data[1].tolist() == [100, 0]

    with BinIdxWriter(tmp_path / "ours", data.tokens.dtype) as writer:
        writer.append(ids, [3, 2])
    assert (tmp_path / "ours.bin").read_bytes() == bin_bytes
    assert (tmp_path / "ours.idx").read_bytes() == idx_bytes


def test_many_items_pass_through_the_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "_CHUNK", 3)
    sizes = [2, 1, 5, 1, 1, 3, 1, 4, 2, 1]
    tokens = np.arange(sum(sizes))
    with BinIdxWriter(tmp_path / "d") as writer:
        writer.append(tokens[:8], sizes[:3])
        writer.append([], [])
        writer.append(tokens[8:], sizes[3:])
    data = open_binidx(tmp_path / "d")
    starts = np.cumsum([0, *sizes])
    assert data.pointers.tolist() == (2 * starts[:-1]).tolist()
    marks = np.frombuffer((tmp_path / "d.idx").read_bytes()[34 + 12 * 10 :], "<i8")
    assert marks.tolist() == list(range(11))
    for item, size in enumerate(sizes):
        assert data[item].tolist() == list(range(starts[item], starts[item] + size))


def test_nothing_appears_when_the_block_fails(tmp_path):
    write_pair(tmp_path / "d")
    with pytest.raises(RuntimeError, match="stop"), BinIdxWriter(tmp_path / "d") as writer:
        writer.append([1, 0], [2])
        assert open_binidx(tmp_path / "d").tokens.tolist() == [258, 1, 0, 7, 0]  # still the old one
        raise RuntimeError("stop")
    assert names(tmp_path) == ["d.bin", "d.idx"]
    assert (tmp_path / "d.bin").read_bytes() == BIN


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"file/d\.bin: cannot write: "):
        BinIdxWriter(tmp_path / "file" / "d").__enter__()
    (tmp_path / "d.idx").mkdir()
    with (
        pytest.raises(UserError, match=r"d: cannot write: "),
        BinIdxWriter(tmp_path / "d") as writer,
    ):
        writer.append([1, 0], [2])
    assert [name for name in names(tmp_path) if "tmp" in name] == []


def test_what_cannot_be_stored_is_refused(tmp_path):
    with BinIdxWriter(tmp_path / "d") as writer:
        with pytest.raises(ValueError, match="ids from -1 to 65536 do not fit uint16"):
            writer.append([-1, 65536], [2])
        with pytest.raises(ValueError, match="sizes add up to 3, not to the 2 tokens"):
            writer.append([1, 2], [3])
        with pytest.raises(ValueError, match="sizes add up to 2"):
            writer.append([1, 2], [3, -1])


def idx_with(**changes):
    fields = {"version": 1, "code": 8, "items": 2, "marks": 3} | changes
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", *(fields[k] for k in list(fields)[:4]))
    sizes = struct.pack("<2i", *fields.get("sizes", (3, 2)))
    pointers = struct.pack("<2q", *fields.get("pointers", (0, 6)))
    return header + sizes + pointers + struct.pack("<3q", *fields.get("doc_idx", (0, 1, 2)))


@pytest.mark.parametrize(
    ("idx_bytes", "message"),
    [
        (b"", r"d\.idx: not a binidx index"),
        (IDX[:33], r"d\.idx: not a binidx index"),
        (b"MMIDIDX\x00\x01" + IDX[9:], r"d\.idx: not a binidx index"),
        (idx_with(version=2), "format version 2; only version 1"),
        (idx_with(code=9), "dtype code 9 is not one of"),
        (idx_with(code=0), "dtype code 0 is not one of"),
        (idx_with(code=4), "10 bytes is not a whole number of int32"),
        (
            idx_with(items=2**64 - 1),
            r"18446744073709551615 items and 3 document marks take \d+ bytes",
        ),
        (idx_with(items=0, marks=6), r"d\.bin: has no tokens"),
        (IDX[:-1], "take 82 bytes, but the file has 81"),
        (IDX + b"\0", "take 82 bytes, but the file has 83"),
        (idx_with(sizes=(-1, 2)), "item 0 has -1 tokens"),
        (idx_with(sizes=(3, 3)), "item 1 has 3 tokens at byte 6"),
        (idx_with(sizes=(2**31 - 1, 2)), "item 0 has 2147483647 tokens"),
        (idx_with(pointers=(-2, 6)), "item 0 has 3 tokens at byte -2"),
        (idx_with(pointers=(0, 5)), "item 1 has 2 tokens at byte 5"),
        (idx_with(pointers=(0, 2**63 - 2)), "item 1 has 2 tokens at byte 9223372036854775806"),
        (idx_with(sizes=(3, 1)), "its items take 8 bytes, but the .bin has 10"),
        (idx_with(doc_idx=(0, 2, 1)), "document marks do not ascend"),
        (idx_with(doc_idx=(-1, 1, 2)), "document marks do not ascend"),
        (idx_with(doc_idx=(0, 1, 3)), "document marks do not ascend"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, idx_bytes, message):
    with pytest.raises(UserError, match=message) as error:
        open_binidx(write_pair(tmp_path / "d", BIN, idx_bytes))
    assert "\n" not in str(error.value)


def test_the_hand_made_index_is_sound(tmp_path):
    assert idx_with() == IDX
    open_binidx(write_pair(tmp_path / "d", BIN, idx_with()))


@pytest.mark.parametrize("bin_bytes", [b"", BIN[:-1], BIN[:-2], BIN + b"\0\0"])
def test_a_bin_of_another_length_is_refused(tmp_path, bin_bytes):
    with pytest.raises(UserError, match="has no tokens|damaged"):
        open_binidx(write_pair(tmp_path / "d", bin_bytes))


@pytest.mark.parametrize("missing", ["d.bin", "d.idx"])
def test_a_missing_file_is_named(tmp_path, missing):
    write_pair(tmp_path / "d")
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=f"{missing}: no such file"):
        open_binidx(tmp_path / "d")


def test_random_damage_is_refused_or_harmless(tmp_path):
    """Whatever opens can be read in full: no item leaves the file, and none is lost."""
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(IDX)
        for _ in range(draw.randrange(1, 4)):
            kind = draw.randrange(4)
            at = draw.randrange(len(damaged))
            if kind == 0:
                damaged[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                damaged[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif kind == 2:
                damaged[at : at + 8] = draw.getrandbits(64).to_bytes(8, "little")
            else:
                damaged = damaged[: max(at, 1)]
        try:
            data = open_binidx(write_pair(tmp_path / "d", BIN, bytes(damaged)))
        except UserError:
            refused += 1
            continue
        assert sum(len(data[item]) for item in range(len(data))) == len(data.tokens)
    assert 240 < refused < 300
