"""The `.pth` container against torch's own reader and writer, hostile files, and cut files."""

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import pickletools
import random
import resource
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from tests.support import malicious

ORACLES = sorted((Path(__file__).parents[1] / "data" / "oracles").glob("*.pth"))
DTYPES = ["float32", "bfloat16", "float16", "float64", "int64", "int32", "int16", "int8", "uint8"]


def raw_bytes(tensor) -> bytes:
    """The elements of a torch tensor, in order."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(ours, theirs) -> None:
    """The same names in the same order, shapes, dtypes and bytes as torch has."""
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tuple(tensor.shape), name
        assert f"torch.{ours[name].dtype}" == str(tensor.dtype), name
        assert ours[name].tobytes() == raw_bytes(tensor), name


def refusal(path: Path) -> str:
    """The message of the refusal: one printable line that starts with the file."""
    with pytest.raises(UserError) as caught:
        pth.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 1000
    return message


@contextlib.contextmanager
def memory_below(limit: int):
    """The most that Python and NumPy hold at once stays below `limit` bytes."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def page_faults() -> int:
    """Pages of memory that this process has touched so far, mapped files included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt


def zip_records(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


# ------------------------------------------------------------------------------------ reading


@pytest.mark.torch
@pytest.mark.parametrize("path", ORACLES, ids=lambda path: path.stem)
def test_reads_the_oracles_as_torch_does(path):
    import torch

    assert_same(pth.read(path), torch.load(path, weights_only=True))


@pytest.mark.torch
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old container"])
def test_reads_what_torch_writes(tmp_path, zipped):
    import torch

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 10, generator=generator)
    # Assigned to dtypes by view, so that NaN, infinities and subnormals are among the values.
    noise = torch.randint(0, 256, (4 * 8 * 3,), generator=generator, dtype=torch.uint8)
    cases = {f"of {name}": noise.view(getattr(torch, name)).clone() for name in DTYPES}
    cases |= {
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 768),
        "parameter": torch.nn.Parameter(base.bfloat16()),
        "transposed": base.t(),
        "every other": base[1::2, 2::3],
        "tied": base,
        "tied again": base,
        "row of the same": base[3],
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "naïve 名": torch.ones(1),
        "permuted": torch.randn(2, 3, 4, 5, generator=generator).permute(3, 0, 2, 1),
    }
    path = tmp_path / "x.pth"
    torch.save(cases, path, _use_new_zipfile_serialization=zipped)
    ours = pth.read(path)
    assert_same(ours, torch.load(path, weights_only=True))
    assert np.shares_memory(ours["tied"], ours["tied again"])
    assert np.shares_memory(ours["tied"], ours["row of the same"])


@pytest.mark.torch
def test_finds_the_state_dict_wherever_it_is_nested(tmp_path):
    import torch

    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    plain = module.state_dict()  # an OrderedDict with the attribute _metadata
    assert hasattr(plain, "_metadata")
    for value in [
        plain,
        dict(plain),
        OrderedDict(plain),
        {"state_dict": plain, "epoch": 3, "lr": 0.5, "tags": ["a", None, (1, -(2**40))]},
        {"module": dict(plain)},
        {"model": plain},
        {**plain, "note": "a", "nested": {"state_dict": {"other": torch.ones(1)}}},
        {name: torch.nn.Parameter(tensor) for name, tensor in plain.items()},
    ]:
        torch.save(value, tmp_path / "x.pth")
        assert_same(pth.read(tmp_path / "x.pth"), plain)


@pytest.mark.parametrize("place", ["cuda:0", "cuda:7", "mps", "xla:1", "meta?", ""])
def test_any_location_is_read(tmp_path, place):
    path = tmp_path / "x.pth"
    stored = malicious.storage(location=place)
    path.write_bytes(malicious.archive(malicious.state_dict(a=malicious.tensor(stored=stored))))
    np.testing.assert_array_equal(pth.read(path)["a"], [[0, 1, 2], [3, 4, 5]])


def test_arrays_are_views_of_the_file_and_outlive_its_replacement(tmp_path):
    path = tmp_path / "x.pth"
    values = np.arange(1 << 16, dtype=np.float32)
    pth.write(path, {"a": values})
    array = pth.read(path)["a"]
    assert not array.flags.owndata and not array.flags.writeable
    assert array.ctypes.data % 64 == 0
    pth.write(path, {"a": values + 1})
    np.testing.assert_array_equal(array, values)
    np.testing.assert_array_equal(pth.read(path)["a"], values + 1)


def test_opening_does_not_read_the_data(tmp_path):
    """A file with a hole of 64 GiB opens at once: only its structures are touched."""
    size = 64 << 30
    description = malicious.state_dict(
        a=malicious.tensor(
            shape=malicious.numbers(size),
            strides=malicious.numbers(1),
            stored=malicious.storage(numel=size, kind="Byte"),
        )
    )
    small = malicious.archive(description, data=b"")
    pos = small.index(b"PK\x03\x04", 1)  # the record of the data
    at = pos + 30 + len("archive/data/0")
    directory = small.index(b"PK\x01\x02")
    wide = struct.pack("<2H3Q", 1, 24, size, size, pos)
    entries = small[directory : small.index(b"PK\x05\x06")].split(b"PK\x01\x02")[1:]
    for i, entry in enumerate(entries):
        if entry.endswith(b"data/0"):
            entry = (
                entry[:16] + b"\xff" * 8 + entry[24:26] + struct.pack("<H", len(wide)) + entry[28:]
            )
            entries[i] = entry[:38] + b"\xff" * 4 + entry[42:] + wide
        elif entry.endswith(b"version"):
            entries[i] = None  # behind the hole: of no matter here
    listing = b"".join(b"PK\x01\x02" + entry for entry in entries if entry is not None)
    path = tmp_path / "x.pth"
    with open(path, "wb") as file:
        file.write(small[:at])
        file.seek(at + size)
        file.write(listing)
        end = file.tell()
        file.write(
            struct.pack(
                "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, len(listing), at + size
            )
        )
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, 2**32 - 1, 2**32 - 1, 0))
    before = page_faults()
    array = pth.read(path)["a"]
    assert page_faults() - before < 20_000  # of the 16 million pages of the hole
    assert array.shape == (size,) and array[-1] == 0


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32"}}', "safetensors"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>", "web page"),
        (b"GGUF" + b"\0" * 100, "GGUF"),
        (gzip.compress(b"x" * 100, mtime=0), "unpack it first"),
        (bytes(1000), "download is incomplete"),
        (pickle.dumps({"a": 1}), "is a pickle that torch.save did not write"),
        (b"[1, 2, 3]" * 20, "is not a .pth"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert message in refusal(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_a_model_is_to_be_unpacked(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", method) as file:
        file.writestr("small.pth", b"PK")
    assert "is a zip of 'small.pth', not a .pth: unpack it first" in refusal(tmp_path / "x.pth")


def test_numpys_archive_is_named(tmp_path):
    with (tmp_path / "x.pth").open("wb") as file:
        np.savez(file, logits=np.zeros(3))
    assert "is NumPy's .npz, not a .pth" in refusal(tmp_path / "x.pth")


def test_missing_files_and_folders(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.pth")
    assert "directory" in refusal(tmp_path)


# ------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("name", malicious.PAYLOADS)
def test_code_is_refused_and_not_run(tmp_path, name):
    build, message = malicious.PAYLOADS[name]
    canary = tmp_path / "canary"
    payload = build(f"touch {canary}")
    path = tmp_path / "x.pth"
    for content in [malicious.archive(payload), malicious.legacy(payload)]:
        path.write_bytes(content)
        assert message in refusal(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", malicious.PAYLOADS)
def test_a_plain_unpickler_would_have_run_it(tmp_path, name):
    """Otherwise the test above proves nothing."""
    canary = tmp_path / "canary"
    payload = malicious.PAYLOADS[name][0](f"touch {canary}")

    class Plain(pickle.Unpickler):
        def persistent_load(self, identity):
            return None

        def find_class(self, module, name):
            return (
                dict
                if module.startswith(("torch", "collections"))
                else super().find_class(module, name)
            )

    try:
        Plain(io.BytesIO(payload)).load()
    except Exception:  # what it makes of the result afterwards does not matter
        pass
    assert canary.exists()


@pytest.mark.parametrize("name", malicious.PICKLES)
def test_pickles_are_refused(tmp_path, name):
    content, message = malicious.PICKLES[name]
    path = tmp_path / "x.pth"
    path.write_bytes(malicious.archive(content))
    assert message in refusal(path)


def test_the_densest_pickle_stays_within_bounds(tmp_path):
    """An object a byte for as long as a pickle may be."""
    path = tmp_path / "x.pth"
    path.write_bytes(malicious.archive(b"}" * pth.MAX_PICKLE))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "truncated or damaged" in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


@pytest.mark.parametrize("name", malicious.ARCHIVES)
def test_archives_are_refused(tmp_path, name):
    content, message = malicious.ARCHIVES[name]
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with memory_below(10 << 20):
        assert message in refusal(path)


def test_a_directory_without_end_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *[0] * 16)
    count = pth.MAX_DIRECTORY // len(entry) + 1
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04" + b"\0" * 26)
        file.write(entry * count)
        end = file.tell()
        file.write(
            struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, end - 30, 30)
        )
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        file.write(
            struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
        )
    assert "its zip directory has" in refusal(path)


@pytest.mark.torch
@pytest.mark.parametrize("content", [malicious.archive(), malicious.legacy()], ids=["zip", "old"])
def test_the_honest_file_is_honest(tmp_path, content):
    """The hostile ones differ from it in one thing each, so torch has to take it."""
    import torch

    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert_same(pth.read(path), torch.load(path, weights_only=True))


@pytest.mark.parametrize("content", [malicious.archive(), malicious.legacy()], ids=["zip", "old"])
def test_the_honest_file_is_read_whole_and_refused_wherever_it_is_cut(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    np.testing.assert_array_equal(pth.read(path)["a"], [[0, 1, 2], [3, 4, 5]])
    for size in range(len(content)):
        path.write_bytes(content[:size])
        refusal(path)


def test_a_view_is_given_exactly_when_its_elements_lie_in_the_storage(tmp_path):
    """Random offsets, shapes and strides, against an enumeration of the indices."""
    rng = random.Random(0)
    path = tmp_path / "x.pth"
    read = 0
    for _ in range(200):
        shape = [rng.choice([0, 1, 2, 2, 3, 4]) for _ in range(rng.randrange(4))]
        strides = [rng.choice([0, 1, 1, 2, 3]) for _ in shape]
        offset = rng.randrange(4)
        viewed = malicious.tensor(
            malicious.number(offset), malicious.numbers(*shape), malicious.numbers(*strides)
        )
        path.write_bytes(malicious.archive(malicious.state_dict(a=viewed)))
        indices = [
            offset + sum(i * stride for i, stride in zip(index, strides, strict=True))
            for index in np.ndindex(*shape)
        ]
        if len(indices) <= 6 and all(index < 6 for index in indices):
            np.testing.assert_array_equal(
                pth.read(path)["a"], np.reshape(np.array(indices, np.float32), shape)
            )
            read += 1
        else:
            assert "beyond its storage" in refusal(path)
    assert 50 < read < 170


def opcode_spans(description: bytes) -> list[tuple[int, int]]:
    starts = [pos for _, _, pos in pickletools.genops(description)]
    return list(zip(starts, [*starts[1:], len(description)], strict=True))


def mutate_pickle(rng: random.Random, description: bytes) -> bytes:
    """Opcodes dropped, doubled, moved, exchanged or given other bytes, once or twice."""
    spans = opcode_spans(description)
    pieces = [description[a:b] for a, b in spans]
    for _ in range(rng.choice([1, 1, 2])):
        i, j = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        match rng.randrange(6):
            case 0:
                pieces[i] = b""
            case 1:
                pieces[i] *= rng.choice([2, 3, 50])
            case 2:
                pieces[i], pieces[j] = pieces[j], pieces[i]
            case 3:
                pieces[i] = rng.choice([b"N", b"}", b"]", b")", b"(", b"t", b"R", b"b", b"Q", b"u"])
            case 4:
                pieces[i] = malicious.number(
                    rng.choice([-1, 0, 1, 255, 2**16, 2**31, 2**40, 2**63, 2**64, -(2**63)])
                )
            case 5:
                piece = bytearray(pieces[i] or b"N")
                piece[rng.randrange(len(piece))] = rng.randrange(256)
                pieces[i] = bytes(piece)
    return b"".join(pieces)


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """A few bytes, or an integer of a structure at the front or end, given another value."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        size = rng.choice([1, 2, 4, 8])
        ends = rng.choice(
            [range(min(200, len(changed) - 8)), range(len(changed) - 400, len(changed) - 8)]
        )
        at = rng.choice(ends)
        value = rng.choice(
            [0, 1, 2**7, 2**15, 2**31, 2**63, -1, -2, len(content), rng.getrandbits(64)]
        )
        changed[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(changed)


def mutants(rng: random.Random, model: Path) -> Iterator[bytes]:
    """100 mutants of a small model and of the files of one tensor, in both containers."""
    whole, records = model.read_bytes(), zip_records(model)
    description, data = records.pop("archive/data.pkl"), records.pop("archive/data/0")
    del records["archive/version"]
    for _ in range(20):
        yield mutate_bytes(rng, whole)
        yield mutate_bytes(rng, malicious.legacy())
        yield malicious.legacy(mutate_pickle(rng, malicious.HONEST_OLD))
        yield malicious.archive(mutate_pickle(rng, malicious.HONEST))
        mutant = mutate_pickle(rng, description)
        yield malicious.archive(mutant, data=data, more=tuple(records.items()))


@pytest.mark.filterwarnings("ignore:tensors that RWKV-7 does not have")
@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_give_a_result_or_a_refusal(tmp_path, seed):
    """What is read is also used, so that a wrong bound would show as a crash."""
    config = ModelConfig(
        1, 8, vocab_size=5, head_size=4, dim_ffn=8, dim_w=2, dim_a=2, dim_v=2, dim_g=2
    )
    model, path = tmp_path / "model.pth", tmp_path / "x.pth"
    shapes = weights.official_shapes(config)
    pth.write(model, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    read = refused = 0
    with memory_below(20 << 20):
        for content in mutants(random.Random(seed), model):
            path.write_bytes(content)
            try:
                for array in pth.read(path).values():
                    array.tobytes()
                read += 1
                weights.load_pth(path)
            except UserError as error:
                assert str(error).startswith(f"{path}: ") and str(error).isprintable()
                refused += 1
    assert read > 0 and refused > 50


# ------------------------------------------------------------------------------------- writing


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 8 * 30, dtype=np.uint8)
    return {
        **{
            f"of {name}": noise.view(name).reshape(2, -1, 3)
            for name in DTYPES
            if name != "bfloat16"
        },
        "of bfloat16": noise.view(ml_dtypes.bfloat16).reshape(40, 3),
        "bool": np.array([True, False, True]),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 7), np.float32),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "more than 255 and 65535": np.zeros((300, 300), np.int8),
        "名": np.ones(1, np.float32),
    }


@pytest.mark.torch
def test_torch_loads_what_we_write(tmp_path):
    import torch

    path = tmp_path / "x.pth"
    tensors = some_tensors()
    pth.write(path, tensors)
    for options in [{"mmap": True}, {"mmap": False}]:
        assert_same(tensors, torch.load(path, weights_only=True, **options))
    reader = torch._C.PyTorchFileReader(str(path))
    for i in range(len(tensors)):
        assert reader.get_record_offset(f"data/{i}") % 64 == 0


def test_the_archive_is_as_agreed(tmp_path):
    """Checked with the standard library's reader, which also verifies the checksums."""
    path = tmp_path / "x.pth"
    pth.write(path, {"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.float16)})
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        infos = file.infolist()
        assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
        assert [info.filename for info in infos] == [
            "archive/data.pkl",
            "archive/byteorder",
            "archive/data/0",
            "archive/data/1",
            "archive/version",
        ]
        assert file.read("archive/version") == b"3\n"
        assert file.read("archive/byteorder") == b"little"
        assert file.read("archive/data/0") == np.ones(6, np.float32).tobytes()
        assert file.read("archive/data.pkl").startswith(b"\x80\x02}")


def test_the_bytes_depend_on_the_tensors_alone(tmp_path):
    """On no clock, process, path or machine: the digest is that of the first such file."""
    path = tmp_path / "x.pth"
    pth.write(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.int8)})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "a263b8b9943e68a3dc6f6c5fe70fd7492842e3cadd69dcfb0caf56c9e55dd263"


def test_a_file_read_and_written_again_is_identical(tmp_path):
    one, two = tmp_path / "rwkv-1.pth", tmp_path / "rwkv-final.pth"
    pth.write(one, some_tensors())
    pth.write(two, pth.read(one))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.torch
def test_zip64_fields_are_understood_by_all(tmp_path, monkeypatch):
    """With the limit of 4 GiB moved to 512 bytes: sizes and offsets on both sides of it."""
    import torch

    monkeypatch.setattr(pth, "_NEEDS_ZIP64", 512)
    path = tmp_path / "x.pth"
    tensors = {
        f"t{i}": np.arange(size, dtype=np.float32) for i, size in enumerate([3, 200, 5, 300])
    }
    pth.write(path, tensors)
    content = path.read_bytes()
    assert b"PK\x06\x06" in content and struct.pack("<2H2Q", 1, 16, 1200, 1200) in content
    assert_same(tensors, torch.load(path, weights_only=True, mmap=True))
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert file.read("archive/data/3") == tensors["t3"].tobytes()
    for name, array in pth.read(path).items():
        np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_conversion_rounds_as_torch_does(tmp_path, dtype):
    import torch

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[: 1 << 16] = np.arange(1 << 16, dtype=np.uint32) << 16 | 0x8000  # ties of bfloat16
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]  # a NaN stays one, but its payload is nobody's promise
    if dtype == "float16":
        values = values[np.abs(values) < 65519]
    path = tmp_path / "x.pth"
    pth.write(path, {"a": values}, dtype)
    theirs = torch.from_numpy(values.copy()).to(getattr(torch, dtype))
    assert_same(pth.read(path), {"a": theirs})


def test_nan_stays_nan_and_overflow_of_float16_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    pth.write(path, {"a": np.array([np.nan, np.inf, -np.inf], np.float32)}, ml_dtypes.bfloat16)
    array = pth.read(path)["a"].astype(np.float32)
    assert np.isnan(array[0]) and array[1] == np.inf and array[2] == -np.inf
    before = path.read_bytes()
    with pytest.raises(UserError, match="x.pth: big has values beyond the range of float16"):
        pth.write(path, {"big": np.array([1e6], np.float32)}, np.float16)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.pth"]


class Lazy:
    """A tensor that is made when asked for, and counts how many are alive."""

    alive = most = 0
    asked: list[int] = []

    def __init__(self, index: int):
        self.index, self.shape, self.dtype = index, (1 << 18,), np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
        Lazy.asked.append(self.index)
        return np.full(self.shape, self.index, np.float32)


def test_values_are_taken_one_at_a_time_and_in_order(tmp_path):
    path = tmp_path / "x.pth"
    Lazy.asked.clear()
    with memory_below(3 * (4 << 18)):  # 20 tensors of 4 << 18 bytes
        pth.write(path, {f"t{i}": Lazy(i) for i in range(20)}, ml_dtypes.bfloat16)
    assert Lazy.asked == list(range(20))
    assert [int(array[-1]) for array in pth.read(path).values()] == list(range(20))


class Failing(Lazy):
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("device lost")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.pth"
    pth.write(path, {"a": np.ones(3, np.float32)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="device lost"):
        pth.write(path, {"a": Lazy(0), "b": Failing(1)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(UserError, match="x.pth: cannot be written: File too large"):
            pth.write(path, {f"t{i}": Lazy(i) for i in range(3)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.pth"]
    with pytest.raises(UserError, match="cannot be written: No such file"):
        pth.write(tmp_path / "no" / "x.pth", {"a": np.ones(3)})


def test_a_write_is_all_or_nothing_for_who_reads_meanwhile(tmp_path):
    """Until the last moment the name holds the old file."""
    path = tmp_path / "x.pth"
    pth.write(path, {"a": np.zeros(3, np.float32)})
    seen = []

    class Spy(Lazy):
        def __array__(self, dtype=None, copy=None):
            seen.append(pth.read(path)["a"].tolist())
            return super().__array__()

    pth.write(path, {"a": Spy(1), "b": Spy(2)})
    assert seen == [[0, 0, 0]] * 2
    assert pth.read(path)["a"][0] == 1
