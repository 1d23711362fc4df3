"""Generation: the tokens that a model's logits dictate, drawn as the rwkv package draws them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import generate as generation
from rwkv_jax import tokenizer, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.errors import UserError
from rwkv_jax.initialisation import init_params

ORACLE = Path(__file__).parent / "data" / "oracles" / "tiny_v512_rand_fp32.pth"
PROMPT = "User: 今天天气怎么样?\n\nAssistant:"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """An fp32 .pth with the World vocabulary whose every tensor matters."""
    rng = np.random.default_rng(1)

    def lively(leaf: np.ndarray) -> np.ndarray:
        if leaf.ndim == 3 and not leaf.any():  # the matrices that a fresh model has at zero
            return rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32)
        return leaf

    params = jax.tree.map(lively, init_params(ModelConfig(n_layer=2, n_embd=64)))
    params["emb"]["weight"] = rng.normal(0, 1, params["emb"]["weight"].shape).astype(np.float32)
    path = tmp_path_factory.mktemp("world") / "model.pth"
    weights.save_pth(path, params, np.float32)
    return path


def command(*arguments, stdin: bytes = b"") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "rwkv_jax.generate", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


# ---------------------------------------------------------------------------------- which tokens


def plain_greedy(model, prompt: list[int], length: int) -> list[int]:
    """No state: the whole text anew for each token (padded at the end, so as to compile once)."""
    tokens = list(prompt)
    for _ in range(length):
        padded = np.zeros((1, len(prompt) + length), np.int32)
        padded[0, : len(tokens)] = tokens
        logits, _ = model.forward(jnp.asarray(padded))
        tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_greedy_is_the_plain_loop_whatever_the_pieces(monkeypatch):
    model = rwkv_jax.load(ORACLE)
    model.head.weight[...] = model.head.weight[...].at[0].set(0)  # so that no document ends
    prompt = np.random.default_rng(0).integers(1, 512, 22).tolist()
    expected = plain_greedy(model, prompt, 40)
    assert 0 not in expected and len(set(expected)) > 20
    for piece in (256, 11):
        monkeypatch.setattr(generation, "PROMPT_PIECE", piece)
        assert list(generation.generate(model, prompt, 40, temperature=0)) == expected


def test_it_ends_before_an_end_of_document():
    model = rwkv_jax.load(ORACLE)
    prompt = [5, 6, 7]
    ids = plain_greedy(model, prompt, 40)
    last = max(range(20, 40), key=lambda i: (ids[i] not in ids[:i], -i))
    assert ids[last] not in ids[:last]
    # Swap the rows of 0 and of a token made late (in a later call): then that place is the end.
    swap = jnp.arange(512).at[0].set(ids[last]).at[ids[last]].set(0)
    for table in (model.head, model.emb):
        table.weight[...] = table.weight[...][swap]
    expected = [ids[last] if token == 0 else token for token in ids[:last]]
    assert list(generation.generate(model, prompt, 40, temperature=0)) == expected


def test_an_empty_prompt_begins_a_document():
    model = rwkv_jax.load(ORACLE)
    ids = list(generation.generate(model, [], 5, temperature=0))
    assert ids and ids == list(generation.generate(model, [0], 5, temperature=0))


THEIRS = """
import json, sys
import numpy as np
from rwkv.model import RWKV
from rwkv.utils import PIPELINE, PIPELINE_ARGS
pipeline = PIPELINE(RWKV(model=sys.argv[1], strategy="cpu fp32"), "rwkv_vocab_v20230424")
args = PIPELINE_ARGS(temperature=0, alpha_frequency=0, alpha_presence=0, token_stop=[0])
made = []
pipeline.decode = lambda ids: (made.clear(), made.extend(ids), "\\ufffd")[-1]
pipeline.generate(sys.argv[2], token_count=int(sys.argv[3]), args=args)
drawn = []
def choice(a, p):
    drawn.append(p)
    return 0
np.random.choice = choice
import torch
for logits, T, top_p in json.loads(sys.stdin.read()):
    pipeline.sample_logits(torch.tensor(logits), temperature=T, top_p=top_p)
json.dump({"made": made, "drawn": [p.tolist() for p in drawn]}, sys.stdout)
"""
CASES = [(1.0, 0.85), (0.7, 0.85), (1.5, 0.3), (2.0, 0.999), (1.0, 0.0), (0.05, 0.5), (0, 0.85)]


def sample_cases() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 3, (len(CASES), 300)).astype(np.float32)


def exact(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The distribution in float64: cut, then raise to 1/T."""
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    q = np.zeros_like(p)
    q[kept] = (p[kept] / p.max()) ** (1 / temperature)
    return q / q.sum()


@pytest.mark.torch
def test_the_rwkv_package_makes_the_same_choices(world):
    """Its greedy continuation of 60 tokens, and the probabilities that it hands to its dice."""
    rows = sample_cases()
    cases = [(row.tolist(), *case) for row, case in zip(rows, CASES, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, str(world.with_suffix("")), PROMPT, "60"],
        input=json.dumps(cases).encode(),
        env={**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    theirs = json.loads(done.stdout[done.stdout.index(b'{"made"') :])
    prompt = tokenizer.encode(PROMPT)
    ours = list(generation.generate(rwkv_jax.load(world), prompt, 60, temperature=0))
    assert ours == theirs["made"] and len(ours) == 60 and len(set(ours)) > 20
    for row, (temperature, top_p), p in zip(rows, CASES, theirs["drawn"], strict=True):
        if temperature == 0:
            assert np.flatnonzero(p).tolist() == [row.argmax()]
        else:
            q = jax.nn.softmax(generation.sampling_logits(jnp.asarray(row), temperature, top_p))
            np.testing.assert_allclose(q, p, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("case", range(len(CASES) - 1))
def test_probabilities_are_exact(case):
    row, (temperature, top_p) = sample_cases()[case], CASES[case]
    q = jax.nn.softmax(generation.sampling_logits(jnp.asarray(row), temperature, top_p))
    np.testing.assert_allclose(q, exact(row, temperature, top_p), rtol=1e-5, atol=1e-9)


def test_top_p_of_1_keeps_all_and_a_low_temperature_does_not_underflow():
    row = jnp.asarray(sample_cases()[0])
    assert jnp.isfinite(generation.sampling_logits(row, 1.0, 1.0)).all()
    cold = jax.nn.softmax(generation.sampling_logits(row - 50.0, 1e-4, 1.0))
    assert cold[jnp.argmax(row)] == 1 and jnp.sum(cold) == 1


def test_draws_follow_the_distribution_and_the_seed():
    model = rwkv_jax.load(ORACLE)
    prompt, options = [5, 6, 7], {"temperature": 0.3, "top_p": 0.6}
    first = [next(generation.generate(model, prompt, 1, seed=s, **options), 0) for s in range(200)]
    logits, _ = model.forward(jnp.asarray([prompt]))
    p = exact(np.asarray(logits[0, -1]), 0.3, 0.6)
    assert (p[first] > 0).all()
    likely = np.argsort(p)[-8:]
    seen = np.bincount(first, minlength=512)[likely] / 200
    assert 0.2 < p[likely].sum() < 0.99
    assert (np.abs(seen - p[likely]) < 5 * np.sqrt(p[likely] * (1 - p[likely]) / 200)).all()
    again = [list(generation.generate(model, prompt, 40, seed=s, **options)) for s in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


# ---------------------------------------------------------------------------------------- text


def test_a_character_is_never_broken():
    text = "naïve 龘𠮷 👩‍🚀!"
    ids = [byte + 1 for byte in text.encode()]  # a token a byte
    pieces = list(generation.decode_stream(ids))
    assert "".join(pieces) == text and len(pieces) == len(ids) + 1
    assert "\ufffd" not in "".join(pieces)
    cut = list(generation.decode_stream([*ids[:6], 0xE9 + 1]))  # ends inside a character
    assert "".join(cut) == "naïve\ufffd"
    assert "".join(generation.decode_stream([0xFF + 1, ord("x") + 1, 65535])) == "\ufffdx"


def test_the_command(world):
    options = ("--load_model", world, "--length", 20)
    greedy = command(*options, "--temperature", 0, "--prompt", PROMPT)
    assert greedy.returncode == 0, greedy.stderr.decode()
    ids = generation.generate(rwkv_jax.load(world), tokenizer.encode(PROMPT), 20, temperature=0)
    assert greedy.stdout.decode() == tokenizer.decode(list(ids)) + "\n"
    report = greedy.stderr.decode()
    assert report.startswith("[20 tokens, ") and report.endswith(" tokens/s]\n")

    drawn = command(*options, stdin=PROMPT.encode() + b"\n")
    assert drawn.returncode == 0 and drawn.stdout != greedy.stdout
    seed = int(drawn.stderr.decode().split("--seed ")[1].rstrip("]\n"))
    ids = generation.generate(rwkv_jax.load(world), tokenizer.encode(PROMPT), 20, seed=seed)
    assert drawn.stdout.decode() == tokenizer.decode(list(ids)) + "\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--load_model", "no.pth"], "no.pth: cannot be read: No such file or directory"),
        (["--load_model", str(ORACLE)], "has a vocabulary of 512, so it was not trained on"),
        (["--length", "0"], "--length 0: give 1 or more"),
        (["--temperature", "nan"], "--temperature nan: give a finite number"),
        (["--temperature", "inf"], "--temperature inf: give a finite number"),
        (["--top_p", "1.5"], "--top_p 1.5: give a number from 0 to 1"),
        (["--seed", "-1"], "--seed -1: give a number from 0 to 2147483647"),
    ],
)
def test_bad_input(options, complaint):
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        generation.main(["--load_model", "no.pth", "--prompt", "x", *options])
    assert complaint in str(caught.value)


def test_bad_input_ends_the_command_with_one_line(world):
    done = command("--load_model", world, stdin=b"abc\xff")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: standard input: is not UTF-8 at byte 3\n"
