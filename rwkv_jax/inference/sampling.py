"""From logits to a token, with the meaning and the defaults of the `rwkv` package.

Penalties lower the logits of tokens that were made before; top_p and top_k cut; temperature
flattens or sharpens what is left. It all runs on the device and sorts nothing: a cut is a threshold
on the probabilities, found by bisection.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rwkv_jax.errors import UserError
from rwkv_jax.text import tokenizer

Array = jax.Array


class Sampling(NamedTuple):
    """How tokens are chosen: the fields of the `rwkv` package's `PIPELINE_ARGS`."""

    temperature: float = 1.0  # 0: the likeliest token each time
    top_p: float = 0.85
    top_k: int = 0  # 0: no limit
    alpha_presence: float = 0.2
    alpha_frequency: float = 0.2
    alpha_decay: float = 0.996

    def checked(self) -> "Sampling":
        """The same as NumPy scalars: to a compiled loop they are arguments, not constants.

        Raises:
            UserError: a value out of its range.
        """
        with np.errstate(over="ignore"):  # what is not finite as float32 is refused
            values: dict[str, Any] = {name: np.float32(x) for name, x in self._asdict().items()}
        if not 0 <= values["temperature"] < math.inf:
            raise UserError(f"--temperature {self.temperature}: give a finite number, 0 or more")
        for name in ("top_p", "alpha_decay"):
            if not 0 <= values[name] <= 1:
                raise UserError(f"--{name} {getattr(self, name)}: give a number from 0 to 1")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"--top_k {self.top_k}: give 0 (no limit) or more")
        for name in ("alpha_presence", "alpha_frequency"):
            if not math.isfinite(values[name]):
                raise UserError(f"--{name} {getattr(self, name)}: give a finite number")
        return Sampling(**{**values, "top_k": np.int32(self.top_k)})


DEFAULT = Sampling()
GREEDY = Sampling(temperature=0, alpha_presence=0, alpha_frequency=0)


class Made(NamedTuple):
    """What penalties depend on: the tokens that each sequence has made (its prompt is not)."""

    seen: Array  # [B, V] bool
    counts: Array  # [B, V] float32, decaying; blanks and digits do not count

    @staticmethod
    def none(batch: int, vocab_size: int) -> "Made":
        shape = (batch, vocab_size)
        return Made(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))

    def add(self, tokens: Array, decay: Array) -> "Made":
        """With tokens [B], one a sequence."""
        rows = jnp.arange(tokens.size)
        weight = jnp.asarray(_count_weights()[: self.counts.shape[1]])
        return Made(
            self.seen.at[rows, tokens].set(True),
            (self.counts * decay).at[rows, tokens].add(weight[tokens]),
        )


@functools.cache
def _count_weights() -> np.ndarray:
    """[65536] what a token adds to its count: nothing for a piece of " \\t0123456789", else 1."""
    pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.VOCAB_SIZE)]
    return np.array([not (piece and piece in b" \t0123456789") for piece in pieces], np.float32)


def choose(logits: Array, made: Made, keys: Array, sampling: Sampling) -> Array:
    """The next token of each sequence: logits [B, V] float32, keys [B] → [B] int32."""
    penalty = sampling.alpha_presence + made.counts * sampling.alpha_frequency
    logits = logits - jnp.where(made.seen, penalty, 0.0)
    tokens = jax.lax.cond(
        sampling.temperature == 0,
        lambda: jnp.argmax(logits, axis=-1),
        lambda: jax.vmap(jax.random.categorical)(keys, sampling_logits(logits, sampling)),
    )
    return tokens.astype(jnp.int32)


def sampling_logits(logits: Array, sampling: Sampling) -> Array:
    """The logits of the distribution that a token is drawn from, -inf where that is 0.

    top_p cuts first: the fewest of the likeliest tokens are kept whose probabilities reach top_p
    together; then top_k keeps so many of the likeliest. Tokens just as likely as the last one kept
    stay as well. What is left is raised to 1/temperature and normalised: in logarithms, so that
    nothing underflows. (At top_p 1 all tokens stay. There the `rwkv` package keeps the likeliest
    alone whenever the rounded sum of all probabilities falls short of 1.)

    Args:
        logits: [..., V] float32.
        sampling: of a temperature above 0; its penalties are not applied here.
    """
    p = jax.nn.softmax(logits, axis=-1)

    def reach_top_p(kept: Array) -> Array:
        return jnp.sum(jnp.where(kept, p, 0.0), axis=-1) >= sampling.top_p

    def reach_top_k(kept: Array) -> Array:
        return jnp.sum(kept, axis=-1, dtype=jnp.int32) >= sampling.top_k

    cut = (sampling.top_p < 1) & (p < _threshold(p, reach_top_p))
    cut |= (sampling.top_k > 0) & (p < _threshold(p, reach_top_k))
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    return jnp.where(cut, -jnp.inf, scaled)


def _threshold(p: Array, enough: Callable[[Array], Array]) -> Array:
    """[..., 1]: the largest t for which `enough(p >= t)`, or 0; p [..., V] ≥ 0 float32.

    Floats that are not negative sort as their bits do, so 31 halvings find the very value.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        reached = enough(bits >= middle[..., None])
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    high = jnp.max(bits, axis=-1) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(high), high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)[..., None]
