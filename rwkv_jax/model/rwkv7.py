"""RWKV-7 ("Goose", x070) as Flax NNX modules; initialisation.py has the initial values.

Names, orientation and equations are the official ones: a parameter's path is its name in an
official `.pth` (`blocks.att.x_r`, `blocks.ffn.key.weight`, …), and linear weights are `[out, in]`,
so a checkpoint is converted by renaming and stacking only.

All blocks are one `Block` whose tensors have a leading layer axis. `lax.scan` slices that axis, and
inside the scan the same module *is* one layer: compile time does not grow with depth, and weights
can be gathered or recomputed one layer at a time.

Shapes: L layers, B sequences, T tokens, C width, H heads of size N (C = H·N), V vocabulary, F the
channel mix's inner width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.wkv7 import wkv7
from rwkv_jax.config import ModelConfig

Array = jax.Array
Params = dict[str, Any]  # nested: official names → arrays, the per-block ones stacked on axis 0

LN_EPS = 1e-5
LN_X_EPS = 64e-5  # the same at every head size


class State(NamedTuple):
    """The recurrent state; its size does not depend on T."""

    shift_att: Array  # [L, B, C] the last token's input of each time mix
    shift_ffn: Array  # [L, B, C] the last token's input of each channel mix
    wkv: Array  # [L, B, H, N, N] float32, (value row, key column)


class Linear(nnx.Module):
    """y = x Wᵀ without bias; weight `[out, in]`, in a block `[L, out, in]`."""

    def __init__(self, *shape: int):
        self.weight = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: Array) -> Array:
        return jnp.einsum("...i,oi->...o", x, self.weight[...])


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis; statistics in float32, result in x's dtype."""

    def __init__(self, *shape: int):
        self.weight = nnx.Param(jnp.zeros(shape))
        self.bias = nnx.Param(jnp.zeros(shape))

    def __call__(self, x: Array) -> Array:
        y = _normalize(_wide(x), LN_EPS)
        y = y * _wide(_row(self.weight)) + _wide(_row(self.bias))
        return y.astype(x.dtype)


class TimeMix(nnx.Module):
    """The attention-like half of a block: token shift, projections, WKV, gate."""

    # [L, C]: the share of the previous token in each projection, the biases, the key's scales.
    x_r: nnx.Param
    x_w: nnx.Param
    x_k: nnx.Param
    x_v: nnx.Param
    x_a: nnx.Param
    x_g: nnx.Param
    w0: nnx.Param
    a0: nnx.Param
    v0: nnx.Param
    k_k: nnx.Param
    k_a: nnx.Param
    # [L, C, d] down and [L, d, C] up, for decay, in-context learning rate, value mix and gate.
    w1: nnx.Param
    w2: nnx.Param
    a1: nnx.Param
    a2: nnx.Param
    v1: nnx.Param
    v2: nnx.Param
    g1: nnx.Param
    g2: nnx.Param

    def __init__(self, config: ModelConfig):
        L, C, H, N = config.n_layer, config.n_embd, config.n_head, config.head_size
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a"):
            setattr(self, name, nnx.Param(jnp.zeros((L, C))))
        widths = {"w": config.dim_w, "a": config.dim_a, "v": config.dim_v, "g": config.dim_g}
        for name, D in widths.items():
            setattr(self, f"{name}1", nnx.Param(jnp.zeros((L, C, D))))
            setattr(self, f"{name}2", nnx.Param(jnp.zeros((L, D, C))))
        self.r_k = nnx.Param(jnp.zeros((L, H, N)))
        self.receptance = Linear(L, C, C)
        self.key = Linear(L, C, C)
        self.value = Linear(L, C, C)
        self.output = Linear(L, C, C)
        self.ln_x = LayerNorm(L, C)

    def project_value(self, x: Array, shift: Array) -> Array:
        """v before the value residual; in layer 0 this is v_first for all later layers."""
        return self.value(_mix(x, _shift(x, shift) - x, _row(self.x_v)))

    def __call__(
        self, x: Array, shift: Array, wkv: Array | None, v_first: Array, is_first: Array
    ) -> tuple[Array, Array]:
        """x [B,T,C] (after ln1), shift [B,C], wkv [B,H,N,N] → (out [B,T,C], wkv [B,H,N,N])."""
        B, T, C = x.shape
        H, N = self.r_k[...].shape
        xx = _shift(x, shift) - x

        r = self.receptance(_mix(x, xx, _row(self.x_r)))
        w = _row(self.w0) + _low_rank(_mix(x, xx, _row(self.x_w)), self.w1, self.w2, jnp.tanh)
        k = self.key(_mix(x, xx, _row(self.x_k)))
        v = self.project_value(x, shift)
        a = _wide(_low_rank(_mix(x, xx, _row(self.x_a)), self.a1, self.a2))
        g = _low_rank(_mix(x, xx, _row(self.x_g)), self.g1, self.g2, jax.nn.sigmoid)
        mix = _wide(_low_rank(_mix(x, xx, _row(self.x_v)), self.v1, self.v2))

        # From here to the next matrix product everything is float32 and rounded once at the end, as
        # in the official trainer's fused kernels (RWKV-v7/train_temp/cuda, since 2026-04).
        a = jax.nn.sigmoid(_wide(_row(self.a0)) + a).astype(x.dtype)
        mix = jax.nn.sigmoid(_wide(_row(self.v0)) + mix)
        mixed = _wide(v) + (_wide(v_first) - _wide(v)) * mix
        v = jnp.where(is_first, v, mixed.astype(x.dtype))

        def heads(z: Array) -> Array:
            return z.reshape(B, T, H, N)

        kk = heads(_wide(k) * _wide(_row(self.k_k)))
        kk = kk / jnp.maximum(jnp.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
        k = (_wide(k) * (1 + (_wide(a) - 1) * _wide(_row(self.k_a)))).astype(x.dtype)
        r, w, k, v, a = heads(r), heads(w), heads(k), heads(v), heads(a)
        y, wkv = wkv7(
            r, w, k, v, (-kk).astype(x.dtype), (kk * _wide(a)).astype(x.dtype), wkv,
            return_state=True,
        )  # fmt: skip

        # GroupNorm with one group per head, the current token's own contribution, the gate.
        y = _normalize(_wide(y), LN_X_EPS).reshape(B, T, C)
        y = y * _wide(_row(self.ln_x.weight)) + _wide(_row(self.ln_x.bias))
        bonus = jnp.sum(_wide(r) * _wide(k) * _wide(_row(self.r_k)), axis=-1, keepdims=True)
        y = y + (bonus * _wide(v)).reshape(B, T, C)
        return self.output((y * _wide(g)).astype(x.dtype)), wkv


class ChannelMix(nnx.Module):
    """The MLP half of a block: relu(·)² with a token shift."""

    def __init__(self, config: ModelConfig):
        L, C, F = config.n_layer, config.n_embd, config.dim_ffn
        self.x_k = nnx.Param(jnp.zeros((L, C)))
        self.key = Linear(L, F, C)
        self.value = Linear(L, C, F)

    def __call__(self, x: Array, shift: Array) -> Array:
        k = self.key(_mix(x, _shift(x, shift) - x, _row(self.x_k)))
        return self.value(jnp.square(jax.nn.relu(k)))


class Block(nnx.Module):
    """All layers stacked; one layer after `lax.scan` has sliced it."""

    def __init__(self, config: ModelConfig):
        self.ln1 = LayerNorm(config.n_layer, config.n_embd)
        self.ln2 = LayerNorm(config.n_layer, config.n_embd)
        self.att = TimeMix(config)
        self.ffn = ChannelMix(config)


class RWKV7(nnx.Module):
    """The language model. `forward` is the public call; `hidden` is used by the loss.

    The constructor fills every tensor with zeros; `bind` sets the values, from
    `initialisation.init_params` or from a file.
    """

    def __init__(self, config: ModelConfig):
        V, C = config.vocab_size, config.n_embd
        self.config = config
        self.emb = Linear(V, C)
        self.ln0 = LayerNorm(C)
        self.blocks = Block(config)
        self.ln_out = LayerNorm(C)
        self.head = Linear(V, C)

    def forward(self, tokens: Array, state: State | None = None) -> tuple[Array, State]:
        """Computes next-token logits; compiled once per shape.

        Args:
            tokens: [B, T] integers in [0, V).
            state: the state that an earlier call returned, to continue after its last token; None:
                the initial state.
        Returns:
            logits [B, T, V] float32 and the state after the last token.
        """
        graphdef, params = nnx.split(self)
        return _forward(graphdef, params, jnp.asarray(tokens), state)

    def hidden(
        self,
        tokens: Array,
        state: State | None = None,
        *,
        remat: int = 0,
        read: Callable[[Params, Array], Params] | None = None,
    ) -> tuple[Array, State]:
        """The input of the head: tokens [B,T] → ([B,T,C] in the parameters' dtype, state).

        Args:
            remat: 1: the backward pass recomputes each block from its input; 2: it recomputes all
                but the matrix products, which are saved; 0: nothing (`--grad_cp`).
            read: (a block's parameters, layer index) → the parameters to compute with. It is called
                again in the backward pass, so a layer gathered from other devices is in memory only
                while it is used.
        """
        x = self.ln0(embed(self.emb.weight[...], tokens))
        if state is None:
            state = self.initial_state(tokens.shape[0])
        graphdef, split = nnx.split(self.blocks)
        blocks = nnx.to_pure_dict(split)

        def make_block(params: Params, layer: Array) -> Block:
            return nnx.merge(graphdef, read(params, layer) if read else params)

        # v_first, which every later layer reads, is computed before the scan. As a constant of the
        # scan it is saved once; in the carry it would be saved again for each layer.
        first = make_block(jax.tree.map(lambda p: p[0], blocks), jnp.int32(0))
        v_first = first.att.project_value(first.ln1(x), state.shift_att[0])

        def body(x: Array, at: tuple) -> tuple[Array, State]:
            params, layer, old = at
            block = make_block(params, layer)
            x_att = block.ln1(x)
            y, wkv = block.att(x_att, old.shift_att, old.wkv, v_first, layer == 0)
            x = x + y
            x_ffn = block.ln2(x)
            x = x + block.ffn(x_ffn, old.shift_ffn)
            return x, State(x_att[:, -1], x_ffn[:, -1], wkv)

        if remat or read:
            products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            saved = (_is_activation, None, products)[remat]
            body = jax.checkpoint(body, prevent_cse=False, policy=saved)
        layers = jnp.arange(self.config.n_layer, dtype=jnp.int32)
        x, after = jax.lax.scan(body, x, (blocks, layers, state))
        return self.ln_out(x), after

    def initial_state(self, batch: int) -> State:
        """The state before the first token: zeros."""
        c, dtype = self.config, self.emb.weight.dtype
        shift = jnp.zeros((c.n_layer, batch, c.n_embd), dtype)
        wkv = jnp.zeros((c.n_layer, batch, c.n_head, c.head_size, c.head_size), jnp.float32)
        return State(shift, shift, wkv)


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef, params, tokens: Array, state: State | None) -> tuple[Array, State]:
    model: RWKV7 = nnx.merge(graphdef, params)
    x, state = model.hidden(tokens, state)
    logits = jnp.einsum(
        "btc,vc->btv", x, model.head.weight[...], preferred_element_type=jnp.float32
    )
    return logits, state


def abstract_params(config: ModelConfig) -> Params:
    """The tree of parameters as float32 shapes; nothing is computed or allocated."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: RWKV7(config))))


def bind(config: ModelConfig, params: Params) -> RWKV7:
    """The module with this tree of parameters (any float dtype); also works inside `jit`."""
    return nnx.merge(_graphdef(config), params)


@functools.lru_cache
def _graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: RWKV7(config)))[0]


@jax.custom_vjp
def embed(weight: Array, tokens: Array) -> Array:
    """Rows of weight [V, C] for tokens [B, T]; their gradients are summed in float32.

    In bf16, rounding would dominate the sum over a token that occurs a few hundred times.
    """
    return jnp.take(weight, tokens, axis=0, mode="clip")


def _embed_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    tokens, like = residuals
    total = jnp.zeros(like.shape, jnp.float32).at[tokens].add(g.astype(jnp.float32), mode="clip")
    return total.astype(like.dtype), None


embed.defvjp(lambda weight, tokens: (embed(weight, tokens), (tokens, weight)), _embed_backward)


def _normalize(x: Array, eps: float) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)


def _is_activation(primitive: Any, *operands: Any, **_: Any) -> bool:
    """A policy for `jax.checkpoint`: saves everything except weights, which are read again.

    An operation without an operand of three or more axes depends on weights alone (sliced from
    their stack, cast, gathered); all other arrays have batch and time as their first two axes.
    """
    if primitive.name in ("dynamic_slice", "squeeze"):
        return False
    return any(operand.ndim >= 3 for operand in operands)


def _row(param: nnx.Param) -> Array:
    """[C] as [1, 1, C] (and [H, N] as [1, 1, H, N]), to broadcast over B and T."""
    return param[...][None, None]


def _wide(x: Array) -> Array:
    """Casts to float32."""
    return x.astype(jnp.float32)


def _shift(x: Array, before: Array) -> Array:
    """x [B,T,C] delayed by one token; `before` [B,C] is the token before the first."""
    return jnp.concatenate([before[:, None], x[:, :-1]], axis=1)


@jax.custom_vjp
def _mix(x: Array, xx: Array, part: Array) -> Array:
    """x + xx·part, where xx = previous token − x, [B,T,C], and part is [1,1,C].

    Each operation is rounded, as in the official kernel (RWKV-LM, mix6). As in that kernel, the
    gradient of `part` is a sum of float32 products, rounded once.
    """
    return x + xx * part


def _mix_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array, Array]:
    xx, part = saved
    d_part = jnp.sum(_wide(g) * _wide(xx), axis=(0, 1), keepdims=True)
    return g, g * part, d_part.astype(part.dtype)


_mix.defvjp(lambda x, xx, part: (_mix(x, xx, part), (xx, part)), _mix_backward)


def _low_rank(x: Array, down: nnx.Param, up: nnx.Param, activation=lambda z: z) -> Array:
    """activation(x D) U with D [C, d], U [d, C]."""
    return activation(x @ down[...]) @ up[...]


def summary(model: ModelConfig) -> str:
    """The architecture and the number of parameters, in one line."""
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model)))
    low_rank = "/".join(str(getattr(model, f"dim_{name}")) for name in "wavg")
    return (
        f"RWKV-7, {model.n_layer} layers of width {model.n_embd}, {count / 1e6:,.1f} M parameters "
        f"(vocabulary {model.vocab_size}, head size {model.head_size}, low-rank {low_rank})"
    )
