"""The chunked loss against the whole logits at once, and L2Wrap against its formula."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv_jax.model.loss import head_loss

B, T, C, V = 2, 12, 64, 512


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, T, C)), dtype)
    head = jnp.asarray(rng.standard_normal((V, C)) * 0.3, dtype)
    return hidden, head, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(jnp.einsum("btc,vc->btv", hidden, head), axis=-1)
    return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], axis=-1))


def l2wrap(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """A function whose gradient by the largest logit z of each token is z · 1e-4/(B·T)."""
    largest = jnp.max(jnp.einsum("btc,vc->btv", hidden, head), axis=-1)
    return 0.5e-4 * jnp.mean(jnp.square(largest))


def reference(hidden: jax.Array, head: jax.Array, targets: jax.Array):
    """(loss, (gradient of hidden, of head)) of the unchunked form."""
    value, ce = jax.value_and_grad(cross_entropy, (0, 1))(hidden, head, targets)
    return value, jax.tree.map(jnp.add, ce, jax.grad(l2wrap, (0, 1))(hidden, head))


@pytest.mark.parametrize("chunk", [0, 1, 5, 11, 100])
def test_chunks_change_nothing(chunk):
    hidden, head, targets = inputs()
    value, (d_hidden, d_head) = jax.value_and_grad(head_loss, (0, 1))(hidden, head, targets, chunk)
    expected, (e_hidden, e_head) = reference(hidden, head, targets)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(d_hidden, e_hidden, rtol=0, atol=1e-6)
    np.testing.assert_allclose(d_head, e_head, rtol=0, atol=1e-6)
    # without a gradient another path runs
    np.testing.assert_allclose(head_loss(hidden, head, targets, chunk), expected, rtol=1e-6)


def test_l2wrap_is_in_the_gradient_alone():
    """The gradient beyond cross-entropy's is z_max · 1e-4/(B·T) at the largest logit alone."""
    hidden, head, targets = inputs()
    hidden = 100 * hidden  # logits in the hundreds: L2Wrap's part stands clear of rounding
    z = np.einsum("btc,vc->btv", np.float64(hidden), np.float64(head))
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_ce = (p - np.eye(V)[np.asarray(targets)]) / (B * T)
    d_wrap = np.where(z == z.max(-1, keepdims=True), z * 1e-4 / (B * T), 0)
    assert np.count_nonzero(d_wrap) == B * T

    value, d_hidden = jax.value_and_grad(head_loss)(hidden, head, targets, 5)
    log_z = z.max(-1) + np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1))
    picked = np.take_along_axis(z, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(value, np.mean(log_z - picked), rtol=1e-5)
    np.testing.assert_allclose(d_hidden, (d_ce + d_wrap) @ np.float64(head), rtol=0, atol=1e-5)
    assert np.abs(d_wrap @ np.float64(head)).max() > 1e-3  # it would show


def test_only_the_first_of_equal_maxima_is_pulled():
    """With one token and hidden 1, the head's gradient is the logits' own."""
    z = jnp.zeros(8).at[jnp.array([2, 5, 7])].set(3.0)
    hidden, head = jnp.ones((1, 1, 1)), z[:, None]
    gradient = jax.grad(head_loss, 1)(hidden, head, jnp.zeros((1, 1), jnp.int32))[:, 0]
    expected = jax.nn.softmax(z).at[0].add(-1.0).at[2].add(3.0 * 1e-4)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-7)


def test_upstream_gradient_scales():
    hidden, head, targets = inputs()
    one = jax.grad(head_loss)(hidden, head, targets, 5)
    three = jax.grad(lambda *x: 3.0 * head_loss(*x, 5))(hidden, head, targets)
    np.testing.assert_allclose(three, 3 * one, rtol=1e-6)


def test_bfloat16_gradients_stay_bfloat16():
    args = inputs(jnp.bfloat16)
    value, grads = jax.value_and_grad(head_loss, (0, 1))(*args, 5)
    assert value.dtype == jnp.float32  # accumulated in float32, whatever the inputs
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
    exact, wide = reference(*(x.astype(jnp.float32) for x in args[:2]), args[2])
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    for got, expected in zip(grads, wide, strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=0, atol=0.01 * scale)


@pytest.mark.parametrize("chunk", [1, 4, 23, 24, 65536, 0])
def test_no_more_logits_than_a_chunk(chunk):
    """Of all tokens of the batch, as in the official trainer; no array is as large as V x more."""
    call = jax.jit(jax.grad(functools.partial(head_loss, chunk=chunk), (0, 1)))
    text = str(call.trace(*inputs()).jaxpr)
    sizes = [
        np.prod([int(n) for n in m.split(",")]) for m in re.findall(rf"f32\[([\d,]+,{V})\]", text)
    ]
    assert max(sizes) == min(chunk or B * T, B * T) * V
