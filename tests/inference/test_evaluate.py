"""Evaluation: the numbers of a plain loop in torch, of numpy, and of what greedy decoding makes."""

import json
import math
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import evaluate
from rwkv_jax.checkpoints import weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.inference import evaluation, generation, scoring, tasks
from rwkv_jax.inference.decoder import Decoder
from rwkv_jax.inference.sampling import GREEDY
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.text import corpus, tokenizer
from rwkv_jax.text.arithmetic import Chat, Sums, write_corpus
from rwkv_jax.text.binidx import BinIdxWriter

TEXTS = [
    "The door was open. Inside, somebody had left a cup of tea on the table, and the tea",
    "“我们走吧，”她说。\n\nNobody answered her, not even the old man at the door",
    "He counted: one, two, three, and " + "again " * 300 + "again",
    "A short one",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """An fp32 .pth with the World vocabulary whose every tensor matters."""
    rng = np.random.default_rng(4)

    def lively(leaf: np.ndarray) -> np.ndarray:
        if leaf.ndim == 3 and not leaf.any():
            return rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32)
        return leaf

    params = jax.tree.map(lively, init_params(ModelConfig(n_layer=2, n_embd=64)))
    params["emb"]["weight"] = rng.normal(0, 1, params["emb"]["weight"].shape).astype(np.float32)
    params["head"]["weight"] *= 0.1  # likelihoods of an ordinary size
    path = tmp_path_factory.mktemp("evaluate") / "model.pth"
    weights.save_pth(path, params, np.float32)
    return path


@pytest.fixture(scope="module")
def model(model_file):
    return rwkv_jax.load(model_file)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts_of(path: Path) -> Iterator[corpus.Text]:
    return corpus.find(path).documents()


def run(capsys, *arguments) -> dict:
    evaluate.main([str(argument) for argument in arguments])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_text_is_scored_as_forward_has_it(model, model_file, tmp_path, capsys, monkeypatch):
    """Bits per byte and perplexity of jsonl, text and binidx: float64 sums over plain logits."""
    nats, tokens = [], 0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        padded = np.zeros((1, 512), np.int32)
        padded[0, 1 : len(ids) + 1] = ids
        logits, _ = model.forward(jnp.asarray(padded))
        z = np.asarray(logits[0, : len(ids)], np.float64)
        nats.append(float((np.log(np.exp(z).sum(1)) - z[np.arange(len(ids)), ids]).sum()))
        tokens += len(ids)
    path = write_jsonl(tmp_path / "t.jsonl", TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    options = ("--load_model", model_file, "--data_file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)  # another module's command may have set it
    result = run(capsys, *options, path, "--output", tmp_path / "result.json")
    cache = jax.config.values["jax_compilation_cache_dir"]
    assert cache == str(tmp_path / "cache" / "rwkv_jax" / "compiled")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert (result["documents"], result["tokens"], result["bytes"]) == (4, tokens, size)
    assert result["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(sum(nats) / tokens), rel=1e-4)
    assert run(capsys, *options, path, "--limit", 2)["documents"] == 2
    for precision, rounding in (("bf16", 1e-2), ("fp16", 2e-3)):
        narrow = run(capsys, *options, path, "--precision", precision)
        assert narrow["precision"] == precision and narrow["perplexity"] != result["perplexity"]
        assert narrow["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=rounding)

    (tmp_path / "t.txt").write_text(TEXTS[1], encoding="utf-8")
    single = run(capsys, *options, tmp_path / "t.txt")
    bits = nats[1] / math.log(2) / len(TEXTS[1].encode())
    assert single["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    with BinIdxWriter(tmp_path / "b") as writer:
        for text in TEXTS:
            ids = [*tokenizer.encode(text), 0]
            writer.append(np.array(ids, np.uint16), np.array([len(ids)], np.int32))
    binary = run(capsys, *options, tmp_path / "b")
    for name in ("tokens", "bytes", "bits_per_byte", "perplexity"):
        assert binary[name] == pytest.approx(result[name], rel=1e-9)


@pytest.mark.torch
@pytest.mark.slow
def test_lambada_is_that_of_a_loop_in_torch(model, model_file, tmp_path, capsys):
    """To better than four digits. Half of the last words are made the model's own choice."""
    import torch

    from tests.support import torch_rwkv7

    params = {
        name: torch.from_numpy(np.array(tensor))
        for name, tensor in weights.to_official(weights.load_pth(model_file)[1]).items()
    }

    def choices(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch_rwkv7.forward(params, torch.tensor([ids]))[0][0]

    texts = list(TEXTS)
    for text in TEXTS[:2]:
        begin = text.rpartition(" ")[0]
        ranked = choices([0, *tokenizer.encode(begin)])[-1].argsort(descending=True).tolist()
        words = (tokenizer.decode([token]) for token in ranked)
        word = next(word for word in words if word[:1] == " " and word.count(" ") == 1)
        texts.append(begin + word)
    nats, right = 0.0, 0
    for text in texts:
        begin, _, last = text.rpartition(" ")
        before, answer = tokenizer.encode(begin), tokenizer.encode(" " + last)
        logits = choices([0, *before, *answer])[len(before) : -1].double()
        nats -= logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
        right += logits.argmax(-1).tolist() == answer
    result = run(
        capsys,
        *("--load_model", model_file, "--task", "lambada"),
        *("--data_file", write_jsonl(tmp_path / "l.jsonl", texts)),
    )
    assert result["accuracy"] == right / len(texts)
    assert result["perplexity"] == pytest.approx(math.exp(nats / len(texts)), rel=1e-5)


@pytest.mark.slow
def test_exact_match_is_what_greedy_decoding_gives(model, model_file, tmp_path, capsys):
    """Chats whose replies the model itself has made count as right, others do not."""
    decoder = Decoder(*rwkv_jax.load_params(model_file))
    prompts = ["User: 12+30=?\n\nAssistant:", "User: 十二加三等于几？\n\nAssistant:"]
    made = generation.complete(decoder, prompts, 6, GREEDY)
    chats = [prompt + reply for prompt, reply in zip(prompts, made, strict=True)]
    documents = list(tasks.arithmetic_documents(texts_of(write_jsonl(tmp_path / "a.jsonl", chats))))
    for document, reply in zip(documents, made, strict=True):
        ((begin, end),) = document.spans
        assert tokenizer.decode(document.ids[begin:end]) == reply and document.ids[end - 1] == 0
    shorter = []
    for document in documents:
        ((begin, end),) = document.spans
        shorter.append(document._replace(spans=[(begin, end - 1), (end - 1, end)]))
    for _, (reply, end) in scoring.score(model, shorter):
        assert reply.first and not end.first  # all but the end of the document

    # An end that the model does choose, and an answer that it does not.
    ended = [chats[0] + "\n\nUser: x"]
    wrong = [chats[0][:-1] + "~"]
    result = run(
        capsys,
        *("--load_model", model_file, "--task", "arithmetic"),
        *("--data_file", write_jsonl(tmp_path / "b.jsonl", ended + wrong)),
    )
    (span,) = next(iter(tasks.arithmetic_documents(texts_of(tmp_path / "b.jsonl")))).spans
    assert (result["answers"], result["exact_match"]) == (2, 0.0) and span[1] > span[0]


def test_answers_are_found(tmp_path):
    def answers(text: str) -> list[str]:
        path = write_jsonl(tmp_path / "a.jsonl", [text])
        (document,) = tasks.arithmetic_documents(texts_of(path))
        return [tokenizer.decode(document.ids[begin:end]) for begin, end in document.spans]

    assert answers("1 2 + 3 4 = 4 6") == [" 4 6"]
    chat = Chat(3)
    for _ in range(50):
        text = chat.draw()
        found = answers(text)
        replies = [turn.split("\n\nUser:")[0] for turn in text.split("Assistant:")[1:]]
        assert len(found) == len(replies)
        for shown, reply in zip(found[:-1], replies, strict=False):
            assert shown.startswith(reply) and shown[len(reply) :] in ("\n", "\n\n")
        assert found[-1] == replies[-1]


def test_sums_keep_a_tenth_out(tmp_path):
    write_corpus(tmp_path / "train.jsonl", 3000, 1, Sums(2, False, 1).draw)
    write_corpus(tmp_path / "test.jsonl", 300, 2, Sums(2, True, 2).draw)
    lines = {
        name: [json.loads(line)["text"] for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    }
    assert not set(lines["train.jsonl"]) & set(lines["test.jsonl"])
    for text in lines["train.jsonl"] + lines["test.jsonl"]:
        assert max(tokenizer.encode(text)) < 512
        problem, answer = text.replace(" ", "").split("=")
        assert eval(problem) == int(answer)


OF_WORLD: Any = types.SimpleNamespace(config=ModelConfig(1, 64))


@pytest.fixture
def a_nat_a_token(monkeypatch):
    """What is read counts, not what a model makes of it."""

    def score(_, documents):
        for number, document in enumerate(documents):
            yield number, [scoring.SpanScore(float(len(document.ids)), True)]

    monkeypatch.setattr(evaluation, "score", score)


def test_text_of_other_kinds(a_nat_a_token, tmp_path, monkeypatch):
    """A folder, bad lines that are skipped, and any file as one text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").mkdir()
    write_jsonl(tmp_path / "f" / "a.jsonl", TEXTS[:2])
    (tmp_path / "f" / "b.JSONL").write_text('{"text": "A short one"}\n{}\n')
    result = evaluation.evaluate(OF_WORLD, "text", "f", on_bad_line="skip")
    assert (result["documents"], result["skipped"]) == (3, 1)
    assert (tmp_path / "f.skipped.tsv").read_text().startswith("f/b.JSONL:2\tis not ")
    (tmp_path / "read.me").write_text(TEXTS[3])
    ids = tokenizer.encode(TEXTS[3])
    assert evaluation.evaluate(OF_WORLD, "text", "read.me")["tokens"] == len(ids)
    write_jsonl(tmp_path / "c.jsonl", TEXTS)
    limited = evaluation.evaluate(OF_WORLD, "text", tmp_path / "c.jsonl", 3, text_key="text")
    assert limited["documents"] == 3


@pytest.mark.parametrize(
    ("dtype", "ids", "complaint"),
    [
        (np.int32, [5, 128000, 0], "d: token 4 has id 128000, outside the vocabulary of 65536"),
        (np.int32, [-1, 0], "d: token 3 has id -1, outside the vocabulary"),
        (np.float32, [1.5, 0], "d: token 3 has id 1.5, outside the vocabulary"),
        (np.uint16, [65530, 0], None),
    ],
)
def test_ids_that_are_no_text(a_nat_a_token, tmp_path, dtype, ids, complaint):
    with BinIdxWriter(tmp_path / "d", dtype) as writer:
        writer.append(np.array([65530, 65531, 0], dtype), [3])
        writer.append(np.array(ids, dtype), [len(ids)])
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        evaluation.evaluate(OF_WORLD, "text", tmp_path / "d")
    assert (complaint or "d: holds no text") in str(caught.value)


@pytest.mark.parametrize(
    ("options", "content", "complaint"),
    [
        (["--limit", "-1"], "", "--limit -1: give 0 (all) or more"),
        (["--output", "."], "", ".: cannot write: it is not a regular file"),
        (["--output", "no/x"], "", "no/x: cannot write: No such file"),
        (["--on_bad_line", "skip"], "1", "holds no text: every line was skipped; "),
        ([], '{"text": "cut \\ud83d"}', "x.jsonl:1: character 4 of the text"),
        ([], "", "holds no text"),
        ([], '{"texts": 1}\n', ':1: is not {"text": "…"}'),
        (["--task", "lambada"], '{"text": "word"}\n', "no space before the last word in 'word'"),
        (["--task", "arithmetic"], '{"text": "a b"}\n', 'no "Assistant:" and no "="'),
    ],
)
def test_bad_input(model_file, tmp_path, options, content, complaint):
    (tmp_path / "x.jsonl").write_text(content)
    files = ["--load_model", str(model_file), "--data_file", str(tmp_path / "x.jsonl")]
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        evaluate.main([*files, *options])
    assert complaint in str(caught.value)


def test_logits_that_are_not_finite_are_an_error(tmp_path):
    """In float16, of weights that are finite in it."""
    params = init_params(ModelConfig(n_layer=1, n_embd=64, vocab_size=512), 0)
    for name in ("key", "value"):
        leaf = params["blocks"]["ffn"][name]["weight"]
        leaf[:] = np.random.default_rng(0).normal(0, 1e3, leaf.shape)
    weights.save_pth(tmp_path / "x.pth", params, np.float16)
    path = write_jsonl(tmp_path / "x.jsonl", ["a"])
    files = ["--load_model", str(tmp_path / "x.pth"), "--data_file", str(path)]
    with pytest.raises(UserError, match="^the model's logits are not finite .*--precision[^\n]*$"):
        evaluate.main([*files, "--precision", "fp16", "--output", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()


def test_an_id_beyond_the_model(tmp_path):
    oracle = Path(__file__).parents[1] / "data" / "oracles" / "tiny_v512_rand_fp32.pth"
    path = write_jsonl(tmp_path / "x.jsonl", ["今"])
    with pytest.raises(UserError, match="token 10381 is outside the model's vocabulary of 512"):
        evaluate.main(["--load_model", str(oracle), "--data_file", str(path)])
