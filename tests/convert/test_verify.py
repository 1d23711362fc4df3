"""verify: a good file is ready for all readers, a bad one is refused for its reason."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.convert import verify
from rwkv_jax.errors import UserError

ORACLES = Path(__file__).parents[1] / "data" / "oracles"
CONFIG = ModelConfig(n_layer=2, n_embd=16, head_size=16)
TENSORS = {name: np.zeros(s, np.float16) for name, s in weights.official_shapes(CONFIG).items()}


def reasons(folder: Path, tensors: dict, name: str = "model.pth") -> dict[str, str]:
    pth.write(folder / name, tensors)
    return {reader: reason for reader, reason in verify.verify(folder / name).items() if reason}


def test_what_we_write_is_ready_for_all(tmp_path, capsys):
    pth.write(tmp_path / "model.pth", TENSORS)
    verify.main([str(tmp_path / "model.pth")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["yes"] * 5


def in_order(*first: str) -> dict:
    return {name: TENSORS[name] for name in [*first, *(n for n in TENSORS if n not in first)]}


def without(*names: str) -> dict:
    return {name: tensor for name, tensor in TENSORS.items() if name not in names}


WIDE = weights.official_shapes(ModelConfig(n_layer=2, n_embd=16, head_size=16, dim_g=64))
ONE_LAYER = weights.official_shapes(ModelConfig(n_layer=1, n_embd=16, head_size=16))
SMALL = weights.official_shapes(ModelConfig(2, 16, vocab_size=100, head_size=16))


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (
            {f"_forward_module.{name}": tensor for name, tensor in TENSORS.items()},
            {
                "rwkv package": "_forward_module.",
                "RWKV Runner": "_forward_module.",
                "web-rwkv": "plain names",
                "official trainer": "emb.weight is missing",
            },
        ),
        (
            dict(sorted(TENSORS.items())),
            {"rwkv.cpp": "att.x_* are in the order a,g,k,r,v,w; it assumes r,w,k,v,a,g"},
        ),
        (
            {n: t.reshape(-1) if n.endswith("att.x_w") else t for n, t in TENSORS.items()},
            {"rwkv.cpp": "blocks.0.att.x_w is [16], not [1, 1, 16]", "official": "x_w is [16]"},
        ),
        (without("blocks.0.att.v1"), {"official trainer": "blocks.0.att.v1 is missing"}),
        (
            {name: np.zeros(shape, np.float16) for name, shape in WIDE.items()},
            {"official trainer": "low-rank widths w,a,v,g 32,32,32,64 instead of 32,32,32,32"},
        ),
        (
            {name: np.zeros(shape, np.float16) for name, shape in ONE_LAYER.items()},
            {"RWKV Runner": "2 layers", "web-rwkv": "2 layers"},
        ),
        (
            {name: np.zeros(shape, np.float16) for name, shape in SMALL.items()},
            {"RWKV Runner": "100 rows of emb.weight"},
        ),
    ],
    ids="prefix order flat no-v0 low-rank one-layer vocabulary".split(),
)
def test_each_reader_refuses_for_its_reason(tmp_path, tensors, expected):
    found = reasons(tmp_path, tensors)
    assert len(found) == len(expected)
    for reader, reason in found.items():
        wanted = next(text for name, text in expected.items() if reader.startswith(name))
        assert wanted in reason


def test_containers_that_the_package_cannot_map(tmp_path):
    def package(path: Path) -> str:
        found = verify.verify(path)
        assert found["RWKV Runner"]
        return found["rwkv package"]

    assert "old container" in package(ORACLES / "tiny_v512_rand_bf16_legacy.pth")
    assert "end in .pth" in reasons(tmp_path, TENSORS, "model.pt")["rwkv package"]
    pth.write(tmp_path / "model.pth", TENSORS)
    with zipfile.ZipFile(tmp_path / "model.pth") as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "no_version.pth", "w") as file:
        for name, data in records.items():
            if not name.endswith("/version"):
                file.writestr(name, data)
    assert "no version record" in package(tmp_path / "no_version.pth")
    with zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in records.items():
            file.writestr(name, data)
    with pytest.raises(UserError, match="compressed"):
        verify.verify(tmp_path / "deflated.pth")


@pytest.mark.torch
def test_a_nested_state_dict(tmp_path):
    import torch

    tensors = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}
    torch.save({"state_dict": tensors}, tmp_path / "nested.pth")
    assert verify.verify(tmp_path / "nested.pth")["rwkv package"] == (
        "its tensors are nested under 'state_dict'"
    )
    torch.save(tensors, tmp_path / "flat.pth")
    assert not any(verify.verify(tmp_path / "flat.pth").values())


def test_what_is_no_model_is_one_line(tmp_path):
    pth.write(tmp_path / "x.pth", {"a": np.zeros(3)})
    for path in (tmp_path / "x.pth", tmp_path / "no.pth"):
        with pytest.raises(UserError, match="^[^\n]*$"):
            verify.main([str(path)])
    pth.write(tmp_path / "y.pth", without("blocks.0.att.v2"))
    with pytest.raises(UserError, match="y.pth: not ready for official trainer$"):
        verify.main([str(tmp_path / "y.pth")])
