"""The forward pass against the oracles: float64 logits and states that we did not compute."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rwkv_jax
from benchmarks import bf16_gradients
from rwkv_jax.config import ModelConfig
from rwkv_jax.model import rwkv7
from rwkv_jax.model.initialisation import init_params
from rwkv_jax.model.loss import head_loss
from rwkv_jax.model.rwkv7 import bind

# Each file and the oracle of its weights: the same bf16 model is there in four layouts.
FILES = {
    "init_fp32": "init_fp32",
    "rand_fp32": "rand_fp32",
    "rand_bf16": "rand_bf16",
    "rand_bf16_legacy": "rand_bf16",
    "rand_bf16_dsflat": "rand_bf16",
    "rand_bf16_nov0": "rand_bf16",
}
ATOL = 1e-4
TINY = ModelConfig(n_layer=2, n_embd=64, vocab_size=512)


def tiny_params(config: ModelConfig):
    """Weights at which every tensor matters: a fresh model's outputs and up projections are 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.05 * rng.standard_normal(leaf.shape), jnp.float32),
        init_params(config),
    )


def tiny_tokens(B: int, T: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, 512, (B, T)), jnp.int32)


def run(model, tokens: np.ndarray, pieces: list[int]):
    """tokens [T] cut into pieces of these lengths, the state carried: logits [T, V] and state."""
    logits, state = [], None
    for piece in np.split(tokens, np.cumsum(pieces)[:-1]):
        z, state = model.forward(jnp.asarray(piece[None], jnp.int32), state)
        assert z.dtype == jnp.float32 and state.wkv.dtype == jnp.float32
        logits.append(z[0])
    return np.concatenate(logits), state


def test_every_oracle_file_is_tested(oracles):
    assert {path.stem.removeprefix("tiny_v512_") for path in oracles.glob("*.pth")} == set(FILES)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("pieces", [[96], [1] * 96, [37, 59]], ids=["whole", "single", "two"])
@pytest.mark.slow
def test_logits_and_states_of_the_oracles(oracles, name, pieces):
    oracle = np.load(oracles / f"tiny_v512_{FILES[name]}.npz")
    model = rwkv_jax.load(oracles / f"tiny_v512_{name}.pth")
    logits, state = run(model, oracle["tokens"], pieces)
    check = functools.partial(np.testing.assert_allclose, rtol=0, atol=ATOL)
    check(logits, oracle["logits"])
    check(state.wkv[:, 0], oracle["state"])
    check(state.shift_att[:, 0], oracle["shift_att"])
    check(state.shift_ffn[:, 0], oracle["shift_ffn"])


def test_sequences_of_a_batch_do_not_meet(oracles):
    model = rwkv_jax.load(oracles / "tiny_v512_rand_fp32.pth")
    tokens = tiny_tokens(2, 96)
    logits, state = model.forward(tokens)
    for b in range(2):
        alone, alone_state = model.forward(tokens[b : b + 1])
        np.testing.assert_allclose(logits[b], alone[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(state.wkv[:, b], alone_state.wkv[:, 0], rtol=0, atol=1e-5)


def test_bfloat16_stays_near_float32(oracles):
    path = oracles / "tiny_v512_rand_bf16.pth"
    oracle = np.load(oracles / "tiny_v512_rand_bf16.npz")
    logits, state = run(rwkv_jax.load(path, "bfloat16"), oracle["tokens"], [96])
    assert state.shift_att.dtype == state.shift_ffn.dtype == jnp.bfloat16
    error = np.sqrt(np.mean((logits - oracle["logits"]) ** 2)) / np.std(oracle["logits"])
    assert 1e-4 < error < 0.02  # bf16 keeps 8 bits, 0.4 %: not float32, and not far from it


def test_one_layer():
    """Depth enters the initialisation as l/(L − 1), and later layers read v_first."""
    config = ModelConfig(n_layer=1, n_embd=64, vocab_size=512)
    params = jax.tree.map(jnp.asarray, init_params(config))
    logits, state = bind(config, params).forward(tiny_tokens(1, 17))
    assert logits.shape == (1, 17, 512) and state.wkv.shape == (1, 1, 1, 64, 64)
    assert all(bool(jnp.isfinite(x).all()) for x in (logits, *state))


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient():
    params, tokens = tiny_params(TINY), tiny_tokens(1, 17)

    def loss(remat, params, tokens):
        model = bind(TINY, params)
        hidden, _ = model.hidden(tokens[:, :-1], remat=remat)
        return head_loss(hidden, model.head.weight[...], tokens[:, 1:])

    plain, recomputed, between = (
        jax.jit(jax.value_and_grad(functools.partial(loss, remat)))
        .lower(params, tokens)
        .compile({"xla_backend_optimization_level": 0})
        for remat in (0, 1, 2)
    )
    for other in (recomputed, between):
        jax.tree.map_with_path(
            lambda path, a, b: np.testing.assert_allclose(
                a, b, rtol=0, atol=1e-6 * max(1.0, np.abs(a).max()), err_msg=str(path)
            ),
            plain(params, tokens),
            other(params, tokens),
        )
    # and these are other programs: the backward pass runs the blocks' forward, or a part, once more
    flops = [program.cost_analysis()["flops"] for program in (plain, between, recomputed)]
    assert flops[0] < flops[1] < 0.97 * flops[2] and flops[2] > 1.1 * flops[0]


def test_a_frequent_token_s_gradient_is_summed_in_float32():
    """3,000 times the same row: summed in bf16 it is off by several percent."""
    rng = np.random.default_rng(0)
    tokens = np.where(np.arange(3200) < 3000, 5, 1 + np.arange(3200) % 4)
    g = jnp.asarray(rng.standard_normal((1, 3200, 16)), jnp.bfloat16)

    def error(embed) -> np.ndarray:
        (ours,) = jax.vjp(embed, jnp.zeros((8, 16), jnp.bfloat16))[1](g)
        exact = np.zeros((8, 16))
        np.add.at(exact, tokens, np.float64(g[0]))
        assert ours.dtype == jnp.bfloat16
        return np.linalg.norm(np.float64(ours) - exact, axis=1) / np.linalg.norm(exact, axis=1)[5]

    assert (error(lambda w: rwkv7.embed(w, tokens[None])) < 0.003).all()
    assert error(lambda w: jnp.take(w, tokens[None], axis=0))[5] > 0.03


@pytest.mark.slow
def test_a_block_s_elementwise_arithmetic_rounds_once():
    """As in the official fused kernels: rounded one by one, these errors are 1 % and more."""
    with jax.numpy_dtype_promotion("standard"):
        errors = bf16_gradients.median_errors(width=64, batch=1, time=64, seeds=8)
    for name in ("att.r_k", "att.x_k", "att.x_a", "att.k_a"):
        assert 0.001 < errors[name] < 0.010, errors
