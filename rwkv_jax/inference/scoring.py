"""Log-probabilities of documents under a model, in batches with few shapes."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rwkv_jax.errors import UserError
from rwkv_jax.model.rwkv7 import RWKV7, State

Array = jax.Array

TOKENS_PER_CALL = 2048  # in rows of one of the lengths below; this bounds the number of shapes
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)  # tokens of each document per call
HEAD_CHUNK = 128  # tokens whose logits exist at once
DOCUMENTS = 1024  # in memory at once; those of similar length form a batch


class Document(NamedTuple):
    """A document: its tokens and the spans that are scored."""

    ids: list[int]
    spans: list[tuple[int, int]]  # token ranges, one per answer; for text, all tokens
    nbytes: int = 0  # bytes of the text in the spans


class SpanScore(NamedTuple):
    """The model's score of a span, given token 0 and all tokens before it."""

    nats: float  # -log p of the span
    first: bool  # each of its tokens is the model's first choice


def score(model: RWKV7, documents: Sequence[Document]) -> Iterator[tuple[int, list[SpanScore]]]:
    """Yields (document number, one score per span), in any order.

    Each document starts from the zero state and, as in training, after a token 0. Memory does not
    depend on the lengths.

    Raises:
        UserError: a token id is outside the model's vocabulary.
    """
    V = model.config.vocab_size
    order = sorted(range(len(documents)), key=lambda number: len(documents[number].ids))
    graphdef, params = nnx.split(model)
    while order:
        T = _best_length([len(documents[number].ids) for number in order])
        B = TOKENS_PER_CALL // T
        group, order = order[:B], order[B:]
        longest = len(documents[group[-1]].ids)
        rows = np.zeros((B, 1 + longest + -longest % T), np.int32)
        scored = np.zeros((B, rows.shape[1] - 1), bool)
        for row, number in enumerate(group):
            rows[row, 1 : 1 + len(documents[number].ids)] = documents[number].ids
            for begin, end in documents[number].spans:
                scored[row, begin:end] = True
        if rows.max() >= V:
            raise UserError(f"token {rows.max()} is outside the model's vocabulary of {V}")
        state = model.initial_state(B)
        nats, first = np.zeros(scored.shape, np.float32), np.zeros(scored.shape, bool)
        for at in range(0, longest, T):
            piece = np.s_[:, at : at + T]
            tokens = rows[:, at : at + T + 1]
            *found, state = _score(graphdef, params, tokens, scored[piece], state)
            nats[piece], first[piece] = found
        for row, number in enumerate(group):
            yield (
                number,
                [
                    SpanScore(
                        float(nats[row, begin:end].sum(dtype=np.float64)),
                        bool(first[row, begin:end].all()),
                    )
                    for begin, end in documents[number].spans
                ],
            )


def _best_length(lengths: list[int]) -> int:
    """The T of `LENGTHS` with the fewest calls per token; `lengths` ascend.

    >>> _best_length([70] * 64), _best_length([70] * 16), _best_length([10_000])
    (32, 128, 2048)
    """

    def calls_per_token(T: int) -> float:
        group = lengths[: TOKENS_PER_CALL // T]
        return math.ceil(group[-1] / T) / max(sum(group), 1)

    return min(LENGTHS, key=calls_per_token)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graphdef, params, rows: Array, scored: Array, state: State
) -> tuple[Array, Array, State]:
    """-log p and first choice, [B, T], of the tokens after the first of rows [B, T+1], and the
    state.

    Only the tokens selected by `scored` [B, T] have a result, because the head costs as much as
    several layers.
    """
    model: RWKV7 = nnx.merge(graphdef, params)
    x, state = model.hidden(rows[:, :-1], state)
    x, targets = x.reshape(-1, x.shape[-1]), rows[:, 1:].reshape(-1)
    order = jnp.argsort(~scored.reshape(-1)).astype(jnp.int32)  # scored tokens first

    def chunk(index: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        at = jax.lax.dynamic_slice(order, (index * HEAD_CHUNK,), (HEAD_CHUNK,))
        z = jnp.einsum(
            "tc,vc->tv", x[at], model.head.weight[...], preferred_element_type=jnp.float32
        )
        target_z = jnp.take_along_axis(z, targets[at][:, None], axis=-1)[:, 0]
        nats = jax.nn.logsumexp(z, axis=-1) - target_z
        first = jnp.argmax(z, axis=-1).astype(targets.dtype) == targets[at]
        return results[0].at[at].set(nats), results[1].at[at].set(first)

    count = jnp.sum(scored, dtype=jnp.int32)
    zeros = jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)
    results = jax.lax.fori_loop(0, (count + HEAD_CHUNK - 1) // HEAD_CHUNK, chunk, zeros)
    nats, first = (each.reshape(scored.shape) for each in results)
    return nats, first, state


def in_groups(documents: Iterable[Document], limit: int) -> Iterator[list[Document]]:
    """Groups of `DOCUMENTS` documents, up to `limit` documents in total (0: all)."""
    group: list[Document] = []
    for number, document in enumerate(documents):
        if limit and number == limit:
            break
        group.append(document)
        if len(group) == DOCUMENTS:
            yield group
            group = []
    if group:
        yield group
