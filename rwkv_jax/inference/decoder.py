"""Recurrent decoding: each token is computed from the previous token and a state of constant size.

`Decoder` holds a model laid out for this. Training stacks the layers' tensors and scans over them,
which compiles fast. But a scan copies each layer's matrices out of the stack before it multiplies,
and decoding mostly reads matrices. So the layers are separate arrays here, and the program is
unrolled over them.

On a CPU, "bf16" and "fp16" only round the weights. They are stored and computed in float32, with
the speed and memory of float32. XLA would widen narrower weights before each product, which takes
longer than the product itself, and would also keep a float32 copy of them.
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
from rwkv_jax.inference.sampling import Sampling, TokenHistory, sample
from rwkv_jax.model.rwkv7 import Block, LayerNorm, Linear, Params, State
from rwkv_jax.text import tokenizer

Array = jax.Array

PREFILL_LENGTHS = (256, 16, 1)  # prompt tokens per call; three programs cover any prompt
NOT_FINITE = (
    "the model's logits are not finite (NaN or infinity): the computation overflows; use "
    "--precision bf16 or fp32"
)
TOKENS_PER_CALL = 16  # maximum tokens generated per call; the host sees ids, never logits


class Layers(nnx.Module):
    """RWKV7 with unstacked layers: `blocks[l]` has the tensors of one layer, in official shapes."""

    def __init__(self, config: ModelConfig):
        V, C = config.vocab_size, config.n_embd
        self.emb = Linear(V, C)
        self.ln0 = LayerNorm(C)
        self.blocks = nnx.List([Block(config) for _ in range(config.n_layer)])
        self.ln_out = LayerNorm(C)
        self.head = Linear(V, C)

    def __call__(self, tokens: Array, states: list[State]) -> tuple[Array, list[State]]:
        """tokens [B, T] → the logits after the last token, [B, V] float32, and the states.

        The state of a layer is one row of `State`'s arrays: shifts [B, C], wkv [B, H, N, N].
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
        logits = jnp.einsum(  # float32 also in bf16: the logits must not be rounded
            "btc,vc->btv",
            self.ln_out(x[:, -1:]),
            self.head.weight[...],
            preferred_element_type=jnp.float32,
        )
        return logits[:, 0], after


class Batch(NamedTuple):
    """B sequences between two calls of `Decoder.generate`."""

    logits: Array  # [B, V] float32, for each sequence's next token
    states: list[State]  # one per layer
    keys: Array  # [B], PRNG keys of the sequences
    history: TokenHistory


class Decoder:
    """A model laid out for decoding.

    Args:
        config, params: from `rwkv_jax.load_params`, in any of its dtypes; NumPy or JAX arrays.
        precision: "fp32", "bf16" or "fp16"; None: `precision.device_precision`.

    Attributes:
        tuned: the initial wkv state [L, H, N, N] of every text; None: zeros.
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

        def convert(leaf: Any) -> Array:
            return jnp.asarray(leaf, rounded).astype(self.dtype)

        def layer(index: int) -> Params:
            return jax.tree.map(lambda leaf: convert(leaf[index]), params["blocks"])

        top = {name: part for name, part in params.items() if name != "blocks"}
        self._params = jax.tree.map(convert, top)
        self._params["blocks"] = {index: layer(index) for index in range(config.n_layer)}
        self._graphdef = nnx.split(nnx.eval_shape(lambda: Layers(config)))[0]

    def initial_state(self) -> list[State]:
        """The states of one sequence before its first token."""
        c = self.config
        shift = jnp.zeros((1, c.n_embd), self.dtype)
        shape = (c.n_layer, 1, c.n_head, c.head_size, c.head_size)
        wkv = np.zeros(shape, np.float32) if self.tuned is None else self.tuned.reshape(shape)
        return [State(shift, shift, jnp.asarray(layer, jnp.float32)) for layer in wkv]

    def prefill(
        self, tokens: Sequence[int], states: list[State] | None = None
    ) -> tuple[Array, list[State]]:
        """Reads the tokens of one sequence: logits [1, V] after the last token, and the states.

        Without tokens and states it starts a new document.

        Raises:
            UserError: a token is outside the model's vocabulary.
            ValueError: `tokens` is empty but states are given; a state has no next-token logits.
        """
        if states is None:
            states, tokens = self.initial_state(), tokens or [tokenizer.END_OF_DOCUMENT]
        if not tokens:
            raise ValueError("no tokens to read after a state")
        if max(tokens) >= self.config.vocab_size:
            V = self.config.vocab_size
            raise UserError(f"token {max(tokens)} is outside the model's vocabulary of {V}")
        rest = np.asarray(tokens, np.int32)[None]
        while rest.size:
            T = next(length for length in PREFILL_LENGTHS if length <= rest.size)
            logits, states = _prefill(self._graphdef, self._params, rest[:, :T], states)
            rest = rest[:, T:]
        return logits, states

    def batch(self, sequences: Sequence[tuple[Array, list[State]]], seed: int) -> Batch:
        """Combines sequences after `prefill` into a batch.

        Each sequence draws from its own key, made of the seed and its index, independent of the
        others.
        """
        logits, states = jax.tree.map(lambda *rows: jnp.concatenate(rows), *sequences)
        indices = jnp.arange(len(sequences))
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(indices)
        return Batch(logits, states, keys, TokenHistory.empty(*logits.shape))

    def generate(self, batch: Batch, count: int, sampling: Sampling) -> tuple[np.ndarray, Batch]:
        """Generates `count` tokens (at most TOKENS_PER_CALL) of each sequence: ids [B, count].

        Returns fewer if every sequence has reached an end of document in this call. Tokens after a
        sequence's own end are meaningless.

        Raises:
            UserError: logits are not finite.
        """
        generated, tokens, finite, batch = _generate(
            self._graphdef, self._params, batch, np.int32(count), sampling.validated()
        )
        if not finite:
            raise UserError(NOT_FINITE)
        return np.asarray(tokens)[:, : int(generated)], batch


@functools.partial(jax.jit, static_argnums=0)
def _prefill(graphdef, params, tokens: Array, states: list[State]) -> tuple[Array, list[State]]:
    return nnx.merge(graphdef, params)(tokens, states)


@functools.partial(jax.jit, static_argnums=0)
def _generate(
    graphdef, params, batch: Batch, count: Array, sampling: Sampling
) -> tuple[Array, Array, Array, Batch]:
    model: Layers = nnx.merge(graphdef, params)
    B = batch.logits.shape[0]

    def unfinished(carry) -> Array:
        index, _, ended, _ = carry
        return (index < count) & ~jnp.all(ended)

    def step(carry):
        index, tokens, ended, (logits, states, keys, history) = carry
        keys, draws = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        token = sample(logits, history, draws, sampling)
        logits, states = model(token[:, None], states)
        history = history.add(token, sampling.alpha_decay)
        ended |= token == tokenizer.END_OF_DOCUMENT
        return index + 1, tokens.at[:, index].set(token), ended, Batch(
            logits, states, keys, history
        )  # fmt: skip

    tokens = jnp.zeros((B, TOKENS_PER_CALL), jnp.int32)
    start = (jnp.int32(0), tokens, jnp.zeros(B, bool), batch)
    # Non-finite values persist in the state, so checking the first and the last logits is enough.
    finite = jnp.all(jnp.isfinite(batch.logits))
    generated, tokens, _, batch = jax.lax.while_loop(unfinished, step, start)
    return generated, tokens, finite & jnp.all(jnp.isfinite(batch.logits)), batch
