"""Shapes of WKV-7 in training, for benchmarks and for tests of compilers."""

from typing import NamedTuple


class ArgSpec(NamedTuple):
    """B sequences of T tokens over H heads of size N."""

    batch: int
    time: int
    head: int
    size: int = 64


ARG_SPECS = {
    # A 7.2b model's, for which others publish times. Benchmarks time it first.
    "7.2b_micro_batch_8": ArgSpec(8, 4096, 64),
    "0.1b_micro_batch_8": ArgSpec(8, 4096, 12),
    "0.1b_micro_batch_16": ArgSpec(16, 4096, 12),
    "0.1b_short": ArgSpec(1, 512, 12),
    "0.1b_long_context": ArgSpec(1, 65536, 12),
}
