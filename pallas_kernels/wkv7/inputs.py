"""The token arrays of WKV-7 as one pytree."""

from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """r, w, k, v, a, b as `api.wkv7` defines them: arrays [B,T,H,N].

    Gradients, BlockSpecs and references to blocks come in the same tree. A field is None where a
    kernel does not use that array.
    """

    r: Any  # receptance
    w: Any  # decay logit
    k: Any  # key
    v: Any  # value
    a: Any  # removal key
    b: Any  # replacement key
