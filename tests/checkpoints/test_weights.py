"""Names and shapes: exact round trips, liberal import, and what programs that read us demand."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.model.rwkv7 import abstract_params

ORACLES = Path(__file__).parents[1] / "data" / "oracles"
CONFIG = ModelConfig(n_layer=3, n_embd=128, vocab_size=512)
BF16 = np.dtype(ml_dtypes.bfloat16)


def oracle(variant: str) -> dict[str, np.ndarray]:
    return pth.read(ORACLES / f"tiny_v512_{variant}.pth")


def assert_equal(actual, expected) -> None:
    assert actual.dtype == expected.dtype
    assert np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


def refusal(tensors, expect=None) -> str:
    with pytest.raises(UserError) as caught:
        weights.from_official(tensors, expect)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2000
    return message


# --------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("variant", ["rand_bf16", "rand_bf16_dsflat", "rand_bf16_legacy"])
def test_a_bf16_file_through_an_fp32_tree_is_the_same_bit_for_bit(tmp_path, variant):
    config, params = weights.load_pth(ORACLES / f"tiny_v512_{variant}.pth")
    assert config == CONFIG and params["head"]["weight"].dtype == np.float32
    weights.save_pth(tmp_path / "x.pth", params)
    theirs, ours = oracle("rand_bf16"), pth.read(tmp_path / "x.pth")
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        assert_equal(ours[name], tensor)


@pytest.mark.parametrize("variant", ["init_fp32", "rand_fp32", "rand_bf16", "rand_bf16_nov0"])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_our_file_through_the_tree_is_the_same_file(tmp_path, variant, dtype):
    one, two = tmp_path / "rwkv-1.pth", tmp_path / "rwkv-final.pth"
    _, params = weights.load_pth(ORACLES / f"tiny_v512_{variant}.pth")
    weights.save_pth(one, params, dtype)
    config, params = weights.load_pth(one, expect=CONFIG)
    weights.save_pth(two, params, dtype)
    assert one.read_bytes() == two.read_bytes()
    assert config == CONFIG


def test_jax_arrays_are_written_as_numpy_arrays_are(tmp_path):
    _, params = weights.load_pth(ORACLES / "tiny_v512_rand_fp32.pth")
    weights.save_pth(tmp_path / "numpy.pth", params)
    weights.save_pth(tmp_path / "jax.pth", jax.tree.map(jnp.asarray, params))
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    weights.save_pth(tmp_path / "bf16.pth", half)
    expected = (tmp_path / "numpy.pth").read_bytes()
    assert (tmp_path / "jax.pth").read_bytes() == expected
    assert (tmp_path / "bf16.pth").read_bytes() == expected


def test_one_layer(tmp_path):
    config = ModelConfig(n_layer=1, n_embd=8, vocab_size=5, head_size=4)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in weights.official_shapes(config).items()
    }
    inferred, params = weights.from_official(tensors)
    assert inferred == config
    for name, tensor in weights.to_official(params).items():
        assert_equal(tensor, tensors[name])
    without = {k: v for k, v in tensors.items() if k[:-1] != "blocks.0.att.v"}
    assert len(without) == len(tensors) - 3
    assert weights.from_official(without)[0] == config  # dim_v: the width of a fresh model


# ------------------------------------------------------------------------------------ the tree


def test_leaves_are_where_the_model_expects_them():
    tensors = oracle("rand_fp32")
    _, params = weights.from_official(tensors)
    blocks = params["blocks"]
    L, C, H, N, V, F = 3, 128, 2, 64, 512, 512
    assert list(params) == ["emb", "blocks", "ln0", "ln_out", "head"]
    assert params["emb"]["weight"].shape == params["head"]["weight"].shape == (V, C)
    assert blocks["att"]["x_r"].shape == blocks["att"]["w0"].shape == (L, C)
    assert blocks["att"]["r_k"].shape == (L, H, N)
    assert blocks["ffn"]["key"]["weight"].shape == (L, F, C)
    np.testing.assert_array_equal(params["ln0"]["bias"], tensors["blocks.0.ln0.bias"])
    for layer in range(L):
        for name, leaf in [
            ("ln2.weight", blocks["ln2"]["weight"]),
            ("att.x_g", blocks["att"]["x_g"]),
            ("att.v0", blocks["att"]["v0"]),
            ("att.w1", blocks["att"]["w1"]),
            ("att.value.weight", blocks["att"]["value"]["weight"]),
            ("att.ln_x.bias", blocks["att"]["ln_x"]["bias"]),
            ("ffn.x_k", blocks["ffn"]["x_k"]),
            ("ffn.value.weight", blocks["ffn"]["value"]["weight"]),
        ]:
            expected = tensors[f"blocks.{layer}.{name}"]
            np.testing.assert_array_equal(leaf[layer], expected.reshape(leaf.shape[1:]))


def test_the_tree_is_the_models():
    _, params = weights.from_official(oracle("rand_fp32"))
    ours = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), params)
    models = jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), abstract_params(CONFIG))
    assert ours == models


def test_every_dtype_is_converted_exactly():
    tensors = oracle("rand_bf16")
    for stored in [BF16, np.float32, np.float64]:
        given = {name: tensor.astype(stored) for name, tensor in tensors.items()}
        _, params = weights.from_official(given, dtype=np.float32)
        assert_equal(params["head"]["weight"], tensors["head.weight"].astype(np.float32))
    _, params = weights.from_official(tensors, dtype=BF16)
    assert_equal(params["head"]["weight"], tensors["head.weight"])


class Shape:
    """A tensor of which only shape and dtype are known."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self.dtype = shape, np.dtype(np.float32)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(12, 768),
        ModelConfig(61, 4096, dim_w=192, dim_a=192, dim_v=128, dim_g=384),
        ModelConfig(24, 2048, dim_w=96, dim_a=80, dim_v=64, dim_g=256),
        ModelConfig(1, 96, vocab_size=7, head_size=32, dim_ffn=100, dim_w=1, dim_a=2, dim_v=3),
    ],
)
def test_the_configuration_is_read_off_the_shapes(config):
    shapes = weights.official_shapes(config)
    assert weights.infer_config({name: Shape(shape) for name, shape in shapes.items()}) == config


def test_memory_is_the_trees_own(tmp_path):
    config = ModelConfig(n_layer=6, n_embd=256, vocab_size=2048)
    path = tmp_path / "x.pth"
    shapes = weights.official_shapes(config)
    pth.write(path, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, BF16)
    size = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    tracemalloc.start()
    _, params = weights.load_pth(path)
    assert tracemalloc.get_traced_memory()[1] < 1.05 * size + (1 << 20)
    tracemalloc.reset_peak()
    weights.save_pth(path, params)
    largest = 4 * config.vocab_size * config.n_embd
    assert tracemalloc.get_traced_memory()[1] < 1.05 * size + 2 * largest
    tracemalloc.stop()


# -------------------------------------------------------------------------------- liberal import


def variants() -> dict[str, dict[str, np.ndarray]]:
    tensors = oracle("rand_bf16")
    return {
        "flat vectors": {
            name: tensor.reshape(-1) if tensor.ndim == 3 else tensor
            for name, tensor in tensors.items()
        },
        "norms as [1, 1, C]": {
            name: tensor.reshape(1, 1, -1) if ".ln" in name else tensor
            for name, tensor in tensors.items()
        },
        "sorted": dict(sorted(tensors.items())),
        "reversed": dict(reversed(tensors.items())),
        "prefix": {f"_forward_module.{name}": tensor for name, tensor in tensors.items()},
        "prefix on some": {
            f"_forward_module.{name}" if "att" in name else name: tensor
            for name, tensor in tensors.items()
        },
    }


@pytest.mark.parametrize("variant", variants())
def test_import_is_liberal(variant):
    config, params = weights.from_official(variants()[variant])
    assert config == CONFIG
    exported = weights.to_official(params)
    theirs = oracle("rand_bf16")
    assert list(exported) == list(theirs)
    for name, tensor in theirs.items():
        assert exported[name].shape == tensor.shape
        assert_equal(exported[name], tensor.astype(np.float32))


def test_v_of_the_first_block_may_be_absent_and_becomes_zeros():
    config, params = weights.from_official(oracle("rand_bf16_nov0"))
    assert config == CONFIG
    exported, whole = weights.to_official(params), oracle("rand_bf16")
    assert list(exported) == list(whole)
    for name, tensor in whole.items():
        if name.startswith("blocks.0.att.v") and name[-1] in "012":
            tensor = np.zeros_like(tensor)
        assert_equal(exported[name], tensor.astype(np.float32))
    partly = {k: v for k, v in whole.items() if k != "blocks.0.att.v1"}
    _, params = weights.from_official(partly)
    assert not params["blocks"]["att"]["v1"][0].any()
    assert_equal(params["blocks"]["att"]["v2"][0], whole["blocks.0.att.v2"].astype(np.float32))


# ---------------------------------------------------------------------------------- refusals


def test_extra_tensors_are_named():
    extra = {"bad\nname": np.zeros(1, np.int32)} | {f"extra.{i}": np.zeros(3) for i in range(9)}
    assert refusal({**extra, **oracle("rand_bf16")}) == (
        r"has tensors that RWKV-7 does not have: bad\nname, extra.0, extra.1, extra.2, extra.3, "
        "extra.4 and 4 more; it is another model"
    )


FINITE = {np.float32: np.finfo(np.float32).max, BF16: 3e38, np.float16: 65504, np.float64: 1e308}


@pytest.mark.parametrize("dtype", FINITE, ids=lambda dtype: np.dtype(dtype).name)
def test_values_that_are_not_finite_are_counted(dtype):
    values = np.zeros((3, 200_001), dtype)
    values[0, :4] = [FINITE[dtype], -FINITE[dtype], -0.0, np.finfo(np.float16).tiny]
    assert weights.count_not_finite(values) == weights.count_not_finite(values.T) == 0
    values[2, -3:] = [np.inf, -np.inf, np.nan]
    values[0, 7] = -np.float32(np.nan)
    assert weights.count_not_finite(values) == weights.count_not_finite(values.T) == 4
    assert weights.count_not_finite(values[:2, 8:]) == weights.count_not_finite(values[:0]) == 0


def test_integers_are_finite():
    assert weights.count_not_finite(np.full(3, -1, np.int32)) == 0


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_the_first_tensor_that_is_not_finite_is_named(dtype):
    tensors = oracle("rand_bf16")
    for name in ("blocks.1.att.key.weight", "head.weight"):
        tensors[name] = tensors[name].copy()
        tensors[name][3, 5:7] = np.nan, np.inf
    with pytest.raises(UserError) as caught:
        weights.from_official(tensors, None, dtype, "x.pth")
    assert str(caught.value) == (
        "x.pth: blocks.1.att.key.weight: 2 of 16,384 values are not finite (NaN or infinity), so "
        "the model cannot be used: use an earlier file, or download it again"
    )


def test_values_beyond_float16_are_named():
    tensors = oracle("rand_fp32")
    tensors["head.weight"] = tensors["head.weight"] + 1e5
    message = "x.pth: head.weight: has values beyond the range of float16; use bfloat16 or float32"
    with pytest.raises(UserError, match=message):
        weights.from_official(tensors, None, np.float16, "x.pth")
    weights.from_official(tensors, None, BF16)


def test_missing_and_misshapen_tensors_are_listed():
    tensors = oracle("rand_bf16")
    bad = {k: v for k, v in tensors.items() if not k.startswith("blocks.1.ffn")}
    bad["blocks.2.att.w1"] = np.zeros((128, 33), np.float32)
    bad["ln_out.bias"] = np.zeros((128, 1), np.float32)
    message = refusal(bad)
    assert message == (
        "is not an RWKV-7 model of 3 layers, width 128, vocabulary 512, head size 64: "
        "missing blocks.1.ffn.x_k, blocks.1.ffn.key.weight, blocks.1.ffn.value.weight; "
        "blocks.2.att.w1 is [128, 33] and should be [128, 32], "
        "ln_out.bias is [128, 1] and should be [128]"
    )


def test_a_model_of_another_shape_than_asked_for_is_refused_with_the_differences(tmp_path):
    path = ORACLES / "tiny_v512_rand_bf16.pth"
    assert weights.load_pth(path, expect=CONFIG)[0] == CONFIG
    with pytest.raises(UserError) as caught:
        weights.load_pth(path, expect=ModelConfig(2, 128, vocab_size=512, dim_g=96))
    assert str(caught.value) == (
        f"{path}: does not match the requested model, 2 layers, width 128, vocabulary 512, head "
        "size 64: too many layers blocks.2.ln1.weight, blocks.2.ln1.bias, blocks.2.ln2.weight, "
        "blocks.2.ln2.bias, blocks.2.att.x_r, blocks.2.att.x_w and 27 more; "
        "blocks.0.att.g1 is [128, 64] and should be [128, 96], "
        "blocks.0.att.g2 is [64, 128] and should be [96, 128], "
        "blocks.1.att.g1 is [128, 64] and should be [128, 96], "
        "blocks.1.att.g2 is [64, 128] and should be [96, 128]"
    )
    with pytest.raises(UserError, match=r"missing blocks\.3\.ln1\.weight.* and 27 more"):
        weights.load_pth(path, expect=ModelConfig(4, 128, vocab_size=512))


def named(*names: str) -> dict[str, np.ndarray]:
    return {name: np.zeros((4, 4), np.float32) for name in names}


@pytest.mark.parametrize(
    "tensors, kind",
    [
        (named("emb.weight", "blocks.0.att.time_decay", "blocks.0.att.time_first"), "RWKV-4"),
        (named("blocks.0.att.time_decay", "blocks.0.att.ln_x.weight"), "RWKV-5"),
        (named("blocks.0.att.time_faaaa", "blocks.0.att.ln_x.weight"), "RWKV-5.2"),
        (named("blocks.0.att.time_maa_x", "blocks.0.att.time_faaaa"), "RWKV-6"),
        (named("blocks.0.att.r_k", "blocks.0.ffn.s_emb.weight"), "RWKV-7a .with DeepEmbed"),
        (named("blocks.0.ffn.s_emb.weight", "blocks.0.qkv.qq.weight"), "RWKV-7b .* and DEA"),
        (named("blocks.0.att.r_k", "blocks.1.ffn.enn.weight"), "RWKV-8"),
        (named("blocks.0.qkv.qq.weight", "blocks.1.ffn.enn.weight"), "RWKV-8"),
        (named("blocks.0.att.r_k", "blocks.0.att.key.lora_A"), "LoRA .* merge it"),
        (named("blocks.0.att.ln_x.weight", "blocks.0.att.key.lora_B"), "LoRA .* merge it"),
        (named("model.layers.0.self_attn.q_proj.lora_A.weight"), "LoRA"),
        (named("base_model.blocks.0.att.key.lora_A.default.weight"), "LoRA"),
        (named("blocks.0.att.time_state"), "initial state.*--load_state"),
        (named("model.layers.0.self_attn.q_proj.weight"), "a transformer"),
        (named("layers.0.attention.wq.weight"), "a llama"),
        (named("transformer.h.0.attn.c_attn.weight"), "a GPT-2"),
        (named("model.layers.0.attn.r_proj.lora.weight"), "a Hugging Face model.*hf-to-pth"),
        (named("conv1.weight", "bad\x1b[2J\nname"), r"something else, not RWKV-7: .*\\x1b\[2J\\nn"),
        (named("att.r_k"), "something else"),
        ({}, "something else"),
    ],
)
def test_another_architecture_is_named(tensors, kind):
    message = refusal(tensors)
    assert re.match(f"^is .*{kind}", message) and ", not RWKV-7: it has " in message
    refusal(tensors, expect=CONFIG)


def test_other_broken_models():
    tensors = oracle("rand_bf16")
    without = {k: v for k, v in tensors.items() if not k.startswith("blocks.1.")}
    assert "has blocks up to 2, but only 2 of them" in refusal(without)
    far = {**tensors, "blocks.9999.att.x_r": tensors["blocks.0.att.x_r"]}
    assert "has blocks up to 9999, but only 4 of them" in refusal(far)
    quantised = {**tensors, "blocks.1.att.key.weight": np.zeros((128, 128), np.int8)}
    assert "blocks.1.att.key.weight is int8, not floating point" in refusal(quantised)
    both = {**tensors, "_forward_module.head.weight": tensors["head.weight"]}
    assert "with and without the prefix" in refusal(both)
    narrow = {**tensors, "blocks.0.att.r_k": np.zeros((3, 50), np.float32)}
    assert "give V=512, C=128, H=3, N=50; they have to be" in refusal(narrow)
    flat = {k: v.reshape(-1) if k.endswith("r_k") else v for k, v in tensors.items()}
    assert "H=0, N=0" in refusal(flat)
    scalar = {**tensors, "emb.weight": np.zeros((), np.float32)}
    assert "emb.weight is [] and should be [512, 128]" in refusal(scalar)
    empty = {**tensors, "emb.weight": np.zeros((0, 128), np.float32)}
    assert "V=0" in refusal(empty)


def test_a_tree_of_inconsistent_shapes_is_not_written(tmp_path):
    _, params = weights.from_official(oracle("rand_fp32"))
    params["head"]["weight"] = params["head"]["weight"][:, :-1]
    with pytest.raises(UserError, match="head.weight is"):
        weights.save_pth(tmp_path / "x.pth", params)
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------- the programs that read us


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """An fp32 oracle through the tree to a file of ours in bf16, the default."""
    path = tmp_path_factory.mktemp("exported") / "rwkv-final.pth"
    weights.save_pth(path, weights.load_pth(ORACLES / "tiny_v512_rand_bf16_nov0.pth")[1])
    return path


@pytest.mark.torch
def test_torch_maps_it(exported):
    import torch

    theirs = torch.load(ORACLES / "tiny_v512_rand_bf16.pth", weights_only=True)
    ours = torch.load(exported, weights_only=True, mmap=True)
    assert type(ours) is dict and list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.bfloat16 and ours[name].shape == tensor.shape
        if not name.startswith(("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")):
            assert torch.equal(ours[name], tensor), name


RUN = """
import json, sys
import numpy as np
from rwkv.model import RWKV
model = RWKV(model=sys.argv[1], strategy="cpu fp32")
logits, state = model.forward(json.loads(sys.argv[2]), None, full_output=True)
np.savez(sys.argv[3], logits=logits.numpy(), wkv=np.stack([s.numpy() for s in state[1::3]]))
"""


@pytest.mark.torch
@pytest.mark.parametrize(
    "variant, dtype",
    [("rand_fp32", "float32"), ("rand_bf16_dsflat", "bfloat16")],
)
def test_the_rwkv_package_computes_the_oracles_logits_from_it(tmp_path, variant, dtype):
    """In a process of its own: the package reads its environment at import and changes torch's."""
    source = ORACLES / f"tiny_v512_{variant}.pth"
    weights.save_pth(tmp_path / "rwkv-final.pth", weights.load_pth(source)[1], dtype)
    expected = np.load(ORACLES / f"tiny_v512_{variant.removesuffix('_dsflat')}.npz")
    subprocess.run(
        [
            *(sys.executable, "-c", RUN, str(tmp_path / "rwkv-final")),  # without .pth
            *(json.dumps(expected["tokens"].tolist()), str(tmp_path / "out.npz")),
        ],
        env={**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0"},
        check=True,
        capture_output=True,
    )
    actual = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(actual["logits"], expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(actual["wkv"], expected["state"], rtol=0, atol=1e-4)


def test_rwkv_runner_takes_it_for_v7(exported):
    """It decides on v7 when it meets att.r_k after an ln_x."""
    names = list(pth.read(exported))
    first_norm = next(i for i, name in enumerate(names) if "ln_x" in name)
    assert any("att.r_k" in name for name in names[first_norm:])


def test_rwkv_cpp_concatenates_the_mixes_in_its_order(exported):
    """Its converter joins att.x_* along the first axis in file order and reads r, w, k, v, a, g."""
    tensors = pth.read(exported)
    for layer in range(3):
        prefix = f"blocks.{layer}.att.x_"
        mixes = [name for name in tensors if name.startswith(prefix)]
        assert "".join(name.removeprefix(prefix) for name in mixes) == "rwkvag"
        assert np.concatenate([tensors[name] for name in mixes]).shape == (6, 1, 128)


def test_web_rwkv_finds_the_value_residual_of_block_1(exported):
    assert pth.read(exported)["blocks.1.att.v1"].shape == (128, 32)


@pytest.mark.torch
def test_the_official_trainers_strict_load_accepts_it(exported):
    """Against modules that register what the official ones do, in their order."""
    import torch
    from torch import nn

    def parameters(module: nn.Module, **shapes: tuple[int, ...]) -> nn.Module:
        for name, shape in shapes.items():
            setattr(module, name, nn.Parameter(torch.zeros(shape)))
        return module

    def linear(rows: int, columns: int) -> nn.Linear:
        return nn.Linear(columns, rows, bias=False)

    L, V, C, H, N, F, low, gate = 3, 512, 128, 2, 64, 512, 32, 64
    vector = (1, 1, C)
    model = nn.Module()
    model.emb = nn.Embedding(V, C)
    model.blocks = nn.ModuleList()
    for layer in range(L):
        block = nn.Module()
        block.ln1, block.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        if layer == 0:
            block.ln0 = nn.LayerNorm(C)
        mixes = {f"x_{letter}": vector for letter in "rwkvag"}
        low_rank = {}
        for letter in "wav":
            low_rank |= {f"{letter}1": (C, low), f"{letter}2": (low, C), f"{letter}0": vector}
        gates = {"g1": (C, gate), "g2": (gate, C), "k_k": vector, "k_a": vector, "r_k": (H, N)}
        block.att = parameters(nn.Module(), **mixes, **low_rank, **gates)
        for name in ["receptance", "key", "value", "output"]:
            setattr(block.att, name, linear(C, C))
        block.att.ln_x = nn.GroupNorm(H, C)
        block.ffn = parameters(nn.Module(), x_k=vector)
        block.ffn.key, block.ffn.value = linear(F, C), linear(C, F)
        model.blocks.append(block)
    model.ln_out, model.head = nn.LayerNorm(C), linear(V, C)

    tensors = torch.load(exported, weights_only=True, mmap=True)
    assert list(tensors) == list(model.state_dict())
    model.load_state_dict(tensors, strict=True)
