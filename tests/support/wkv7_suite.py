"""The tests that every implementation of WKV-7 passes: subclass `WKV7Suite`.

All inputs and cotangents are bfloat16 numbers, so that one float64 run of the recurrence is the
truth for every dtype an implementation is tried in.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.wkv7 import wkv7

NAMES = ("y", "final_state", "dr", "dw", "dk", "dv", "da", "db", "dinitial_state")
# Largest ‖x − truth‖/‖truth‖ of (y and the final state, each gradient).
BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (5e-3, 1e-2), "float16": (5e-3, 1e-2)}


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs by name: ordinary ones, with what is hostile about this case put in their place."""

    name: str
    batch: int = 2
    time: int = 150
    head: int = 2
    size: int = 64
    w: float | None = None  # one decay logit everywhere
    aligned_keys: bool = False  # one removal direction for all tokens, in-context learning rate 1
    state_scale: float = 1.0
    reset: tuple[tuple[int, ...], ...] | None = None  # positions in each sequence

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.time, self.head, self.size

    def arrays(self) -> tuple[list[np.ndarray], np.ndarray | None, list[np.ndarray]]:
        """(r, w, k, v, a, b, initial_state), reset and the cotangents of (y, final state)."""
        rng = np.random.default_rng(0)
        state_shape = (self.batch, self.head, self.size, self.size)
        r, w, k, v, kk = (rng.standard_normal(self.shape) for _ in range(5))
        rate = rng.uniform(size=self.shape)
        if self.w is not None:
            w = np.full(self.shape, self.w)
        if self.aligned_keys:
            kk, rate = np.broadcast_to(kk[:, :1], self.shape), np.ones(self.shape)
        kk = kk / np.linalg.norm(kk, axis=-1, keepdims=True)
        state = self.state_scale * rng.standard_normal(state_shape)
        inputs = [r, 3 * w - 1 if self.w is None else w, k, v, -kk, kk * rate, state]
        cotangents = [rng.standard_normal(self.shape), rng.standard_normal(state_shape)]
        reset = None
        if self.reset is not None:
            reset = np.zeros((self.batch, self.time), bool)
            for row, positions in zip(reset, self.reset, strict=True):
                row[list(positions)] = True
        return [_to_bfloat16(x) for x in inputs], reset, [_to_bfloat16(x) for x in cotangents]


CASES = [
    Case("ordinary"),
    Case("aligned_keys", aligned_keys=True, w=-8.0),
    Case("decay_at_floor", w=20.0),
    Case("decay_near_one", w=-20.0),
    Case("large_state", state_scale=1000.0),
    # Chunk edges (of 16, 32 and 64), insides, neighbours, the first and the last token.
    Case("reset", reset=((0, 16, 32, 64, 128), (5, 63, 64, 65, 100, 101, 149))),
    Case("one_token", time=1, size=32),
    Case("seventeen_tokens", time=17, size=16),
    Case("head_size_128", time=70, head=1, size=128),
    Case("long", batch=1, time=4096, size=16, head=1, w=-6.0),
]


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def relative_error(x, truth: np.ndarray) -> float:
    """‖x − truth‖/‖truth‖, in float64; just ‖x‖ where the truth is zero."""
    scale = np.linalg.norm(truth)
    return float(np.linalg.norm(np.asarray(x, np.float64) - truth) / (scale or 1.0))


# Most of the suite's time is LLVM's; these programs are compiled often and run once.
@partial(jax.jit, static_argnums=0, compiler_options={"xla_llvm_disable_expensive_passes": True})
def outputs_and_gradients(op, inputs, reset, cotangents):
    """The nine arrays of NAMES for `op(*inputs, reset=reset, return_state=True)`."""
    outputs, vjp = jax.vjp(lambda *x: op(*x, reset=reset, return_state=True), *inputs)
    return *outputs, *vjp(tuple(cotangents))


def recurrence(*inputs, **options):
    return wkv7(*inputs, implementation="reference", **options)


@cache
def truth(case: Case) -> list[np.ndarray]:
    """NAMES by the recurrence in float64."""
    with jax.enable_x64(True):
        inputs, reset, cotangents = jax.tree.map(jnp.asarray, case.arrays())
        return [np.asarray(x) for x in outputs_and_gradients(recurrence, inputs, reset, cotangents)]


def cast(case: Case, dtype: str) -> tuple[list[jax.Array], jax.Array | None, list[jax.Array]]:
    """The case's arrays in dtype, states and their cotangents in float32."""
    inputs, reset, (dy, dstate) = case.arrays()
    *tokens, state = inputs
    return (
        [*(jnp.asarray(x, dtype) for x in tokens), jnp.asarray(state, jnp.float32)],
        None if reset is None else jnp.asarray(reset),
        [jnp.asarray(dy, dtype), jnp.asarray(dstate, jnp.float32)],
    )


class WKV7Suite:
    """Subclass it and set `implementation`; override `op` to call it in a special way."""

    implementation: str

    @classmethod
    def op(cls, *inputs, **options):
        return wkv7(*inputs, implementation=cls.implementation, **options)

    @pytest.mark.parametrize(
        ("case", "dtype"),
        [
            pytest.param(case, dtype, id=f"{case.name}-{dtype}")
            for case in CASES
            for dtype in BOUNDS
            if dtype != "float16" or case.name in ("ordinary", "aligned_keys", "reset")
        ],
    )
    def test_agrees_with_the_float64_recurrence(self, case: Case, dtype: str):
        results = outputs_and_gradients(self.op, *cast(case, dtype))
        forward, gradient = BOUNDS[dtype]
        errors = {
            name: relative_error(x, true)
            for name, x, true in zip(NAMES, results, truth(case), strict=True)
        }
        bad = {
            name: error
            for name, error in errors.items()
            if not error <= (gradient if name.startswith("d") else forward)
        }
        assert not bad, f"{bad} in {errors}"

    def test_dtypes_of_the_results(self):
        inputs, _, _ = cast(Case("small", time=3, size=16), "bfloat16")
        y, final_state = jax.eval_shape(partial(self.op, return_state=True), *inputs)
        assert (y.dtype, final_state.dtype) == (jnp.bfloat16, jnp.float32)
        assert y.shape == inputs[3].shape and final_state.shape == inputs[6].shape

    def test_no_initial_state_is_zero(self):
        (*tokens, state), _, _ = cast(Case("small", time=20, size=16), "float32")
        op = jax.jit(self.op)
        zero = op(*tokens, jnp.zeros_like(state))
        np.testing.assert_array_equal(op(*tokens), zero)

    @pytest.mark.parametrize("first", [1, 64])
    def test_two_pieces_with_carried_state_are_one(self, first: int):
        case = Case("pieces", time=90, size=16)
        inputs, _, cotangents = cast(case, "float32")
        (*tokens, state), (dy, dstate) = inputs, cotangents
        head, tail = ([x[:, :first] for x in tokens], [x[:, first:] for x in tokens])

        @jax.jit
        def pieces(head, tail, state):
            def two(head, tail, state):
                y0, state = self.op(*head, state, return_state=True)
                y1, state = self.op(*tail, state, return_state=True)
                return jnp.concatenate([y0, y1], 1), state

            outputs, vjp = jax.vjp(two, head, tail, state)
            dhead, dtail, dinitial = vjp((dy, dstate))
            dtokens = (jnp.concatenate(pair, 1) for pair in zip(dhead, dtail, strict=True))
            return *outputs, *dtokens, dinitial

        whole = truth(case)
        for x, expected in zip(pieces(head, tail, state), whole, strict=True):
            assert relative_error(x, expected) < 1e-5

    def test_inside_vmap_checkpoint_and_scan(self):
        """Layers in a `lax.scan` under `jax.checkpoint`, mapped over two models, differentiated."""
        (*tokens, _), _, _ = cast(Case("layers", time=20, size=16), "float32")
        r, w, k, v, a, b = tokens

        def loss(op, w, v):
            layer = jax.checkpoint(lambda x, w: (x + op(r, w, k, x, a, b), None))
            return jnp.sum(jax.lax.scan(layer, v, w)[0] ** 2)

        layers = jnp.stack([w, w + 1, w - 1])
        models = jnp.stack([layers, -layers])
        ours, expected = (
            jax.jit(jax.vmap(jax.grad(partial(loss, op), (0, 1)), (0, None)))(models, v)
            for op in (self.op, recurrence)
        )
        for x, y in zip(ours, expected, strict=True):
            assert relative_error(x, np.asarray(y, np.float64)) < 1e-5
