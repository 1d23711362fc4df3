"""The Hugging Face layout: flash-linear-attention's own names and shapes, the same bytes after both
ways, and error lines.

tests/data/fla_rwkv7.json holds what `RWKV7ForCausalLM(config).state_dict()` of that library (0.6.0)
has for the oracle's sizes; its own converter gives the same names and values as ours.
"""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from rwkv_jax import generate
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.convert import hf_to_pth, pth_to_hf
from rwkv_jax.errors import UserError
from rwkv_jax.text import tokenizer

ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[1] / "data"
FP32 = DATA / "oracles" / "tiny_v512_rand_fp32.pth"
BF16 = DATA / "oracles" / "tiny_v512_rand_bf16.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "new" / "model"
    pth_to_hf.main([str(FP32), str(folder)])
    return folder


def test_names_shapes_and_values_are_that_librarys(folder):
    theirs = json.loads((DATA / "fla_rwkv7.json").read_text())
    ours = safetensors.numpy.load_file(folder / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == theirs["tensors"]
    config = json.loads((folder / "config.json").read_text())
    assert theirs["config"].items() <= config.items()

    # The two linear layers of a low-rank part, in the other library's way: (x Aᵀ) Bᵀ + bias.
    official = pth.read(FP32)
    x = np.random.default_rng(0).normal(size=(2, 128)).astype(np.float32)
    part = "model.layers.1.attn.a_lora.lora"
    linear = x @ ours[f"{part}.0.weight"].T @ ours[f"{part}.2.weight"].T + ours[f"{part}.2.bias"]
    block = "blocks.1.att"
    expected = x @ official[f"{block}.a1"] @ official[f"{block}.a2"] + official[f"{block}.a0"][0]
    np.testing.assert_allclose(linear, expected, rtol=1e-5, atol=1e-5)
    for theirs_name, name in [
        ("model.layers.0.pre_norm.weight", "blocks.0.ln0.weight"),
        ("model.layers.2.attn.g_norm.bias", "blocks.2.att.ln_x.bias"),
        ("model.layers.2.attn.o_proj.weight", "blocks.2.att.output.weight"),
        ("lm_head.weight", "head.weight"),
    ]:
        np.testing.assert_array_equal(ours[theirs_name], official[name])


@pytest.mark.parametrize("source", [FP32, BF16])
def test_round_trip_gives_the_same_bytes(tmp_path, source):
    exported, target, back = tmp_path / "a.pth", tmp_path / "folder", tmp_path / "b.pth"
    dtype = pth.read(source)["emb.weight"].dtype
    weights.save_pth(exported, weights.load_pth(source)[1], dtype)
    pth_to_hf.main([str(exported), str(target)])
    hf_to_pth.main([str(target), str(back)])
    assert back.read_bytes() == exported.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth", "folder"]

    # Without what that library has no place for, and in shards, as its users save it.
    (target / "unused.safetensors").unlink()
    whole = safetensors.numpy.load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = sorted(whole)
    shards = {"one.safetensors": names[:50], "two.safetensors": names[50:]}
    for shard, part in shards.items():
        safetensors.numpy.save_file({name: whole[name] for name in part}, target / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    hf_to_pth.main([str(target), str(tmp_path / "c.pth")])
    tensors, expected = pth.read(tmp_path / "c.pth"), pth.read(exported)
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        if name in {f"blocks.0.att.v{n}" for n in "012"}:
            assert not tensor.any() and tensor.shape == expected[name].shape
        else:
            assert tensor.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("packed_shape", [(6, 1, 1, 128), (6, 128)])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_folders_of_the_first_version(folder, tmp_path, packed_shape, file):
    """The six attn.x_* in one x_x, in the order in which that library takes them apart."""
    there = safetensors.numpy.load_file(folder / "model.safetensors")
    for layer in range(3):
        name = f"model.layers.{layer}.attn.x_"
        rows = [there.pop(name + mix).reshape(-1) for mix in "rwkvag"]
        there[f"{name}x"] = np.stack(rows).reshape(packed_shape)
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((folder / "config.json").read_text())
    if file == "model.safetensors":
        safetensors.numpy.save_file(there, old / file)
    else:
        pth.write(old / file, there)
    hf_to_pth.main([str(old), str(tmp_path / "x.pth")])
    found, expected = pth.read(tmp_path / "x.pth"), pth.read(FP32)
    assert list(found) == list(expected)
    for name in expected.keys() - {f"blocks.0.att.v{n}" for n in "012"}:
        assert found[name].tobytes() == expected[name].tobytes(), name


def test_a_folder_is_no_model_until_it_is_converted(folder):
    message = "is the folder of a Hugging Face model: convert it first with rwkv-jax hf-to-pth "
    assert message in refusal(generate, "--load_model", folder)


def test_memory_is_that_of_a_few_tensors(tmp_path):
    """50 MB of 36 layers: what is allocated, at most, stays far below."""
    config = ModelConfig(n_layer=36, n_embd=192, vocab_size=1024)
    sizes = weights.official_shapes(config)
    pth.write(tmp_path / "a.pth", {n: np.zeros(s, np.float32) for n, s in sizes.items()})
    size = (tmp_path / "a.pth").stat().st_size
    assert size > 50e6
    tracemalloc.start()
    try:
        pth_to_hf.main([str(tmp_path / "a.pth"), str(tmp_path / "hf")])
        hf_to_pth.main([str(tmp_path / "hf"), str(tmp_path / "b.pth")])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 8
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.torch  # with what brings `tokenizers`
def test_the_tokenizer_gives_our_ids(tmp_path, folder):
    """On 10,000 texts: of the corpus, this code, random tokens, bytes, characters and blanks."""
    import tokenizers

    assert not (folder / "tokenizer.json").exists()  # its vocabulary is another
    world = weights.official_shapes(ModelConfig(n_layer=2, n_embd=64))
    pth.write(
        tmp_path / "a.pth", {name: np.zeros(size, np.float32) for name, size in world.items()}
    )
    pth_to_hf.main([str(tmp_path / "a.pth"), str(tmp_path / "hf")])
    tmp_path /= "hf"
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    pieces = [tokenizer.decode_bytes([token]) for token in range(65530)]
    texts = [
        json.loads(line)["text"]
        for line in (ROOT / "data/demo.jsonl").read_text("utf-8").splitlines()
    ]
    texts += (ROOT / "README.zh-CN.md").read_text("utf-8").split("\n\n")
    texts += ["", " " * 5000, "\n" * 5001, "a" * 100_000, "naïve 龘𠮷 👩‍🚀!"]
    for _ in range(2300):
        size = rng.randrange(1, 40)
        ranges = ((32, 127), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD800))
        texts += [
            bytes(rng.choices(range(256), k=size)).decode("utf-8", "replace"),
            b"".join(rng.choices(pieces, k=size)).decode("utf-8", "replace"),
            "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(size)),
            "".join(rng.choices(" \t\n\r\u3000\xa0.,aA1", k=size)),
        ]
    assert len(texts) > 10_000
    for text, found in zip(texts, theirs.encode_batch(texts), strict=True):
        assert found.ids == tokenizer.encode(text)
        assert theirs.decode(found.ids) == text
    assert theirs.encode(f"a{config['eos_token']}").ids == [98, 0]


def refusal(command, *arguments) -> str:
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        command.main([str(argument) for argument in arguments])
    return str(caught.value)


def test_error_lines(folder, tmp_path):
    new = tmp_path / "new.pth"
    assert "model: exists already" in refusal(pth_to_hf, FP32, folder)
    assert "no.pth: cannot be read" in refusal(pth_to_hf, tmp_path / "no.pth", new)
    assert "exists already" in refusal(hf_to_pth, folder, FP32)
    assert "config.json: cannot read: No such file" in refusal(hf_to_pth, tmp_path, new)
    wide = ModelConfig(n_layer=2, n_embd=64, vocab_size=64, head_size=32)
    zeros = {n: np.zeros(s, np.float32) for n, s in weights.official_shapes(wide).items()}
    pth.write(tmp_path / "wide.pth", zeros)
    assert "wide.pth: heads are 32 wide" in refusal(pth_to_hf, tmp_path / "wide.pth", new)

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "says model_type 'llama', not 'rwkv7'" in refusal(hf_to_pth, other, new)
    (other / "config.json").write_text('{"model_type": "rwkv7"}')
    assert "index.json: cannot read" in refusal(hf_to_pth, other, new)
    (other / "model.safetensors").write_bytes(b"\xff" * 100)
    assert "model.safetensors: is damaged" in refusal(hf_to_pth, other, new)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for change, complaint in [
        ({"x": np.zeros(3, np.float32)}, "has 'x', which an RWKV-7 model does not"),
        ({"model.norm.bias": None}, "missing ln_out.bias"),
        ({"lm_head.weight": np.zeros((512, 128), np.int8)}, "lm_head.weight is I8, not floating"),
        ({"model.norm.bias": np.zeros(64, np.float32)}, "ln_out.bias is [64]"),
    ]:
        changed = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        safetensors.numpy.save_file(changed, other / "model.safetensors")
        assert complaint in refusal(hf_to_pth, other, new)
    assert not new.exists()
