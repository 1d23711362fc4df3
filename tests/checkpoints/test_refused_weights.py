"""Weights that no model can be computed with are refused in the same line by every command that
reads them."""

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import evaluate, generate
from rwkv_jax.checkpoints import pth, store, weights
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.convert import (
    describe,
    hf,
    hf_to_pth,
    orbax_to_pth,
    pth_to_hf,
    pth_to_orbax,
    pth_to_st,
    st,
    st_to_pth,
    verify,
)
from rwkv_jax.errors import UserError
from rwkv_jax.inference import evaluation, scoring
from rwkv_jax.text import tokenizer
from rwkv_jax.text.binidx import BinIdxWriter
from rwkv_jax.text.dataset import open_dataset
from rwkv_jax.training import initial_weights

CONFIG = ModelConfig(n_layer=2, n_embd=64, vocab_size=512)


def tensors(config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.1, shape).astype(ml_dtypes.bfloat16)
        for name, shape in weights.official_shapes(config).items()
    }


def _evaluate(path: str, folder: Path) -> None:
    (folder / "text.jsonl").write_text('{"text": "a"}\n')
    evaluate.main(["--load_model", path, "--data_file", str(folder / "text.jsonl")])


# Name → what reads a .pth, given a new name to write to.
READERS: dict[str, Callable[[str, Path], object]] = {
    "load": lambda path, new: rwkv_jax.load(path),
    "train": lambda path, new: initial_weights.load(TrainConfig(load_model=path), Path(path)),
    "train --load_partial": lambda path, new: initial_weights.load(
        TrainConfig(load_model=path, load_partial=1), Path(path)
    ),
    "plan": lambda path, new: initial_weights.initial_model(TrainConfig(load_model=path)),
    "generate": lambda path, new: generate.main(["--load_model", path, "--prompt", "a"]),
    "evaluate": lambda path, new: _evaluate(path, new.parent),
    "pth_to_orbax": lambda path, new: pth_to_orbax.main([path, str(new)]),
    "pth_to_hf": lambda path, new: pth_to_hf.main([path, str(new)]),
    "pth_to_st": lambda path, new: pth_to_st.main([path, str(new)]),
    "verify": lambda path, new: verify.main([path]),
}
SEE_NO_VALUES = {"plan"}
USE_A_STATE = {"generate"}

# Name → tensors beside a model's, and what the file is said to be.
EXTRA = {
    "rwkv8": ({"blocks.1.ffn.enn.weight": (512, 256)}, "is RWKV-8, not RWKV-7"),
    "rwkv7a": ({"blocks.0.ffn.s_emb.weight": (512, 64)}, "is RWKV-7a (with DeepEmbed), not RWKV-7"),
    "lora": ({"blocks.0.att.key.lora_A": (8, 64)}, "is an unmerged LoRA (alone or with a model)"),
    "state": ({"blocks.0.att.time_state": (1, 64, 64)}, "has a tuned initial state in add"),
    "unknown": (
        {"blocks.0.att.note": (3,)},
        "has tensors that RWKV-7 does not have: blocks.0.att.note;",
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", EXTRA)
def test_a_model_with_more_than_rwkv7_has(tmp_path, reader, kind, capsys):
    shapes, what = EXTRA[kind]
    path, new = tmp_path / "x.pth", tmp_path / "new"
    pth.write(path, tensors() | {name: np.ones(shape) for name, shape in shapes.items()})
    if kind == "state" and reader in USE_A_STATE:
        what = "is not a tuned state of this model"  # for layer 1 has none
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        READERS[reader](str(path), new)
    assert str(caught.value).startswith(f"{path}: {what}")
    assert next(iter(shapes)) in str(caught.value) and not new.exists()
    describe.main([str(path)])
    shown = capsys.readouterr().out
    assert (what in shown or kind == "state") and next(iter(shapes)).split(".", 2)[2] in shown


NAN = (
    "blocks.0.att.receptance.weight: 2 of 4,096 values are not finite (NaN or infinity), so the "
    "model cannot be used: use an earlier file, or download it again"
)


def with_nan() -> dict[str, np.ndarray]:
    found = tensors()
    found["blocks.0.att.receptance.weight"][3, 5:7] = np.nan, -np.inf
    return found


@pytest.mark.parametrize("reader", sorted(READERS.keys() - SEE_NO_VALUES))
def test_values_that_are_not_finite(tmp_path, reader):
    path, new = tmp_path / "x.pth", tmp_path / "new"
    pth.write(path, with_nan())
    with pytest.raises(UserError) as caught:
        READERS[reader](str(path), new)
    assert str(caught.value) == f"{path}: {NAN}" and not new.exists()


def test_values_that_are_not_finite_are_described(tmp_path, capsys):
    pth.write(tmp_path / "x.pth", with_nan())
    describe.main([str(tmp_path / "x.pth")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("in 72 tensors, 0.4 MB, 2 of them not finite (NaN or infinity)")
    (row,) = (line for line in lines[2:] if "not finite" in line)
    assert row.split() == "blocks.0.att.receptance.weight 64 x 64 bfloat16 2 not finite".split()


@pytest.mark.parametrize("layout", ["checkpoint", "hf", "st"])
def test_values_that_are_not_finite_in_other_layouts(tmp_path, layout, monkeypatch):
    source, new = tmp_path / layout, tmp_path / "new"
    with monkeypatch.context() as patch:  # as programs that do not look at values wrote them
        patch.setattr(weights, "count_not_finite", lambda values: 0)
        if layout == "checkpoint":
            store.save_model(source, CONFIG, weights.with_finite_check(with_nan()))
        elif layout == "hf":
            hf.write_hf(source, with_nan(), "")
        else:
            st.write_safetensors(source, st.to_st(with_nan()))
    convert = {"checkpoint": orbax_to_pth, "hf": hf_to_pth, "st": st_to_pth}[layout]
    readers = [lambda: convert.main([str(source), str(new)])]
    if layout == "checkpoint":
        readers.append(lambda: rwkv_jax.load(source))
    if layout == "st":
        readers.append(lambda: verify.verify(source))
    for read in readers:
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == f"{source}: {NAN}" and not new.exists()


# ------------------------------------------------------------------------- another tokenizer's


@pytest.fixture(scope="module")
def pile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pile") / "pile.pth"
    pth.write(path, tensors(ModelConfig(n_layer=1, n_embd=64, vocab_size=50304)))
    return path


@pytest.mark.parametrize("reader", ["generate", "evaluate"])
def test_no_text_is_given_to_a_model_of_the_pile(pile, tmp_path, reader):
    with pytest.raises(UserError) as caught:
        READERS[reader](str(pile), tmp_path / "new")
    about = pile if reader == "generate" else tmp_path / "text.jsonl"
    assert str(caught.value) == (
        f"{about}: the model has a vocabulary of 50304, GPT-NeoX's, of the Pile models, so it is "
        "not for the World tokenizer: it cannot read text, only token files (binidx) made "
        "with its own tokenizer"
    )


def test_a_model_of_the_pile_is_trained_and_measured_on_tokens(pile, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.jsonl").write_text('{"text": "a b c d e f"}\n')
    with pytest.raises(UserError, match="text.jsonl: the model has a vocabulary of 50277, GPT-Neo"):
        open_dataset(tmp_path / "text.jsonl", 1, vocab_size=50277)
    ids = np.random.default_rng(0).integers(1, 50304, 40)
    with BinIdxWriter(tmp_path / "tokens") as writer:
        writer.append(ids, [len(ids)])
    assert open_dataset(tmp_path / "tokens", 4, vocab_size=50304).tokens.tolist() == ids.tolist()
    answers = [scoring.SpanScore(nats=80.0, first=True)]
    monkeypatch.setattr(evaluation, "score", lambda model, documents: [(0, answers)])
    result = evaluation.evaluate(rwkv_jax.load(pile), "text", tmp_path / "tokens")
    assert result["tokens"] == 40 and result["perplexity"] == np.exp(2)
    assert "bits_per_byte" not in result and "bytes" not in result
    describe.main([str(pile)])
    assert "vocabulary 50304 (GPT-NeoX's, of the Pile models)" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [1, 512, 32000, 65529, 65530, 65536])
def test_other_sizes_may_be_of_the_world_tokenizer(rows):
    tokenizer.check_vocabulary(rows, "x")


@pytest.mark.parametrize("rows", [50257, 50277, 50304, 50432, 65537, 151936])
def test_sizes_that_are_not_of_the_world_tokenizer(rows):
    with pytest.raises(UserError, match=f"^x: the model has a vocabulary of {rows}, [^\n]*$"):
        tokenizer.check_vocabulary(rows, "x")
