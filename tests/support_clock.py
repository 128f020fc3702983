"""An event loop on virtual time: whoever sleeps an hour wakes at once, and an hour later.

What only sleeps, times out and hands things to each other runs in no time and always in the same
order. Sockets of this loop that are connected with each other may be among it: what one end wrote is
there at once, and before the clock moves it is looked whether it is. Nothing else may be waited for:
neither a thread nor another process.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


#: The kernel may take a moment to carry a byte from one end of a socket to the other.
_CARRIED_S = 0.001


class _Selector(selectors.DefaultSelector):
    """Skips the wait and moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        # The loop itself has one socket, by which signals wake it.
        carried = timeout != 0 and len(self.get_map()) > 1
        ready = super().select(_CARRIED_S if carried else 0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("everything waits, and nothing will ever happen: a deadlock")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its ``time`` moves when everybody sleeps."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._virtual.now


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
