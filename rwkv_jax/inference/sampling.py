"""From logits to a token, with the semantics and defaults of the `rwkv` package.

Penalties lower the logits of tokens already generated; top_p and top_k truncate the distribution;
temperature flattens or sharpens the rest. Everything runs on the device without sorting: a
truncation is a threshold on the probabilities, found by bisection.
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
    """Sampling options: the fields of the `rwkv` package's `PIPELINE_ARGS`."""

    temperature: float = 1.0  # 0: always the most likely token
    top_p: float = 0.85
    top_k: int = 0  # 0: no limit
    alpha_presence: float = 0.2
    alpha_frequency: float = 0.2
    alpha_decay: float = 0.996

    def validated(self) -> "Sampling":
        """The same options as NumPy scalars, which are arguments of a compiled loop, not constants.

        Raises:
            UserError: a value is out of its range.
        """
        with np.errstate(over="ignore"):  # values that are not finite as float32 are refused
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


class TokenHistory(NamedTuple):
    """The generated tokens that penalties depend on (the prompt is not counted)."""

    seen: Array  # [B, V] bool
    counts: Array  # [B, V] float32, decaying; blanks and digits do not count

    @staticmethod
    def empty(batch: int, vocab_size: int) -> "TokenHistory":
        shape = (batch, vocab_size)
        return TokenHistory(jnp.zeros(shape, bool), jnp.zeros(shape, jnp.float32))

    def add(self, tokens: Array, decay: Array) -> "TokenHistory":
        """Adds tokens [B], one per sequence."""
        rows = jnp.arange(tokens.size)
        weight = jnp.asarray(_count_weights()[: self.counts.shape[1]])
        return TokenHistory(
            self.seen.at[rows, tokens].set(True),
            (self.counts * decay).at[rows, tokens].add(weight[tokens]),
        )


@functools.cache
def _count_weights() -> np.ndarray:
    """[65536] the increment of a token's count: 0 for the pieces of " \\t0123456789", else 1."""
    pieces = [tokenizer.decode_bytes([token]) for token in range(tokenizer.VOCAB_SIZE)]
    return np.array([not (piece and piece in b" \t0123456789") for piece in pieces], np.float32)


def sample(logits: Array, history: TokenHistory, keys: Array, sampling: Sampling) -> Array:
    """Samples the next token of each sequence: logits [B, V] float32, keys [B] → [B] int32."""
    penalty = sampling.alpha_presence + history.counts * sampling.alpha_frequency
    logits = logits - jnp.where(history.seen, penalty, 0.0)
    tokens = jax.lax.cond(
        sampling.temperature == 0,
        lambda: jnp.argmax(logits, axis=-1),
        lambda: jax.vmap(jax.random.categorical)(keys, sampling_logits(logits, sampling)),
    )
    return tokens.astype(jnp.int32)


def sampling_logits(logits: Array, sampling: Sampling) -> Array:
    """The logits of the distribution that a token is drawn from; -inf for probability 0.

    top_p is applied first: it keeps the smallest set of most likely tokens whose total probability
    reaches top_p. top_k then keeps at most that many. Ties with the last token are kept. The rest
    is raised to 1/temperature and normalised, in logarithms so that nothing underflows. (At top_p 1
    all tokens stay. There the `rwkv` package keeps only the most likely token if the rounded sum of
    all probabilities is less than 1.)

    Args:
        logits: [..., V] float32.
        sampling: with a temperature above 0; its penalties are not applied here.
    """
    p = jax.nn.softmax(logits, axis=-1)

    def reach_top_p(mask: Array) -> Array:
        return jnp.sum(jnp.where(mask, p, 0.0), axis=-1) >= sampling.top_p

    def reach_top_k(mask: Array) -> Array:
        return jnp.sum(mask, axis=-1, dtype=jnp.int32) >= sampling.top_k

    removed = (sampling.top_p < 1) & (p < _threshold(p, reach_top_p))
    removed |= (sampling.top_k > 0) & (p < _threshold(p, reach_top_k))
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampling.temperature
    return jnp.where(removed, -jnp.inf, scaled)


def _threshold(p: Array, enough: Callable[[Array], Array]) -> Array:
    """[..., 1]: the largest t for which `enough(p >= t)`, or 0; p [..., V] ≥ 0 float32.

    Non-negative floats sort like their bit patterns, so 31 bisection steps find the exact value.
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
