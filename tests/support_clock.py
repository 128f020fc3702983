"""An event loop on virtual time: a sleep of an hour ends at once, an hour later by the loop's clock.

Tasks that only sleep, time out and exchange data run without delay and always in the same order. They may use
sockets that this loop connects with each other: before the clock moves, the loop looks for data that one end
has written. They must not wait for a thread or another process.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


#: The kernel may take a moment to carry a byte from one end of a socket to the other.
_CARRIED_S = 0.001


class _Selector(selectors.DefaultSelector):
    """Moves the clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        # The loop has one socket of its own, which signals use to wake it.
        carried = timeout != 0 and len(self.get_map()) > 1
        ready = super().select(_CARRIED_S if carried else 0)
        if ready:
            return ready
        if timeout is None:
            raise RuntimeError("deadlock: every task waits, and no timer is set")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose ``time`` moves only when every task waits."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Virtual seconds since the loop was created."""
        return self._virtual.now


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """Run ``main`` on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
