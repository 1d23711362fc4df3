"""The training loss: output head, cross-entropy and L2Wrap as one operation.

Logits are the largest tensor of the model: [B, T, V] in float32 is 8.6 GB at B 8, T 4096, V 65536.
Here they exist for one chunk of tokens at a time. The gradients of the hidden vectors and of the
head are computed in the same pass, while the logits of the chunk are in memory: nothing is
recomputed, and the backward pass only scales the stored gradients.
"""

import functools

import jax
import jax.numpy as jnp

Array = jax.Array

L2WRAP = 1e-4  # pulls each token's largest logit towards zero; only part of the gradient

# Size of the float32 logits of one chunk if the chunk is automatic. Each chunk reads and writes the
# head's float32 gradient once: for 0.1b at B 8, T 4096, planned for an H100, the loss moves 97 GB
# with 128 MiB, 77 with 256, 73 with 384, and needs 0.69, 0.96 and 1.16 GB.
AUTO_CHUNK_BYTES = 256 * 2**20


def head_loss(
    hidden: Array, head: Array, targets: Array, chunk: int = 0, scale: Array | float = 1.0
) -> Array:
    """Mean next-token cross-entropy; its gradient includes that of L2Wrap.

    loss = mean over (b, t) of logsumexp(z) − z[target], with z = head · hidden. L2Wrap adds
    z_max · 1e-4/(B·T) to the gradient of each token's largest logit z_max.

    Args:
        hidden: [B, T, C], any float dtype; the products accumulate in float32.
        head: [V, C], same dtype.
        targets: [B, T] integers in [0, V).
        chunk: number of tokens (of B·T) whose logits exist at once; 0: as many as fit 256 MiB.
        scale: loss scale. It multiplies the gradients but not the loss: unscaled gradients
            underflow in float16.
    Returns:
        A float32 scalar.
    """
    if chunk == 0:
        chunk = max(1, AUTO_CHUNK_BYTES // (4 * head.shape[0]))
    chunk = min(chunk, targets.size)
    hidden = hidden.reshape(targets.size, -1)
    with jax.named_scope("head_loss"):
        return _head_loss(hidden, head, targets.reshape(-1), jnp.asarray(scale, jnp.float32), chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _head_loss(hidden: Array, head: Array, targets: Array, scale: Array, chunk: int) -> Array:
    def step(total: Array, xs: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = xs
        return total + jnp.sum(_losses(_logits(x, head), y)), None

    total, _ = jax.lax.scan(step, jnp.zeros(()), _chunks(hidden, targets, chunk))
    return total / targets.size


def _forward(hidden: Array, head: Array, targets: Array, scale: Array, chunk: int):
    mean = 1.0 / targets.size

    def step(carry: tuple[Array, Array], xs: tuple[Array, Array]):
        total, d_head = carry
        x, y = xs
        z = _logits(x, head)
        d_z = _logit_gradients(z, y, scale * mean).astype(head.dtype)
        d_x = jnp.einsum("nv,vc->nc", d_z, head, preferred_element_type=jnp.float32)
        d_head += jnp.einsum("nv,nc->vc", d_z, x, preferred_element_type=jnp.float32)
        return (total + jnp.sum(_losses(z, y)), d_head), d_x.astype(hidden.dtype)

    start = (jnp.zeros(()), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), d_x = jax.lax.scan(step, start, _chunks(hidden, targets, chunk))
    d_hidden = d_x.reshape(-1, hidden.shape[1])[: targets.size]
    return total * mean, (d_hidden, d_head.astype(head.dtype))


def _backward(chunk: int, residuals: tuple[Array, Array], g: Array):
    d_hidden, d_head = residuals
    return d_hidden * g.astype(d_hidden.dtype), d_head * g.astype(d_head.dtype), None, None


_head_loss.defvjp(_forward, _backward)


def _chunks(hidden: Array, targets: Array, chunk: int) -> tuple[Array, Array]:
    """[n, C], [n] → [n/chunk, chunk, C], [n/chunk, chunk]; the padding has target −1."""
    pad = -targets.size % chunk
    hidden = jnp.pad(hidden, ((0, pad), (0, 0)))
    targets = jnp.pad(targets, (0, pad), constant_values=-1)
    return hidden.reshape(-1, chunk, hidden.shape[1]), targets.reshape(-1, chunk)


def _logits(x: Array, head: Array) -> Array:
    return jnp.einsum("nc,vc->nv", x, head, preferred_element_type=jnp.float32)


def _losses(z: Array, targets: Array) -> Array:
    picked = jnp.take_along_axis(z, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets >= 0, jax.nn.logsumexp(z, axis=-1) - picked, 0.0)


def _logit_gradients(z: Array, targets: Array, scale: Array) -> Array:
    """[n, V]: (softmax − onehot + L2Wrap)·scale, zero where the target is padding."""
    index = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    largest = jnp.max(z, axis=-1, keepdims=True)
    # The first of equal maxima, as in argmax (whose lowering on a CPU is not vectorised).
    at = jnp.min(jnp.where(z == largest, index, z.shape[-1]), axis=-1, keepdims=True)
    p = jnp.exp(z - largest)
    p = p / jnp.sum(p, axis=-1, keepdims=True)
    d = p - (index == targets[..., None]).astype(p.dtype)
    d = d + jnp.where(index == at, largest * L2WRAP, 0.0)
    return jnp.where(targets[..., None] >= 0, d * scale, 0.0)
