"""How fast this machine reads memory: the bound of every token that it will ever make.

Half a second of summing a buffer that no cache holds, with as many threads as an engine
would have. A sum reads and hardly computes, so that this comes near what the memory gives;
it is a floor under the truth and no substitute for calibrating an engine.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_BUFFER_BYTES = 256 * 1024 * 1024
_ROUNDS = 5


def read_bandwidth_bytes_per_s(threads: int) -> float:
    """The best of a few rounds of reading 256 MiB, in bytes a second."""
    import numpy as np  # noqa: PLC0415  0.2 s that only who measures should pay

    # Written once, or every page would be the one zero page and lie in the cache.
    chunks: list[Any] = np.array_split(np.ones(_BUFFER_BYTES // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:

        def once() -> float:
            start = time.perf_counter()
            list(pool.map(np.sum, chunks))
            return time.perf_counter() - start

        return _BUFFER_BYTES / min(once() for _ in range(_ROUNDS))
