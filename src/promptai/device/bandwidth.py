"""How fast this machine reads memory: what bounds every token that it will ever make.

A moment of looking for the largest byte of a buffer that no cache holds, with as many threads
as an engine would have: of NumPy's reductions the one that read fastest (33 GB/s where sums
and dot products reached 24 to 30, two Zen 3 cores). It comes near what memory gives on an idle machine and stays
below it on a busy one: an estimate, and no substitute for calibrating an engine.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_BUFFER_BYTES = 256 * 1024 * 1024
_ROUNDS = 9


def read_bandwidth_bytes_per_s(threads: int) -> float:
    """The best of a few rounds of reading 256 MiB, in bytes a second."""
    import numpy as np  # noqa: PLC0415  0.2 s that only who measures should pay

    # Written once, or every page would be the one zero page and lie in the cache.
    chunks: list[Any] = np.array_split(np.ones(_BUFFER_BYTES, np.uint8), threads)
    with ThreadPoolExecutor(threads) as pool:

        def once() -> float:
            start = time.perf_counter()
            list(pool.map(np.max, chunks))
            return time.perf_counter() - start

        return _BUFFER_BYTES / min(once() for _ in range(_ROUNDS))
