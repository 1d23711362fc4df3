"""Prefetches batches in a thread, ahead of the step that uses them."""

import concurrent.futures
from collections import deque
from collections.abc import Callable, Generator
from typing import TypeVar

STALL_SECONDS = 10.0  # a step reports that it waits for its batch after this time

Batch = TypeVar("Batch")


def prefetch(
    make: Callable[[int], Batch],
    start: int,
    depth: int = 2,
    stalled: Callable[[float], None] = lambda seconds: None,
) -> Generator[Batch, None, None]:
    """Yields make(start), make(start + 1), …, computed in a thread up to `depth` ahead.

    An exception of `make` is raised by the `next` that would have returned its batch. Closing the
    iterator (`contextlib.closing`) cancels pending batches and waits for the thread.

    Args:
        stalled: called with the seconds waited when a batch is late: after `STALL_SECONDS`, and
            each time this has doubled.
    """

    def wait(batch: concurrent.futures.Future[Batch]) -> Batch:
        waited, limit = 0.0, STALL_SECONDS
        while not concurrent.futures.wait([batch], limit - waited).done:
            stalled(limit)
            waited, limit = limit, 2 * limit
        return batch.result()

    pool = concurrent.futures.ThreadPoolExecutor(1, "prefetch")
    try:
        pending = deque(pool.submit(make, start + ahead) for ahead in range(depth))
        while True:
            batch = wait(pending.popleft())
            start += 1
            pending.append(pool.submit(make, start + depth - 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
