"""Replicas that are pretended: for tests, and for asking what more boards would do.

The engines behind them are somebody else's business (``engine.simulated`` over HTTP, or one in
this process). Here they are only published, and fail and recover on command.
"""

import asyncio
from collections.abc import Callable, Container, Sequence

import msgspec

from promptai.fleet.replica import Replica, State


class SimulatedSource:
    """
    Publishes replicas as they were given.

    Args:
        replicas: With the URL of their engine.
    """

    def __init__(self, replicas: Sequence[Replica], *, name: str = "simulated") -> None:
        self.name = name
        self.configuration: object = tuple(replicas)
        self.exclusive = False
        self._replicas = {replica.id: replica for replica in replicas}
        self.replica_ids: Container[str] | None = frozenset(self._replicas)
        self._publish: Callable[[Sequence[Replica]], None] | None = None

    async def run(self, publish: Callable[[Sequence[Replica]], None]) -> None:
        """Publish them, and again whenever one fails or recovers."""
        self._publish = publish
        try:
            self._notify()
            await asyncio.get_running_loop().create_future()
        finally:
            self._publish = None

    def touch(self, replica_id: str) -> None:
        """Nothing here ends for want of use."""

    def wake(self, replica_id: str) -> None:
        """Nothing: they do not sleep."""

    def fail(self, replica_id: str, reason: str = "does not answer") -> None:
        """Let one be down."""
        self._set(replica_id, State.DOWN, reason)

    def recover(self, replica_id: str) -> None:
        """Let one be ready again."""
        self._set(replica_id, State.READY, "")

    def _set(self, replica_id: str, state: State, reason: str) -> None:
        known = self._replicas[replica_id]
        self._replicas[replica_id] = msgspec.structs.replace(known, state=state, reason=reason)
        self._notify()

    def _notify(self) -> None:
        if self._publish is not None:
            self._publish(tuple(self._replicas.values()))
