"""The arithmetic that the backends share: decays, triangular inverses, document masks.

Two conventions. The XLA form works on all chunks at once, tokens by channels [..., L, N]. Kernels
work on the tile of one chunk, channels by tokens [N, L]; their matrices between tokens are
[from, to]. A kernel's backend passes its products and special functions as `TileOps`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

DECAY_SCALE = math.exp(-0.5)  # log decay = −DECAY_SCALE·sigmoid(w)
LOG2_E = math.log2(math.e)
PADDED_LOGIT = -3e4  # a decay logit whose decay is exactly 1, in float16 too


# Document masks.


class DocumentMasks(NamedTuple):
    """What may reach what in a chunk of L tokens when `reset` sets the state to zero.

    Each is a boolean array, or None where nothing is reset.
    """

    tokens: Any = None  # [..., L, L]: a token and another one of the same document
    start: Any = None  # [..., 1, L]: the state before the chunk and a token
    end: Any = None  # [..., 1, L]: a token and the state after the chunk
    through: Any = None  # [] or [..., 1, 1]: the state before the chunk and the state after it


def document_masks(
    before: jax.Array | int, own: jax.Array, after: jax.Array | int
) -> DocumentMasks:
    """Compares document numbers: integers that grow by one at every reset.

    Args:
      before: [] or [..., 1, 1], of the last token before the chunk.
      own: [..., L], of the chunk's tokens.
      after: [] or [..., 1, 1], of the chunk's last token.
    """
    return DocumentMasks(
        own[..., :, None] == own[..., None, :],
        own[..., None, :] == before,
        own[..., None, :] == after,
        before == after,
    )


def masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x where the mask holds, else 0. A mask of None holds everywhere."""
    return x if mask is None else jnp.where(mask, x, 0.0)


# Triangular inverses. Both use block doubling: unlike the product (I + M)(I + M²)(I + M⁴)…, no
# power of M is formed. The entries of the powers grow like binomial coefficients when keys align,
# only to cancel.


def unit_lower_inverse(m: jax.Array) -> jax.Array:
    """(I − M)⁻¹ for strictly lower triangular M [..., L, L], L a power of two.

    The inverses P, Q of two neighbouring diagonal blocks give that of the block of twice the size,
    [[P, 0], [Q M₂₁ P, Q]].
    """
    dot = partial(jnp.einsum, "...ij,...jk->...ik", precision="highest")
    length = m.shape[-1]
    inverse = jnp.ones((*m.shape[:-2], length, 1, 1), m.dtype)  # [..., blocks, size, size]
    size = 1
    while size < length:
        pairs = range(0, length, 2 * size)
        below = jnp.stack([m[..., i + size : i + 2 * size, i : i + size] for i in pairs], -3)
        p, q = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = dot(dot(q, below), p)
        top = jnp.concatenate([p, jnp.zeros_like(p)], -1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, q], -1)], -2)
        size *= 2
    return inverse[..., 0, :, :]


class TileOps(NamedTuple):
    """The operations of a kernel's backend.

    `dot(x, y, contract="xy")` is x·y with float32 sums; in `contract`, X or Y means the transposed
    matrix. `exp2` and `reciprocal` are elementwise in float32.
    """

    dtype: Any  # of the operands of products: bfloat16 or float32
    dot: Callable
    exp2: Callable
    reciprocal: Callable


def unit_triangular_inverse(m: jax.Array, ops: TileOps) -> jax.Array:
    """(I − M)⁻¹ for a tile M [L, L] strictly above or below the diagonal, in `ops.dtype`.

    The same algorithm with masks in place of slices, which a kernel does not have. The highest set
    bit of i xor j is half the size of the smallest aligned block that holds both i and j.
    """
    row, column = positions(*m.shape)
    apart = row ^ column
    inverse = jnp.where(apart == 0, 1.0, jnp.where(apart == 1, m, 0.0))
    size = 2
    while size < m.shape[0]:
        between = jnp.where((apart >= size) & (apart < 2 * size), m, 0.0).astype(ops.dtype)
        blocks = inverse.astype(ops.dtype)
        inverse = inverse + ops.dot(ops.dot(blocks, between).astype(ops.dtype), blocks)
        size *= 2
    return inverse.astype(ops.dtype)


# Tiles.


def operand_dtype(dtype) -> Any:
    """The dtype of products' operands for inputs of this dtype: bfloat16 for float16, too."""
    return jnp.float32 if dtype == jnp.float32 else jnp.bfloat16


def positions(rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """The row and the column of every element, int32 [rows, columns] each."""
    shape = (rows, columns)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, column


def diagonal(x: jax.Array) -> jax.Array:
    """The diagonal [N] of a tile [N, N]."""
    row, column = positions(*x.shape)
    return jnp.sum(jnp.where(row == column, x, 0.0), axis=1)


def sum_over_tokens(x: jax.Array, which: jax.Array, ops: TileOps) -> jax.Array:
    """x [N, L] times a matrix of zeros and ones [L, L]: for each token, a sum over some tokens.

    With bfloat16 operands, x is the sum of a pair of them (15 bits).
    """
    if ops.dtype == jnp.float32:
        return ops.dot(x, jnp.where(which, 1.0, 0.0))
    ones = jnp.where(which, 1.0, 0.0).astype(ops.dtype)
    # Truncated, not rounded: the conversion that rounds a single value is slow.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(2**16))
    high = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return ops.dot(high.astype(ops.dtype), ones) + ops.dot((x - high).astype(ops.dtype), ones)


def causal_product(
    x: jax.Array,
    y: jax.Array,
    same: jax.Array | None,
    ops: TileOps,
    strict: bool = False,
    to_first: bool = False,
) -> jax.Array:
    """xᵀ y [from, to] of two tiles [N, L], zero where a token does not reach the other.

    Args:
      same: `DocumentMasks.tokens`.
      strict: a token does not reach itself.
      to_first: x belongs to the tokens that are reached; the result is [to, from].
    """
    source, token = positions(x.shape[1], y.shape[1])[:: -1 if to_first else 1]
    reaches = source < token if strict else source <= token
    mask = reaches if same is None else reaches & same
    return masked(ops.dot(x, y, "Xy"), mask)


def exp_minus(w: jax.Array, ops: TileOps) -> jax.Array:
    """exp(−w) in float32, at most 2^100; sigmoid(w) = 1/(1 + exp(−w))."""
    return ops.exp2(jnp.minimum(-LOG2_E * w.astype(jnp.float32), 100.0))


class ChunkDecays(NamedTuple):
    """Decays of one chunk, in logarithms of base 2, float32."""

    exp_minus_w: jax.Array  # [N, L]
    log: jax.Array  # [N, L]: log2 of each token's decay
    total: jax.Array  # [N, L]: sum of `log` up to and with each token, less `half`
    half: jax.Array  # [N]: half the sum over the chunk; W = exp2(total) is 1 where it is reached


def chunk_decays(w: jax.Array, ops: TileOps) -> ChunkDecays:
    """The decays of a tile of decay logits w [N, L]."""
    exp_minus_w = exp_minus(w, ops)
    log = -DECAY_SCALE * LOG2_E * ops.reciprocal(1.0 + exp_minus_w)
    length = w.shape[1]
    source, token = positions(length, length)
    total = sum_over_tokens(log, source <= token, ops)
    last = positions(*total.shape)[1] == length - 1
    half = 0.5 * jnp.sum(jnp.where(last, total, 0.0), axis=1)
    return ChunkDecays(exp_minus_w, log, total - half[:, None], half)
