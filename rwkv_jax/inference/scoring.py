"""Log-probabilities of documents under a model, in batches of few shapes."""

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

CALL = 2048  # tokens a call, in rows of a length below: so many shapes are compiled at most
PIECES = (32, 64, 128, 256, 512, 1024, 2048)  # tokens of each document a call
HEAD_CHUNK = 128  # tokens whose logits exist at once
DOCUMENTS = 1024  # in memory at once; of these, such of like length go together


class Document(NamedTuple):
    """Tokens, which of them count, and what they are: all that a task asks about."""

    ids: list[int]
    spans: list[tuple[int, int]]  # of tokens that are an answer each; for text, the whole
    nbytes: int = 0  # of the text that the spans hold


class Answer(NamedTuple):
    """What the model makes of a span, after token 0 and all tokens before it."""

    nats: float  # -log p of it
    first: bool  # each of its tokens is the model's first choice


def score(model: RWKV7, documents: Sequence[Document]) -> Iterator[tuple[int, list[Answer]]]:
    """(number of the document, an answer a span), in whatever order suits.

    Each document begins with the state of none and, as in training, after a token 0. Memory does
    not depend on their lengths.

    Raises:
        UserError: an id that the model does not know.
    """
    V = model.config.vocab_size
    order = sorted(range(len(documents)), key=lambda number: len(documents[number].ids))
    graphdef, params = nnx.split(model)
    while order:
        T = _piece([len(documents[number].ids) for number in order])
        B = CALL // T
        group, order = order[:B], order[B:]
        longest = len(documents[group[-1]].ids)
        rows = np.zeros((B, 1 + longest + -longest % T), np.int32)
        asked = np.zeros((B, rows.shape[1] - 1), bool)
        for row, number in enumerate(group):
            rows[row, 1 : 1 + len(documents[number].ids)] = documents[number].ids
            for begin, end in documents[number].spans:
                asked[row, begin:end] = True
        if rows.max() >= V:
            raise UserError(f"a token of the text is {rows.max()}; the model knows {V}")
        state = model.initial_state(B)
        nats, first = np.zeros(asked.shape, np.float32), np.zeros(asked.shape, bool)
        for at in range(0, longest, T):
            here = np.s_[:, at : at + T]
            piece = rows[:, at : at + T + 1]
            *found, state = _score(graphdef, params, piece, asked[here], state)
            nats[here], first[here] = found
        for row, number in enumerate(group):
            yield (
                number,
                [
                    Answer(
                        float(nats[row, begin:end].sum(dtype=np.float64)),
                        bool(first[row, begin:end].all()),
                    )
                    for begin, end in documents[number].spans
                ],
            )


def _piece(lengths: list[int]) -> int:
    """The T of `PIECES` with which a call works on most tokens, of lengths in rising order.

    >>> _piece([70] * 64), _piece([70] * 16), _piece([10_000])
    (32, 128, 2048)
    """

    def calls_a_token(T: int) -> float:
        group = lengths[: CALL // T]
        return math.ceil(group[-1] / T) / max(sum(group), 1)

    return min(PIECES, key=calls_a_token)


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef, params, rows: Array, asked: Array, state: State) -> tuple[Array, Array, State]:
    """-log p and first choice, [B, T], of the tokens after the first of rows [B, T+1]: of those
    that asked [B, T] names, for the head takes as long as many layers. And the state.
    """
    model: RWKV7 = nnx.merge(graphdef, params)
    x, state = model.hidden(rows[:, :-1], state)
    x, targets = x.reshape(-1, x.shape[-1]), rows[:, 1:].reshape(-1)
    places = jnp.argsort(~asked.reshape(-1)).astype(jnp.int32)  # those asked for first

    def chunk(index: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        here = jax.lax.dynamic_slice(places, (index * HEAD_CHUNK,), (HEAD_CHUNK,))
        z = jnp.einsum(
            "tc,vc->tv", x[here], model.head.weight[...], preferred_element_type=jnp.float32
        )
        wanted = jnp.take_along_axis(z, targets[here][:, None], axis=-1)[:, 0]
        nats = jax.nn.logsumexp(z, axis=-1) - wanted
        first = jnp.argmax(z, axis=-1).astype(targets.dtype) == targets[here]
        return found[0].at[here].set(nats), found[1].at[here].set(first)

    count = jnp.sum(asked, dtype=jnp.int32)
    none = jnp.zeros(targets.shape, jnp.float32), jnp.zeros(targets.shape, bool)
    found = jax.lax.fori_loop(0, (count + HEAD_CHUNK - 1) // HEAD_CHUNK, chunk, none)
    nats, first = (each.reshape(asked.shape) for each in found)
    return nats, first, state


def group_by_length(documents: Iterable[Document], limit: int) -> Iterator[list[Document]]:
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
