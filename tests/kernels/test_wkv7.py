"""WKV-7: the recurrence and the chunked XLA form, the entry's checks, and an outside opinion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.wkv7 import numerics, wkv7
from tests.support.wkv7_suite import CASES, NAMES, WKV7Suite, relative_error, truth


class TestReference(WKV7Suite):
    implementation = "reference"


@pytest.mark.slow
class TestXla(WKV7Suite):
    implementation = "xla"


@pytest.mark.torch
def test_recurrence_agrees_with_a_torch_loop():
    """The definition itself, written a second time from the equations in another framework."""
    import torch

    case = next(case for case in CASES if case.name == "reset")
    inputs, reset, cotangents = case.arrays()
    leaves = [torch.tensor(x, requires_grad=True) for x in inputs]
    r, w, k, v, a, b, state = leaves
    decay = torch.exp(-torch.exp(-torch.nn.functional.softplus(-w) - 0.5))
    outputs = []
    for t in range(case.time):
        state = torch.where(torch.tensor(reset[:, t])[:, None, None, None], 0.0, state)
        row = [x[:, t].unsqueeze(-2) for x in (decay, k, b)]
        removed = state @ a[:, t].unsqueeze(-1)
        state = state * row[0] + removed @ row[2] + v[:, t].unsqueeze(-1) @ row[1]
        outputs.append((state @ r[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(outputs, 1)
    torch.autograd.backward([y, state], [torch.tensor(x) for x in cotangents])
    theirs = [y.detach(), state.detach(), *(leaf.grad for leaf in leaves)]
    for name, x, ours in zip(NAMES, theirs, truth(case), strict=True):
        assert relative_error(x.numpy(), ours) < 1e-12, name


@pytest.mark.slow
def test_inverse_stays_exact_where_the_product_form_does_not():
    """All keys aligned, in-context learning rate 1, no decay: a·b = −1 for every pair."""
    length = 64
    m = -np.tril(np.ones((length, length)), -1)
    exact = np.linalg.inv(np.eye(length) - m)
    with jax.default_matmul_precision("highest"):
        power = product = jnp.asarray(m, jnp.float32)
        product = product + jnp.eye(length)
        for _ in range(5):  # (I + M)(I + M²)(I + M⁴)…
            power = power @ power
            product = product @ (jnp.eye(length) + power)
    ours = numerics.unit_lower_inverse(jnp.asarray(m, jnp.float32))
    assert relative_error(ours, exact) < 1e-6
    assert relative_error(product, exact) > 1.0


def _good() -> dict[str, jax.Array]:
    x = jnp.ones((2, 5, 3, 16))
    return {name: x for name in ("r", "w", "k", "v", "a", "b")}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": jnp.ones((2, 4, 3, 16))}, ValueError, r"k must have shape \(2, 5, 3, 16\).*4, 3"),
        ({"v": jnp.ones((2, 5, 3, 17))}, ValueError, r"v must be \[B,T,H,N\].*17"),
        ({"v": jnp.ones((5, 3, 16))}, ValueError, r"v must be \[B,T,H,N\]"),
        ({"v": jnp.ones((2, 0, 3, 16))}, ValueError, r"v must be \[B,T,H,N\]"),
        ({"a": jnp.ones((2, 5, 3, 16), jnp.bfloat16)}, TypeError, "a must have dtype float32"),
        ({"reset": jnp.ones((2, 5))}, TypeError, "reset must have dtype bool.*float32"),
        ({"reset": jnp.ones((2, 6), bool)}, ValueError, r"reset must have shape \(2, 5\)"),
        ({"initial_state": jnp.ones((2, 3, 16, 8))}, ValueError, "initial_state must have shape"),
        ({"initial_state": jnp.ones((2, 3, 16, 16), int)}, TypeError, "initial_state.*floating"),
        ({"implementation": "cuda"}, NotImplementedError, "'cuda'.*reference"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        wkv7(**(_good() | change))


def test_integer_inputs_are_refused():
    with pytest.raises(TypeError, match="floating"):
        wkv7(**{name: x.astype(int) for name, x in _good().items()})


@pytest.mark.slow
def test_decay_logits_may_be_wider_than_the_rest():
    arguments = {name: x.astype(jnp.bfloat16) for name, x in _good().items()}
    y = wkv7(**(arguments | {"w": jnp.ones((2, 5, 3, 16))}))
    assert y.dtype == jnp.bfloat16


def test_float32_products_are_exact_unless_asked_otherwise():
    """Of both passes; read off the program, since only GPUs and TPUs have less exact products."""

    def passes(x):
        y, vjp = jax.vjp(lambda x: wkv7(x, x, x, x, x, x, implementation="xla"), x)
        return vjp(y)

    def exact_products(dtype):
        program = str(jax.make_jaxpr(passes)(jnp.ones((1, 64, 1, 16), dtype)))
        products = program.count("dot_general[")
        return program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") / products

    assert exact_products(jnp.float32) == 1
    assert exact_products(jnp.bfloat16) < 0.8  # the decay's sums and the inverse stay exact
    with jax.default_matmul_precision("tensorfloat32"):
        assert exact_products(jnp.float32) < 0.8
