"""Groups, schedule and update of the optimizer, against the specification's own words."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rwkv_jax.checkpoints.weights import official_shapes
from rwkv_jax.config import ModelConfig, TrainConfig
from rwkv_jax.model.rwkv7 import abstract_params
from rwkv_jax.training.optimizer import (
    adam,
    clip,
    has_double_rate,
    is_decayed,
    learning_rate,
    make_optimizer,
)

TINY = ModelConfig(n_layer=2, n_embd=64, vocab_size=512)

# Official name → treatment: the specification's table, line by line.
GROUPS = {
    r"emb\.weight": "decay",
    r"blocks\.0\.ln0\.(weight|bias)": "1x",
    r"blocks\.\d+\.ln[12]\.(weight|bias)": "1x",
    r"blocks\.\d+\.att\.x_[rwkvag]": "1x",
    r"blocks\.\d+\.att\.w0": "2x",
    r"blocks\.\d+\.att\.w[12]": "1x",
    r"blocks\.\d+\.att\.a[012]": "1x",
    r"blocks\.\d+\.att\.v[012]": "1x",
    r"blocks\.\d+\.att\.g[12]": "1x",
    r"blocks\.\d+\.att\.k_[ka]": "1x",
    r"blocks\.\d+\.att\.r_k": "1x",
    r"blocks\.\d+\.att\.(receptance|key|value|output)\.weight": "decay",
    r"blocks\.\d+\.att\.ln_x\.(weight|bias)": "1x",
    r"blocks\.\d+\.ffn\.x_k": "1x",
    r"blocks\.\d+\.ffn\.(key|value)\.weight": "decay",
    r"ln_out\.(weight|bias)": "1x",
    r"head\.weight": "decay",
}


def our_path(name: str) -> tuple[str, ...]:
    return tuple(re.sub(r"^blocks\.0\.(?=ln0)|(?<=^blocks\.)\d+\.", "", name).split("."))


def leaf(tree, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


# One layer too: a stack of one must not read as a dimension that is not there.
@pytest.mark.parametrize("n_layer", [1, 2])
def test_groups_of_every_tensor(n_layer):
    config = dataclasses.replace(TINY, n_layer=n_layer)
    params, seen = abstract_params(config), set()
    for name in official_shapes(config):
        [group] = {g for pattern, g in GROUPS.items() if re.fullmatch(pattern, name)}
        path = our_path(name)
        ndim = leaf(params, path).ndim
        assert is_decayed(path, ndim) == (group == "decay"), name
        assert has_double_rate(path) == (group == "2x"), name
        seen.add(path)
    assert len(seen) == len(jax.tree.leaves(params))  # no tensor of ours is left out


def rate_of_specification(
    step: int, updates: int, warmup: int, exit_step: float, lr_init: float, lr_final: float
) -> float:
    f = lr_final / lr_init
    progress = min(max((step - warmup) / (exit_step - warmup), 0.0), 1.0)
    rate = lr_init * ((0.5 + f / 2) + (0.5 - f / 2) * math.cos(math.pi * progress))
    return rate * (0.01 + 0.99 * updates / warmup) if updates < warmup else rate


@pytest.mark.parametrize("first_step", [0, 5, 700])
@pytest.mark.parametrize("warmup", [0, 10, 300])
def test_schedule(first_step, warmup):
    exit_step = 1000.5  # not rounded
    config = TrainConfig(lr_init=6e-4, lr_final=6e-5, warmup_steps=warmup)
    ours = learning_rate(config, 768, first_step, exit_step)
    updates = [0, 1, 2, 9, 10, 11, 150, 299, 300, 301, 500, 999, 1000, 1001, 1002, 5000]
    expected = [
        rate_of_specification(first_step + n, n, warmup, exit_step, 6e-4, 6e-5) for n in updates
    ]
    np.testing.assert_allclose(ours(jnp.array(updates)), expected, rtol=1e-6)


def test_schedule_of_the_reference_run():
    """0.1b, 1,498,226,207 tokens in batches of 16 · 512: from 1 % to the peak and down to 6e-5."""
    ours = learning_rate(
        TrainConfig(lr_init=6e-4, lr_final=6e-5), 768, 0, 1_498_226_207 / (16 * 512)
    )
    assert float(ours(0)) == pytest.approx(6e-6)
    assert float(ours(10)) == pytest.approx(6e-4)
    assert float(ours(91_450)) == pytest.approx(3.3e-4, rel=1e-3)  # half-way, half-way down
    assert float(ours(182_889)) == pytest.approx(6e-5)


@pytest.mark.parametrize("n_embd", [768, 4096])
def test_default_rates_follow_the_width(n_embd):
    ours = learning_rate(TrainConfig(warmup_steps=0), n_embd, 0, 100)
    assert float(ours(0)) == pytest.approx(0.45 / n_embd)
    assert float(ours(100)) == pytest.approx(0.04 / n_embd)


def test_a_run_that_begins_and_ends_in_its_warmup():
    ours = learning_rate(TrainConfig(lr_init=1.0, lr_final=0.1), 64, 0, 4.0)
    rates = [float(ours(n)) for n in range(5)]
    assert np.all(np.isfinite(rates)) and np.all(np.diff(rates) > 0)


def adamw_by_hand(params, gradients, config: TrainConfig, rates: list[float]):
    """All updates in float64, tensor by official treatment; returns the parameters after each."""
    params = {name: np.float64(p) for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    after = []
    for t, (grads, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        norm = math.sqrt(sum(float(np.sum(np.float64(g) ** 2)) for g in grads.values()))
        clip = min(1.0, config.grad_clip / norm) if config.grad_clip else 1.0
        for name, p in params.items():
            g = np.float64(grads[name]) * clip
            m[name] = config.beta1 * m[name] + (1 - config.beta1) * g
            v[name] = config.beta2 * v[name] + (1 - config.beta2) * g * g
            m_hat, v_hat = m[name] / (1 - config.beta1**t), v[name] / (1 - config.beta2**t)
            rate = 2 * lr if name == "att.w0" else lr
            decay = config.weight_decay if name in ("emb", "att.key") else 0.0
            params[name] = p - rate * m_hat / (np.sqrt(v_hat) + config.adam_eps) - rate * decay * p
        after.append(params)
        params = dict(params)
    return after


@pytest.mark.parametrize("grad_clip", [1.0, 0.0])
@pytest.mark.parametrize("adam_eps", [1e-18, 0.03])
@pytest.mark.slow
def test_updates_by_hand(grad_clip, adam_eps):
    """Clip, moments, bias correction, ε outside the root, decoupled decay, and 2x for w0."""
    config = TrainConfig(grad_clip=grad_clip, adam_eps=adam_eps, weight_decay=0.1)
    rates = [0.01, 0.02, 0.005]
    rng = np.random.default_rng(0)

    def draw(scale: float) -> dict[str, np.ndarray]:
        shapes = {"emb": (8, 4), "att.w0": (2, 4), "att.key": (2, 4, 4), "ln_x": (2, 4)}
        return {n: np.float32(scale * rng.standard_normal(s)) for n, s in shapes.items()}

    def tree(flat: dict[str, np.ndarray]):
        att = {"w0": flat["att.w0"], "key": {"weight": flat["att.key"]}}
        att["ln_x"] = {"weight": flat["ln_x"]}
        nested = {"emb": {"weight": flat["emb"]}, "blocks": {"att": att}}
        return jax.tree.map(jnp.asarray, nested)

    # Norms about 40, 0.2 and 4e-14: clipped, left alone, and far below the usual ε of 1e-8.
    start, gradients = draw(1.0), [draw(5.0), draw(0.02), draw(5e-15)]
    optimizer = make_optimizer(config, lambda count: jnp.array(rates)[count])
    params, state = tree(start), optimizer.init(tree(start))
    for grads, expected in zip(
        gradients, adamw_by_hand(start, gradients, config, rates), strict=True
    ):
        with jax.numpy_dtype_promotion("standard"):  # optax adds its Python floats as arrays
            norm = optax.tree.norm(tree(grads))
            updates, state = optimizer.update(
                tree(grads), state, params, norm=norm, skip=jnp.bool(False)
            )
        params = optax.apply_updates(params, updates)
        jax.tree.map_with_path(
            lambda path, ours, theirs: np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=2e-6, err_msg=str(path)
            ),
            params,
            tree(expected),
        )


def test_a_vanishing_gradient_still_moves_by_the_rate():
    """With ε = 1e-18 the first step is the rate itself for gradients down to 1e-15."""
    config = TrainConfig(weight_decay=0.0)
    params = {"ln_out": {"bias": jnp.zeros(3)}}
    optimizer = make_optimizer(config, lambda count: 0.5)
    grads = {"ln_out": {"bias": jnp.array([1e-15, -1e-12, 1e-6])}}
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(
            grads,
            optimizer.init(params),
            params,
            norm=optax.tree.norm(grads),
            skip=jnp.bool(False),
        )
    np.testing.assert_allclose(updates["ln_out"]["bias"], [-0.5, 0.5, -0.5], rtol=2e-3)


def test_moments_are_float32_for_every_tensor():
    state = jax.eval_shape(
        make_optimizer(TrainConfig(), lambda count: 1.0).init, abstract_params(TINY)
    )
    moments = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(abstract_params(TINY)))
    assert {x.dtype for x in moments} == {jnp.dtype("float32")}


def test_adam_and_clipping_are_optax_s():
    rng = np.random.default_rng(0)
    ours = optax.chain(clip(1.0), adam(0.9, 0.99, 1e-18))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.99, 1e-18))
    params = {"a": jnp.zeros((4, 5)), "b": jnp.zeros(3)}
    state, expected_state = ours.init(params), theirs.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for scale in [3.0, 1e-3, 0.5, 1e-9]:
            grads = {
                n: jnp.float32(scale * rng.standard_normal(p.shape)) for n, p in params.items()
            }
            norm = optax.tree.norm(grads)
            updates, state = ours.update(grads, state, norm=norm, skip=jnp.bool(False))
            expected, expected_state = theirs.update(grads, expected_state)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=0),
                (updates, state),
                (expected, expected_state),
            )
        bad = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan), params)
        _, after = ours.update(bad, state, norm=jnp.nan, skip=jnp.bool(True))
    jax.tree.map(np.testing.assert_array_equal, after, state)
