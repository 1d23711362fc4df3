"""Generation: the tokens that a model's logits dictate, drawn as the rwkv package draws them."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from rwkv_jax import generate
from rwkv_jax.checkpoints import pth, weights
from rwkv_jax.config import ModelConfig
from rwkv_jax.device.precision import PRECISIONS, device_precision
from rwkv_jax.errors import UserError
from rwkv_jax.inference import decoder, generation
from rwkv_jax.inference.decoder import Decoder
from rwkv_jax.inference.generation import Reply, Text
from rwkv_jax.inference.sampling import (
    DEFAULT,
    GREEDY,
    Sampling,
    TokenHistory,
    sample,
    sampling_logits,
)
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.text import tokenizer

ORACLE = Path(__file__).parents[1] / "data" / "oracles" / "tiny_v512_rand_fp32.pth"
PROMPTS = [
    "User: 今天天气怎么样?\n\nAssistant:",
    "The Eiffel tower is in the city of",
    "从前有座山，",
]


@pytest.fixture(scope="module")
def tiny() -> Decoder:
    return Decoder(*rwkv_jax.load_params(ORACLE))


@pytest.fixture(scope="module")
def world_file(tmp_path_factory) -> Path:
    """An fp32 .pth with the World vocabulary whose every tensor matters, and which ends no text."""
    rng = np.random.default_rng(1)

    def lively(leaf: np.ndarray) -> np.ndarray:
        if leaf.ndim == 3 and not leaf.any():  # the matrices that a fresh model has at zero
            return rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape).astype(np.float32)
        return leaf

    params = jax.tree.map(lively, init_params(ModelConfig(n_layer=2, n_embd=64)))
    params["emb"]["weight"] = rng.normal(0, 1, params["emb"]["weight"].shape).astype(np.float32)
    params["head"]["weight"][0] = 0
    path = tmp_path_factory.mktemp("world") / "model.pth"
    weights.save_pth(path, params, np.float32)
    return path


@pytest.fixture(scope="module")
def world(world_file) -> Decoder:
    return generation.load_decoder(str(world_file))


def make_ids(decoder: Decoder, prompts: list[list[int]], length: int, sampling=GREEDY, seed=0):
    replies = [Reply() for _ in prompts]
    texts = [Text(unread=prompt) for prompt in prompts]
    for _ in generation.generate(decoder, texts, replies, length, sampling, seed):
        pass
    return [reply.ids for reply in replies]


# ---------------------------------------------------------------------------------- which tokens


def plain_greedy(model, prompt: list[int], length: int) -> list[int]:
    """No state: the whole text anew for each token (padded at the end, so as to compile once)."""
    tokens = list(prompt)
    for _ in range(length):
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        logits, _ = model.forward(jnp.asarray(padded))
        tokens.append(int(np.argmax(logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.slow
def test_greedy_is_the_plain_loop_and_ends_before_an_end_of_document(tiny, monkeypatch):
    prompt = np.random.default_rng(0).integers(1, 512, 22).tolist()
    model = rwkv_jax.load(ORACLE)
    expected = plain_greedy(model, prompt, 40)
    assert len(set(expected)) > 20
    end = expected.index(0) if 0 in expected else 40
    assert make_ids(tiny, [prompt], 40) == [expected[:end]]
    monkeypatch.setattr(decoder, "PREFILL_LENGTHS", (7, 1))
    assert make_ids(tiny, [prompt], 40) == [expected[:end]]

    # Swap the rows of 0 and of a token made late (in a later call): then that place is the end.
    last = max(range(20, end), key=lambda i: (expected[i] not in expected[:i], -i))
    swap = np.arange(512)
    swap[[0, expected[last]]] = swap[[expected[last], 0]]
    config, params = rwkv_jax.load_params(ORACLE)
    for name in ("head", "emb"):
        params[name]["weight"] = params[name]["weight"][swap]
    prompt = [swap[token] for token in prompt]
    wanted = [int(swap[token]) for token in expected[:last]]
    assert make_ids(Decoder(config, params), [prompt], 40) == [wanted]


@pytest.mark.slow
def test_a_batch_of_ragged_prompts_is_each_alone(world):
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    alone = [make_ids(world, [prompt], 24)[0] for prompt in prompts]
    assert make_ids(world, prompts, 24) == alone
    drawn = make_ids(world, prompts, 24, DEFAULT, seed=5)
    assert drawn[0] == make_ids(world, prompts[:1], 24, DEFAULT, seed=5)[0]
    assert make_ids(world, prompts, 24, DEFAULT)[0] != drawn[0]


def test_an_empty_prompt_begins_a_document(tiny):
    ids = make_ids(tiny, [[]], 5)
    assert ids[0] and ids == make_ids(tiny, [[0]], 5)
    read = tiny.prefill([5, 6])
    assert Text(read).prefill(tiny) is read  # and nothing is slipped in where it goes on
    with pytest.raises(ValueError, match="no tokens to read after a state"):
        tiny.prefill([], read[1])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_on_a_cpu_every_precision_is_the_same_program(precision):
    """XLA would widen narrow matrices anew for each call of it, for longer than a token takes."""

    def program(precision: str) -> str:
        small = Decoder(*rwkv_jax.load_params(ORACLE), precision)
        batch = small.batch([(jnp.zeros((1, 512)), small.initial_state())], seed=0)
        return decoder._generate.lower(
            small._graphdef, small._params, batch, np.int32(4), GREEDY.validated()
        ).as_text()

    assert program(precision) == program("fp32")


def test_decoding_is_the_model_and_bf16_is_near(tiny):
    """The state goes on where `RWKV7.forward` does; matrices in bf16 lose what bf16 loses."""
    tokens = np.random.default_rng(2).integers(1, 512, 20)
    model = rwkv_jax.load(ORACLE)
    expected, _ = model.forward(jnp.asarray(tokens[None]))
    got, states = tiny.prefill(tokens[:-1].tolist())
    np.testing.assert_allclose(got[0], expected[0, -2], rtol=0, atol=2e-5)
    got, _ = tiny.prefill(tokens[-1:].tolist(), states)
    np.testing.assert_allclose(got[0], expected[0, -1], rtol=0, atol=2e-5)
    narrow = Decoder(*rwkv_jax.load_params(ORACLE), "bf16")
    rounded, _ = narrow.prefill(tokens.tolist())
    scale = float(jnp.std(expected[0, -1]))
    assert 1e-4 * scale < float(jnp.abs(rounded[0] - expected[0, -1]).max()) < 0.1 * scale


THEIRS = """
import json, sys
import numpy as np
from rwkv.model import RWKV
from rwkv.utils import PIPELINE, PIPELINE_ARGS
pipeline = PIPELINE(RWKV(model=sys.argv[1], strategy="cpu fp32"), "rwkv_vocab_v20230424")
job = json.loads(sys.stdin.read())
greedy = []
for prompt, presence, frequency in job["greedy"]:
    args = PIPELINE_ARGS(temperature=0, alpha_frequency=frequency, alpha_presence=presence)
    made = []
    sample = pipeline.sample_logits
    def record(*a, **k):
        token = sample(*a, **k)
        made.append(token)
        return token
    pipeline.sample_logits = record
    pipeline.generate(prompt, token_count=job["length"], args=args)
    pipeline.sample_logits = sample
    greedy.append(made)
drawn = []
def choice(a, p):
    drawn.append(p)
    return 0
np.random.choice = choice
import torch
for logits, T, top_p, top_k in job["logits"]:
    pipeline.sample_logits(torch.tensor(logits), temperature=T, top_p=top_p, top_k=top_k)
json.dump({"greedy": greedy, "drawn": [p.tolist() for p in drawn]}, sys.stdout)
"""
CASES = [  # temperature, top_p, top_k
    (1.0, 0.85, 0),
    (0.7, 0.85, 0),
    (1.5, 0.3, 0),
    (2.0, 0.999, 0),
    (1.0, 0.0, 0),
    (0.05, 0.5, 0),
    (1.2, 0.9, 5),
    (1.0, 0.3, 200),
    (0, 0.85, 0),
]


def sample_cases() -> np.ndarray:
    return np.random.default_rng(3).normal(0, 3, (len(CASES), 300)).astype(np.float32)


def exact(logits: np.ndarray, temperature: float, top_p: float, top_k: int = 0) -> np.ndarray:
    """The distribution in float64: cut, then raise to 1/T."""
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    kept = kept[: top_k or None]
    q = np.zeros_like(p)
    q[kept] = (p[kept] / p.max()) ** (1 / temperature)
    return q / q.sum()


@pytest.mark.slow
@pytest.mark.torch
def test_the_rwkv_package_makes_the_same_choices(world, world_file):
    """Its greedy continuations of 200 tokens, penalties or not, and the probabilities that it hands
    to its dice."""
    rows = sample_cases()
    greedy = [(prompt, 0.0, 0.0) for prompt in PROMPTS] + [(PROMPTS[0], 0.2, 0.2)]
    job = {
        "length": 200,
        "greedy": greedy,
        "logits": [(row.tolist(), *case) for row, case in zip(rows, CASES, strict=True)],
    }
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, str(world_file.with_suffix(""))],
        input=json.dumps(job).encode(),
        env={**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    theirs = json.loads(done.stdout[done.stdout.index(b'{"greedy"') :])

    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert make_ids(world, prompts, 200) == theirs["greedy"][:3]
    penalised = make_ids(world, prompts[:1], 200, Sampling(temperature=0))
    assert penalised == theirs["greedy"][3:] and penalised[0] != theirs["greedy"][0]
    assert all(len(set(ids)) > 20 for ids in theirs["greedy"])
    for row, case, p in zip(rows, CASES, theirs["drawn"], strict=True):
        if case[0] == 0:
            assert np.flatnonzero(p).tolist() == [row.argmax()]
        else:
            q = jax.nn.softmax(sampling_logits(jnp.asarray(row), Sampling(*case).validated()))
            np.testing.assert_allclose(q, p, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------------------------------- sampling


@pytest.mark.slow
def test_probabilities_are_exact():
    rows = sample_cases()
    for row, case in zip(rows[:-1], CASES, strict=False):
        q = jax.nn.softmax(sampling_logits(jnp.asarray(row), Sampling(*case).validated()))
        np.testing.assert_allclose(q, exact(row, *case), rtol=1e-5, atol=1e-9)
    both = sampling_logits(jnp.asarray(rows[:2]), Sampling(*CASES[0]).validated())
    np.testing.assert_allclose(jax.nn.softmax(both)[1], exact(rows[1], *CASES[0]), rtol=1e-5)


def test_top_p_of_1_keeps_all_and_a_low_temperature_does_not_underflow():
    row = jnp.asarray(sample_cases()[0])
    assert jnp.isfinite(sampling_logits(row, Sampling(1.0, 1.0).validated())).all()
    cold = jax.nn.softmax(sampling_logits(row - 50.0, Sampling(1e-4, 1.0).validated()))
    assert cold[jnp.argmax(row)] == 1 and jnp.sum(cold) == 1


def test_penalties_decay_and_do_not_count_digits():
    word, digit = tokenizer.encode("city")[0], tokenizer.encode("12")[0]
    history = TokenHistory.empty(1, 65536)
    for token in (word, digit, word):
        history = history.add(jnp.array([token]), np.float32(0.5))
    assert history.counts[0, word] == 1 + 0.25 and history.counts[0, digit] == 0
    logits = np.zeros((1, 65536), np.float32)
    logits[0, [word, digit, 700]] = 3.0, 2.5, 2.0
    keys = jax.random.split(jax.random.key(0), 1)
    for presence, frequency, best in [(0, 0, word), (0, 0.5, digit), (1.5, 0, 700), (-1, 0, word)]:
        sampling = Sampling(0, 1, 0, presence, frequency, 0.5).validated()
        assert sample(jnp.asarray(logits), history, keys, sampling) == best


@pytest.mark.slow
def test_draws_follow_the_distribution_and_the_seed(tiny):
    prompt, sampling = [5, 6, 7], Sampling(0.3, 0.6, 0, 0, 0)
    first = [ids[0] for ids in make_ids(tiny, [prompt] * 200, 1, sampling)]
    logits, _ = tiny.prefill(prompt)
    p = exact(np.asarray(logits[0]), 0.3, 0.6)
    assert (p[first] > 0).all()
    likely = np.argsort(p)[-8:]
    seen = np.bincount(first, minlength=512)[likely] / 200
    assert 0.2 < p[likely].sum() < 0.99
    assert (np.abs(seen - p[likely]) < 5 * np.sqrt(p[likely] * (1 - p[likely]) / 200)).all()
    again = [make_ids(tiny, [prompt], 40, sampling, seed) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


# ---------------------------------------------------------------------------------------- text


def test_a_character_is_never_broken():
    text = "naïve 龘𠮷 👩‍🚀!"
    ids = [byte + 1 for byte in text.encode()]  # a token a byte
    reply = Reply()
    pieces = [reply.add([token]) for token in ids]
    assert "".join(pieces) == text == reply.text and "\ufffd" not in text
    cut = Reply()
    assert cut.add([*ids[:6], 0xE9 + 1]) + cut.finish() == "naïve\ufffd" == cut.text
    odd = Reply()
    assert odd.add([0xFF + 1, ord("x") + 1, 65535]) + odd.finish() == "\ufffdx"
    assert odd.add([70]) == "" and odd.text == "\ufffdx"


def test_stop_strings_are_held_back_and_left_out():
    ids = tokenizer.encode("one two\n") + tokenizer.encode("\n") + tokenizer.encode("User: x")
    reply = Reply(["\n\nUser:", "three"])
    pieces = [reply.add([token]) for token in ids]
    assert "".join(pieces) == "one two" == reply.text and reply.ended
    assert tokenizer.decode(reply.text_ids()) == "one two"
    near = Reply(["\n\nUser:"])
    shown = near.add(tokenizer.encode("a\n\nUse"))
    assert shown == "a" and near.finish() == "\n\nUse" and near.text == "a\n\nUse"
    inside = Reply(["ity"])  # begins inside the token "city"
    inside.add(tokenizer.encode("my city"))
    assert inside.text == "my c" and tokenizer.decode(inside.text_ids()) == "my c"
    ended = Reply(["x"])
    assert ended.add([66, 0, 67]) == "A" and ended.ended and ended.text_ids() == [66]


def test_half_a_character_is_kept_for_the_next():
    ids = [token + 1 for token in "好".encode()[:2]]  # ids of single bytes are the byte plus one
    reply = Reply()
    reply.add(ids)
    reply.finish()
    assert reply.text == "\ufffd" and reply.text_ids() == ids


@pytest.mark.slow
def test_chat_keeps_what_was_said(world, world_file, monkeypatch, capsys, tmp_path):
    """Its second reply is that to the whole conversation in the published form, each of whose
    tokens it has read once.
    """
    monkeypatch.setattr(sys, "stdin", io.StringIO("你好\n\n \nWhat is\t2?\n"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)  # another module's command may have set it
    prefill, taken = Decoder.prefill, []
    monkeypatch.setattr(
        Decoder, "prefill", lambda self, ids, *a: taken.extend(ids) or prefill(self, ids, *a)
    )
    options = ["--load_model", str(world_file), "--temperature", "0", "--length", "7"]
    generate.main([*options, "--chat", "--think", "short"])
    out = capsys.readouterr().out
    monkeypatch.undo()
    assert jax.config.values["jax_compilation_cache_dir"] == f"{tmp_path}/rwkv_jax/compiled"
    text, replies = "", []
    for message in ("你好", "What is\t2?"):
        text += f"User: {message} (think a bit)\n\nAssistant: <think"
        replies += generation.complete(world, [text], 7, Sampling(temperature=0))
        text += f"{replies[-1]}\n\n"
    assert tokenizer.decode(taken) + replies[-1] + "\n\n" == text
    assert out == "".join(f"<think{reply}\n" for reply in replies)


@pytest.mark.parametrize(
    ("think", "added", "begun"),
    [
        ("off", "", ""),
        ("on", " (think)", " <think"),
        ("short", " (think a bit)", " <think"),
        ("long", " (think a lot)", " <think"),
        ("fake", "", " <think>\n</think"),
        ("on-2025", " think", " <think"),
        ("short-2025", " think a bit", " <think"),
        ("long-2025", " think a lot", " <think"),
    ],
)
def test_chat_templates(think, added, begun):
    """Those of RWKV-LM's RWKV-v7/RWKV7-G1x-templates.txt, with a system prompt and without."""
    turn = f"User: a\nb{added}\n\nAssistant:{begun}"
    message = " a\n\n\nb\n"
    assert generation.chat_turn(message, think) == turn
    assert generation.chat_turn(message, think, first=False) == f"\n\n{turn}"
    assert generation.chat_turn(message, think, system="c\n \nd\n") == f"System: c\nd\n\n{turn}"


def chat(monkeypatch, model: Path, said: bytes, *options) -> None:
    """A chat whose standard input is in a locale that is not UTF-8."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), "ascii"))
    generate.main(
        ["--load_model", str(model), *GREEDILY, "--length", "3", "--chat", *map(str, options)]
    )


def test_the_system_prompt_comes_once_and_first(world_file, monkeypatch):
    turns = []
    monkeypatch.setattr(
        tokenizer,
        "encode",
        lambda text, encode=tokenizer.encode: turns.append(text) or encode(text),
    )
    chat(monkeypatch, world_file, b"a\nb\n", "--system", "Be brief.")
    assert turns == ["System: Be brief.\n\nUser: a\n\nAssistant:", "\n\nUser: b\n\nAssistant:"]


def test_a_line_that_is_no_message_is_skipped(world_file, monkeypatch, capsys, tmp_path):
    """Also one whose tokens the model does not know: the chat is that of the other lines."""
    unknown = tokenizer.encode("今")[0]
    prefill = Decoder.prefill

    def refusing(self, tokens, *state):
        if unknown in tokens:
            raise UserError("a token of the text is unknown")
        return prefill(self, tokens, *state)

    monkeypatch.setattr(Decoder, "prefill", refusing)
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    chat(monkeypatch, world_file, "é\nb\n".encode(), "--save_state", a)
    expected = capsys.readouterr().out
    said = "é\n".encode() + b"\xff\xfe b\n" + "今\nb\n".encode() + b"\xe4\xbd"
    chat(monkeypatch, world_file, said, "--save_state", b)
    shown = capsys.readouterr()
    assert shown.out == expected and a.read_bytes() == b.read_bytes()
    assert [line for line in shown.err.splitlines() if "skipped" in line] == [
        "note: not UTF-8; that line was skipped",
        "note: a token of the text is unknown; that line was skipped",
        "note: not UTF-8; that line was skipped",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, BrokenPipeError, UserError])
def test_what_was_said_before_an_error_is_saved(world_file, monkeypatch, tmp_path, error):
    """SystemExit is what SIGTERM becomes. Half a reply counts; of nothing, nothing is written."""
    state = tmp_path / "s.npz"
    generate_tokens, calls = Decoder.generate, []

    def failing(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error("now")
        return generate_tokens(self, *arguments)

    monkeypatch.setattr(Decoder, "generate", failing)
    with pytest.raises(error):
        chat(monkeypatch, world_file, b"a\n", "--save_state", state)
    monkeypatch.undo()

    decoder = generation.load_decoder(str(world_file))
    turn = Text().then(tokenizer.encode(generation.chat_turn("a")))
    reply = Reply()
    list(generation.generate(decoder, [turn], [reply], 1, GREEDY))
    logits, states = decoder.prefill(turn.unread)
    expected = decoder.prefill(reply.ids, states)
    saved = generation.load_state(state, decoder).read
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), saved, expected)

    before = state.read_bytes()
    monkeypatch.setattr(Decoder, "prefill", lambda *_: (_ for _ in ()).throw(error("now")))
    with pytest.raises(error):
        generate.main(
            ["--load_model", str(world_file), "--prompt", "a", "--save_state", str(state)]
        )
    assert state.read_bytes() == before


def test_arguments_in_a_locale_that_is_not_utf8():
    """LC_ALL=C without Python's coercion: the bytes come as surrogates."""
    escaped = os.fsencode("你好").decode("ascii", "surrogateescape")
    options = ["--load_model", "x", "--stop", escaped]
    args = generate._options([*options, "--prompt", escaped])
    assert (args.prompt, args.stop) == ("你好", ["你好"])
    assert generate._options([*options, "--chat", "--system", escaped]).system == "你好"


def test_the_weights_are_loaded_as_the_device_takes_them(world_file, monkeypatch):
    """At bf16, in half the memory; on a GPU before Ampere, in fp16."""
    peaks = {}
    for precision in ("fp32", "bf16", "fp16"):
        tracemalloc.start()
        monkeypatch.setattr(generation, "device_precision", lambda precision=precision: precision)
        decoder = generation.load_decoder(str(world_file))
        peaks[precision] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rounded = jnp.asarray(decoder._params["head"]["weight"], PRECISIONS[precision])
        assert (rounded.astype(jnp.float32) == decoder._params["head"]["weight"]).all()
    assert peaks["bf16"] < 0.6 * peaks["fp32"] and peaks["fp16"] < 0.6 * peaks["fp32"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for capability, expected in [((7, 5), "fp16"), ((8, 0), "bf16"), (None, "bf16")]:
        monkeypatch.setattr(
            "rwkv_jax.device.precision.current_compute_capability", lambda c=capability: c
        )
        assert device_precision() == expected


def test_a_state_is_gone_on_from(world_file, tmp_path, capsys):
    def run(*options) -> str:
        generate.main(["--load_model", str(world_file), *GREEDILY, *map(str, options)])
        return capsys.readouterr().out.removesuffix("\n")

    state = tmp_path / "a.npz"
    whole = run("--prompt", PROMPTS[1], "--length", 12)
    first = run("--prompt", PROMPTS[1], "--length", 5, "--save_state", state)
    assert first + run("--load_state", state, "--prompt", "", "--length", 7) == whole
    more = run("--load_state", state, "--prompt", " and", "--length", 7)
    assert more == run("--prompt", PROMPTS[1] + first + " and", "--length", 7)
    other = Decoder(*rwkv_jax.load_params(ORACLE))
    with pytest.raises(UserError, match="is another model's state: shift_att is float32 .2, 64."):
        generation.load_state(state, other)
    for content in (b"", b"PK\3\4", b"x" * 100):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(UserError, match="^[^\n]*b.npz: is neither a state of --save_state"):
            generation.load_state(tmp_path / "b.npz", other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


@pytest.fixture(scope="module")
def tuned(world_file, tmp_path_factory) -> dict:
    """A model, a tuned state of it, and the files with one: the state alone, beside its model."""
    folder, model = tmp_path_factory.mktemp("tuned"), pth.read(world_file)
    for name in ("blocks.0.att.output.weight", "blocks.1.att.output.weight"):
        model[name] = model[name] * np.float32(100)  # so that a state matters
    pth.write(folder / "model.pth", model)
    state = np.random.default_rng(2).normal(0, 3, (2, 1, 64, 64)).astype(np.float32)
    alone = {f"blocks.{layer}.att.time_state": rows for layer, rows in enumerate(state)}
    pth.write(folder / "alone.pth", alone)
    pth.write(folder / "beside.pth", {**model, **alone})
    files = {name: folder / f"{name}.pth" for name in ("model", "alone", "beside")}
    return {"state": state, **files}


@pytest.mark.slow
def test_texts_begin_in_a_tuned_state(tuned, tmp_path, monkeypatch, capsys):
    def run(*options) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        generate.main([*map(str, options), *GREEDILY, "--length", "6"])
        return capsys.readouterr().out

    (tmp_path / "p.txt").write_text(PROMPTS[1])
    plain = "--load_model", tuned["model"]
    for what in (["--prompt", ""], ["--chat"], ["--prompts", tmp_path / "p.txt"]):
        beside = run("--load_model", tuned["beside"], *what)
        assert beside == run(*plain, "--load_state", tuned["alone"], *what) != run(*plain, *what)

    # As the model itself goes on from such a state, whose rows are of the value.
    tokens = tokenizer.encode(PROMPTS[1])
    model = rwkv_jax.load(tuned["model"])
    state = model.initial_state(1)._replace(wkv=jnp.asarray(tuned["state"])[:, None])
    logits, _ = model.forward(jnp.asarray([tokens]), state)
    decoder = generation.load_decoder(str(tuned["beside"]))
    np.testing.assert_allclose(decoder.prefill(tokens)[0][0], logits[0, -1], rtol=0, atol=1e-4)
    expected = tokenizer.decode(make_ids(decoder, [tokens], 6)[0])
    assert run("--load_model", tuned["beside"], "--prompt", PROMPTS[1]) == expected + "\n"

    # What was said in it is saved and gone on from, as any text is.
    saved = tmp_path / "saved.npz"
    first = run("--load_model", tuned["beside"], "--prompt", PROMPTS[1], "--save_state", saved)
    more = run(*plain, "--load_state", saved, "--prompt", "")
    whole = tokenizer.decode(make_ids(decoder, [tokens], 12)[0])
    assert first[:-1] + more[:-1] == whole


@pytest.mark.torch
@pytest.mark.slow
def test_the_rwkv_package_begins_in_the_same_state(tuned):
    """In which RWKV Runner puts it: `blocks.N.att.time_state` as it is, for RWKV-7."""
    script = """if True:
        import json, sys, torch
        from rwkv.model import RWKV
        model = RWKV(model=sys.argv[1], strategy="cpu fp32")
        state = model.generate_zero_state()
        for name, tensor in torch.load(sys.argv[2]).items():
            state[3 * int(name.split(".")[1]) + 1] = tensor.float()
        print(model.forward(json.loads(sys.argv[3]), state)[0].tolist())"""
    tokens = tokenizer.encode(PROMPTS[0])
    done = subprocess.run(
        [sys.executable, "-c", script, tuned["model"].with_suffix(""), tuned["alone"], str(tokens)],
        env={**os.environ, "RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours, _ = generation.load_decoder(str(tuned["beside"])).prefill(tokens)
    np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=2e-4)


def test_a_tuned_state_of_another_model_is_refused(world, world_file, tuned, tmp_path):
    state = pth.read(tuned["alone"])
    nan = {name: tensor * np.float32(np.nan) for name, tensor in state.items()}
    one = {name: tensor for name, tensor in state.items() if ".0." in name}
    wide = {name: np.zeros((2, 32, 32), np.float32) for name in state}
    for tensors, complaint in [
        (nan, "blocks.0.att.time_state: 4,096 of 4,096 values are not finite"),
        (one, "[1, 64, 64] for each of 2 layers: there are 1, blocks.0.att.time_state [1, 64, 64]"),
        (wide, "2 layers: there are 2, blocks.0.att.time_state [2, 32, 32]"),
        (pth.read(world_file), "x.pth: is not a tuned state of this model"),
        (
            {**state, "blocks.2.att.time_state": state["blocks.0.att.time_state"]},
            "2 layers: there are 3, ",
        ),
    ]:
        pth.write(tmp_path / "x.pth", tensors)
        with pytest.raises(UserError, match="x.pth: [^\n]*$") as caught:
            generation.load_state(tmp_path / "x.pth", world)
        assert complaint in str(caught.value)
    (tmp_path / "x.pth").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="x.pth: is not a .pth"):
        generation.load_state(tmp_path / "x.pth", world)
    assert world.tuned is None


def test_logits_that_are_not_finite_end_it(tmp_path):
    """Weights are finite, but more than float32 holds comes of them."""
    params = init_params(ModelConfig(n_layer=1, n_embd=64, vocab_size=512))
    params["head"]["weight"][:] = 3e38
    params["ln_out"]["weight"][:] = 3e38
    weights.save_pth(tmp_path / "x.pth", params, np.float32)
    with pytest.raises(UserError, match="^the model's logits are not finite .*--precision[^\n]*$"):
        generate.main(["--load_model", str(tmp_path / "x.pth"), "--prompt", "a"])


GREEDILY = ["--temperature", "0", "--alpha_presence", "0", "--alpha_frequency", "0"]


@pytest.mark.slow
def test_prompts_of_a_file(world, world_file, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("\r\n".join(PROMPTS[1:]) + "\n\n", encoding="utf-8")
    lines = [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, prompts in (("p.txt", PROMPTS[1:]), ("p.jsonl", PROMPTS)):
        options = ["--prompts", str(tmp_path / name), "--length", "6", *GREEDILY]
        generate.main(["--load_model", str(world_file), *options])
        made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [record["prompt"] for record in made] == prompts
        assert [record["text"] for record in made] == generation.complete(world, prompts, 6, GREEDY)


@pytest.mark.slow
def test_the_command(world, world_file):
    """In a process of its own: what it writes where, and a seed that brings a text back."""
    done = subprocess.run(
        [sys.executable, "-m", "rwkv_jax.generate", "--load_model", world_file, "--length", "20"],
        input=PROMPTS[0].encode() + b"\n",
        capture_output=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    report = done.stderr.decode()
    assert done.returncode == 0 and report.startswith("[20 tokens, "), report
    seed = int(report.split(" tokens/s, --seed ")[1].rstrip("]\n"))
    expected = generation.complete(world, PROMPTS[:1], 20, seed=seed)
    assert done.stdout.decode() == expected[0] + "\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "no.pth: cannot be read: No such file or directory"),
        (["--length", "0"], "--length 0: give 1 or more"),
        (["--temperature", "nan"], "--temperature nan: give a finite number"),
        (["--temperature", "inf"], "--temperature inf: give a finite number"),
        (["--temperature", "1e300"], "--temperature 1e+300: give a finite number"),
        (["--top_p", "1.5"], "--top_p 1.5: give a number from 0 to 1"),
        (["--top_k", "-1"], "--top_k -1: give 0 (no limit) or more"),
        (["--alpha_presence", "inf"], "--alpha_presence inf: give a finite number"),
        (["--alpha_decay", "2"], "--alpha_decay 2.0: give a number from 0 to 1"),
        (["--seed", "-1"], "--seed -1: give a number from 0 to 2147483647"),
        (["--think", "on"], "--think needs --chat"),
        (["--system", "x"], "--system needs --chat"),
        (["--prompt", "\udcff"], "--prompt: is not UTF-8"),
        (["--stop", "\udcff"], "--stop: is not UTF-8"),
        (["--save_state", "none/s.npz"], "none/s.npz: cannot write: No such file"),
        (["--save_state", "."], ".: cannot write: it is not a regular file"),
        (["--load_state", "no.npz", "--load_model", str(ORACLE)], "no.npz: cannot read: No such"),
        (["--prompt", "今", "--load_model", str(ORACLE)], "token 10381 is outside"),
    ],
)
def test_bad_input(options, complaint):
    with pytest.raises(UserError, match="^[^\n]*$") as caught:
        generate.main(["--load_model", "no.pth", "--prompt", "x", *options])
    assert complaint in str(caught.value)


def test_a_system_prompt_begins_a_chat(world, world_file, monkeypatch, tmp_path):
    generation.save_state(tmp_path / "s.npz", Text(), world)
    with pytest.raises(UserError, match="^--system starts a chat"):
        chat(monkeypatch, world_file, b"", "--load_state", tmp_path / "s.npz", "--system", "x")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "P.JSONL"])
def test_lines_of_prompts_end_at_line_feeds_alone(name, tmp_path):
    prompts = ["a\u2028b\u2029c", "d\x0ce\x0bf\x1cg", "h\u0085i\rj"]
    lines = (
        prompts
        if name == "p.txt"
        else [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    )
    (tmp_path / name).write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert generate._read_prompts(tmp_path / name) == prompts


def test_bad_files_of_prompts(tmp_path):
    for content, complaint in [
        (b"\n \n", "has no prompts"),
        (b"a\xff", "byte 1 is not UTF-8"),
        (
            b'{"prompt": "a"}\n{"text": "b"}',
            ':2: is not {"prompt": "…"}: it has no string "prompt"',
        ),
        (b'{"prompt": "a"}\r\n{"prompt": "\\ud83d"}', ":2: character 0 of the text, '\\ud83d'"),
        (b"{", ":1: is not valid JSON"),
    ]:
        (tmp_path / "p.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="^[^\n]*$") as caught:
            generate.main(["--load_model", "no.pth", "--prompts", str(tmp_path / "p.jsonl")])
        assert complaint in str(caught.value)
    with pytest.raises(UserError, match="there is no single state"):
        generate.main(["--load_model", "x", "--prompts", "p", "--save_state", "s"])
