"""What a model and a run are made of: `ModelConfig`, `SIZES`."""

import dataclasses
import math

from rwkv_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture of an RWKV-7 (x070) model: all that is needed to build its tensors.

    Letters as in the shapes throughout: L layers, C width, V vocabulary, H heads of size N,
    F the channel mix's inner width.
    """

    n_layer: int
    n_embd: int
    vocab_size: int = 65536
    head_size: int = 64
    dim_ffn: int = 0  # 0: 4·n_embd
    dim_w: int = 0  # low-rank width of the decay; 0 (each of the four): `default_low_rank`
    dim_a: int = 0  # … of the in-context learning rate
    dim_v: int = 0  # … of the value residual
    dim_g: int = 0  # … of the output gate

    def __post_init__(self) -> None:
        if self.n_layer < 1 or self.n_embd < 1 or self.vocab_size < 1 or self.head_size < 1:
            raise UserError(f"n_layer, n_embd, vocab_size and head_size must be positive: {self}")
        if self.n_embd % self.head_size:
            raise UserError(
                f"n_embd {self.n_embd} is not a multiple of head_size {self.head_size}: "
                "choose an n_embd that is"
            )
        defaults = {"dim_ffn": 4 * self.n_embd, **default_low_rank(self.n_embd)}
        for name, value in defaults.items():
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size


def default_low_rank(n_embd: int) -> dict[str, int]:
    """The low-rank widths of a fresh model: max(32, round(f·√C/32)·32), half to even."""

    def width(factor: float) -> int:
        return max(32, round(factor * math.sqrt(n_embd) / 32) * 32)

    return {"dim_w": width(2.5), "dim_a": width(2.5), "dim_v": width(1.7), "dim_g": width(5.0)}
