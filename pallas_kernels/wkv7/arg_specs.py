"""The shapes that WKV-7 runs at in training: what benchmarks time and compilers are tried on."""

from typing import NamedTuple


class ArgSpec(NamedTuple):
    """B sequences of T tokens over H heads of size N."""

    batch: int
    time: int
    head: int
    size: int = 64


ARG_SPECS = {
    # What others publish their times for, and a 7.2b model has: the first to be timed.
    "7.2b_micro_batch_8": ArgSpec(8, 4096, 64),
    "0.1b_micro_batch_8": ArgSpec(8, 4096, 12),
    "0.1b_micro_batch_16": ArgSpec(16, 4096, 12),
    "0.1b_short": ArgSpec(1, 512, 12),
    "0.1b_long_context": ArgSpec(1, 65536, 12),
}
