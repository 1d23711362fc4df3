"""Times calls on a GPU: medians, with warm clocks and cold caches."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

WARM_UP, RUNS = 3, 20
RUN_SECONDS = 5e-3  # a run is as many calls as this takes: to launch one is not free


def median_seconds(
    call: Callable[[int], Any], wait: Callable[[Any], Any], raise_clocks: Callable[[], None]
) -> float:
    """Of call(i), i = 0, 1, …, over runs.

    Args:
        wait: returns when what it is given, a result of `call`, is computed.
        raise_clocks: keeps the device busy until its clocks are up.
    """

    def run(calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            result = call(i)  # what a call before it made may go
        wait(result)
        return (time.perf_counter() - start) / calls

    run(1)  # compiles: the clocks fall meanwhile
    raise_clocks()
    single = min(run(1) for _ in range(WARM_UP))
    calls = max(1, round(RUN_SECONDS / single))
    return statistics.median(run(calls) for _ in range(RUNS))


def beyond_cache(on_gpu: bool) -> int:
    """Bytes that no cache holds: of a GPU's, the largest is 128 MiB."""
    return 2**28 if on_gpu else 2**16


def copies(on_gpu: bool, array_bytes: int) -> int:
    """Of six inputs of so many bytes each, to be used in turn: so many that no cache holds them."""
    return max(2, math.ceil(beyond_cache(on_gpu) / (6 * array_bytes)))
