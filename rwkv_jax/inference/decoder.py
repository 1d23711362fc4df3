"""Recurrent decoding: a token is made from the one before and a state of constant size.

`Decoder` holds a model laid out for this. Training stacks the layers' tensors and scans over them,
which compiles fast; but a scan copies each layer's matrices out of the stack before it multiplies,
and decoding does little else than read matrices. So here the layers are apart and the program
spells them out.

On a CPU "bf16" and "fp16" round the weights and no more: they are kept, and computed with, in
float32, at float32's speed and memory. XLA would widen narrower ones before each product, which
takes longer than the product itself, and keeps a float32 copy of them besides.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rwkv_jax.config import ModelConfig
from rwkv_jax.device.precision import PRECISIONS, device_precision
from rwkv_jax.errors import UserError
from rwkv_jax.inference.sampling import Made, Sampling, choose
from rwkv_jax.model.rwkv7 import Block, LayerNorm, Linear, Params, State
from rwkv_jax.text import tokenizer

Array = jax.Array

PROMPT_PIECES = (256, 16, 1)  # tokens read a call, so that three programs read any prompt
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity): it computes beyond the range of its "
    "precision; --precision bf16 or fp32 has more"
)
TOKENS_PER_CALL = 16  # tokens made a call, at most: the host sees ids, never logits


class Layers(nnx.Module):
    """RWKV7 with the layers apart: `blocks[l]` holds one layer's tensors, of official shape."""

    def __init__(self, config: ModelConfig):
        V, C = config.vocab_size, config.n_embd
        self.emb = Linear(V, C)
        self.ln0 = LayerNorm(C)
        self.blocks = nnx.List([Block(config) for _ in range(config.n_layer)])
        self.ln_out = LayerNorm(C)
        self.head = Linear(V, C)

    def __call__(self, tokens: Array, states: list[State]) -> tuple[Array, list[State]]:
        """tokens [B, T] → the logits after the last, [B, V] float32; a layer's state is one row
        of `State`'s arrays: shifts [B, C], wkv [B,H,N,N].
        """
        x = self.ln0(jnp.take(self.emb.weight[...], tokens, axis=0, mode="clip"))
        v_first, after = None, []
        for layer, (block, state) in enumerate(zip(self.blocks, states, strict=True)):
            x_att = block.ln1(x)
            if v_first is None:
                v_first = block.att.project_value(x_att, state.shift_att)
            y, wkv = block.att(x_att, state.shift_att, state.wkv, v_first, jnp.array(layer == 0))
            x = x + y
            x_ffn = block.ln2(x)
            x = x + block.ffn(x_ffn, state.shift_ffn)
            after.append(State(x_att[:, -1], x_ffn[:, -1], wkv))
        logits = jnp.einsum(  # in bf16 the logits themselves are not to be rounded
            "btc,vc->btv",
            self.ln_out(x[:, -1:]),
            self.head.weight[...],
            preferred_element_type=jnp.float32,
        )
        return logits[:, 0], after


class Batch(NamedTuple):
    """B sequences between two calls of `Decoder.make`."""

    logits: Array  # [B, V] float32, of each sequence's next token
    states: list[State]  # a layer
    keys: Array  # [B], of each sequence's draws
    made: Made


class Decoder:
    """A model laid out for decoding.

    Args:
        config, params: from `rwkv_jax.load_params`, of any of the dtypes; NumPy or JAX arrays.
        precision: "fp32", "bf16" or "fp16"; None: `build.device_precision`.

    Attributes:
        tuned: the wkv state [L, H, N, N] in which every text begins; None: zeros.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        precision: str | None = None,
        tuned: np.ndarray | None = None,
    ):
        rounded = PRECISIONS[precision or device_precision()]
        self.config, self.tuned = config, tuned
        self.dtype = jnp.float32 if jax.default_backend() == "cpu" else rounded

        def place(leaf: Any) -> Array:
            return jnp.asarray(leaf, rounded).astype(self.dtype)

        def layer(index: int) -> Params:
            return jax.tree.map(lambda leaf: place(leaf[index]), params["blocks"])

        top = {name: part for name, part in params.items() if name != "blocks"}
        self._params = jax.tree.map(place, top)
        self._params["blocks"] = {index: layer(index) for index in range(config.n_layer)}
        self._graphdef = nnx.split(nnx.eval_shape(lambda: Layers(config)))[0]

    def initial_state(self) -> list[State]:
        """Of one sequence, before its first token."""
        c = self.config
        shift = jnp.zeros((1, c.n_embd), self.dtype)
        shape = (c.n_layer, 1, c.n_head, c.head_size, c.head_size)
        wkv = np.zeros(shape, np.float32) if self.tuned is None else self.tuned.reshape(shape)
        return [State(shift, shift, jnp.asarray(layer, jnp.float32)) for layer in wkv]

    def read(
        self, tokens: Sequence[int], states: list[State] | None = None
    ) -> tuple[Array, list[State]]:
        """Reads one sequence's tokens, in pieces: logits [1, V] after the last, and the state.

        Without tokens and state, a new document is begun.

        Raises:
            UserError: a token is outside the model's vocabulary.
            ValueError: no tokens after a state, which does not say what comes next.
        """
        if states is None:
            states, tokens = self.initial_state(), tokens or [tokenizer.END_OF_DOCUMENT]
        if not tokens:
            raise ValueError("no tokens to read after a state")
        if max(tokens) >= self.config.vocab_size:
            V = self.config.vocab_size
            raise UserError(f"a token of the text is {max(tokens)}; the model knows {V}")
        rest = np.asarray(tokens, np.int32)[None]
        while rest.size:
            piece = next(piece for piece in PROMPT_PIECES if piece <= rest.size)
            logits, states = _read(self._graphdef, self._params, rest[:, :piece], states)
            rest = rest[:, piece:]
        return logits, states

    def batch(self, sequences: Sequence[tuple[Array, list[State]]], seed: int) -> Batch:
        """Sequences that were read, to continue together; each draws by the seed and its place
        alone, whatever the others are.
        """
        logits, states = jax.tree.map(lambda *rows: jnp.concatenate(rows), *sequences)
        places = jnp.arange(len(sequences))
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(places)
        return Batch(logits, states, keys, Made.none(*logits.shape))

    def make(self, batch: Batch, count: int, sampling: Sampling) -> tuple[np.ndarray, Batch]:
        """Makes `count` tokens (at most TOKENS_PER_CALL) of each sequence: ids [B, count].

        Ends early, with fewer, when every sequence has made an end of document in this call. What a
        sequence makes after its own end means nothing.

        Raises:
            UserError: logits are not finite, so that no choice among them means anything.
        """
        made, tokens, finite, batch = _make(
            self._graphdef, self._params, batch, np.int32(count), sampling.checked()
        )
        if not finite:
            raise UserError(NOT_FINITE)
        return np.asarray(tokens)[:, : int(made)], batch


@functools.partial(jax.jit, static_argnums=0)
def _read(graphdef, params, tokens: Array, states: list[State]) -> tuple[Array, list[State]]:
    return nnx.merge(graphdef, params)(tokens, states)


@functools.partial(jax.jit, static_argnums=0)
def _make(
    graphdef, params, batch: Batch, count: Array, sampling: Sampling
) -> tuple[Array, Array, Array, Batch]:
    model: Layers = nnx.merge(graphdef, params)
    B = batch.logits.shape[0]

    def unfinished(carry) -> Array:
        made, _, ended, _ = carry
        return (made < count) & ~jnp.all(ended)

    def step(carry):
        made, tokens, ended, (logits, states, keys, penalties) = carry
        keys, draws = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        chosen = choose(logits, penalties, draws, sampling)
        logits, states = model(chosen[:, None], states)
        penalties = penalties.add(chosen, sampling.alpha_decay)
        ended |= chosen == tokenizer.END_OF_DOCUMENT
        return made + 1, tokens.at[:, made].set(chosen), ended, Batch(
            logits, states, keys, penalties
        )  # fmt: skip

    tokens = jnp.zeros((B, TOKENS_PER_CALL), jnp.int32)
    start = (jnp.int32(0), tokens, jnp.zeros(B, bool), batch)
    # What is not finite stays in the state, so the first and the last logits show all of it.
    finite = jnp.all(jnp.isfinite(batch.logits))
    made, tokens, _, batch = jax.lax.while_loop(unfinished, step, start)
    return made, tokens, finite & jnp.all(jnp.isfinite(batch.logits)), batch
