"""The official cubic-hash sampler: the samples of each step."""

import math

import numpy as np

from rwkv_jax.errors import UserError

MINIEPOCH = 40320  # samples; 8!, so that most batch sizes divide it


def sample_numbers(step: int, world_size: int, micro_bsz: int) -> np.ndarray:
    """The sample numbers n of one step: [W, micro_bsz] int64, row q those of rank q.

    The official trainer uses, with e the miniepoch and j the rank's own sample counter within it,
    n = 1 + e·40320 + j·W + q. If W·micro_bsz divides 40320 (it requires this), this equals

        n = 1 + step·W·micro_bsz + i·W + q        for the rank's i-th sample of the step.

    This form does not depend on the miniepoch, so it defines the order for any batch size:
    consecutive steps take consecutive ranges of n, without gaps.

    >>> sample_numbers(step=1, world_size=2, micro_bsz=3)
    array([[ 7,  9, 11],
           [ 8, 10, 12]])
    """
    batch = world_size * micro_bsz
    first = 1 + step * batch
    return np.arange(first, first + batch).reshape(micro_bsz, world_size).T


def largest_magic_prime(tokens: int, ctx_len: int) -> int | None:
    """The largest prime p ≡ 2 (mod 3) with p ≤ ⌊tokens/ctx_len⌋ − 1; None below 3 slots.

    >>> largest_magic_prime(1498226207, 512), largest_magic_prime(200499, 4096)
    (2926181, 47)
    """
    bound = tokens // ctx_len - 1
    for candidate in range(bound - (bound - 2) % 3, 1, -3):
        if _is_prime(candidate):
            return candidate
    return None


def _is_prime(number: int) -> bool:
    """Trial division: at most √number/2 steps, 16 thousand for 10⁹ slots."""
    if number < 4 or number % 2 == 0:
        return number in (2, 3)
    return all(number % divisor for divisor in range(3, math.isqrt(number) + 1, 2))


def choose_magic_prime(name: str, tokens: int, ctx_len: int, given: int | None = None) -> int:
    """The magic prime of a file of `tokens` tokens: the largest, or `given` after checking it.

    Fewer than 3 slots have no magic prime and are refused: there is nothing to shuffle, and a
    shorter `ctx_len` can use the text. A given prime needs p·ctx_len + 1 tokens, so that the last
    slot has its target, and, as in the official trainer, more than 0.9 of the slots (if the largest
    one has as many).

    Args:
        name: of the data, for the error.

    Raises:
        UserError: too few tokens for `ctx_len`, or `given` is not a magic prime of this file.
    """
    if ctx_len < 1:
        raise UserError(f"ctx_len {ctx_len}: must be at least 1")
    largest = largest_magic_prime(tokens, ctx_len)
    if largest is None:
        fix = f"ctx_len {tokens // 3} or less works" if tokens >= 3 else "give more text"
        raise UserError(
            f"{name}: {tokens} tokens are too few for ctx_len {ctx_len}, which needs at least "
            f"{3 * ctx_len} (3 samples): {fix}"
        )
    if given is None:
        return largest
    if given * ctx_len + 1 > tokens:
        reason = (
            f"needs {given * ctx_len + 1} tokens at ctx_len {ctx_len}, but the data has {tokens}"
        )
    elif not _is_prime(given):
        reason = "is not a prime"
    elif given % 3 != 2:
        reason = f"is {given % 3} mod 3, not 2"
    elif given < largest and given <= 0.9 * (tokens // ctx_len):
        reason = f"would visit only {given} of the {tokens // ctx_len} samples"
    else:
        return given
    raise UserError(f"{name}: magic_prime {given} {reason}; use {largest}, or leave it out")
