"""Measure this machine's memory read bandwidth, which bounds the decode rate of every model.

The measurement takes the maximum of a buffer larger than any cache, with as many threads
as an engine would use. ``max`` reads fastest among NumPy's reductions (33 GB/s where sums
and dot products reached 24 to 30, two Zen 3 cores). The result is close to the true bandwidth on
an idle machine and below it on a busy one: an estimate that does not replace calibrating an engine.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_BUFFER_BYTES = 256 * 1024 * 1024
_ROUNDS = 9


def read_bandwidth_bytes_per_s(threads: int) -> float:
    """Return the best of several rounds of reading 256 MiB, in bytes per second."""
    import numpy as np  # noqa: PLC0415  takes 0.2 s, which only this measurement needs

    # Written first: untouched pages would all be the shared zero page, which stays in the cache.
    chunks: list[Any] = np.array_split(np.ones(_BUFFER_BYTES, np.uint8), threads)
    with ThreadPoolExecutor(threads) as pool:

        def once() -> float:
            start = time.perf_counter()
            list(pool.map(np.max, chunks))
            return time.perf_counter() - start

        return _BUFFER_BYTES / min(once() for _ in range(_ROUNDS))
