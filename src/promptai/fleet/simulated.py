"""Simulated replicas: for tests, and for trying out a fleet without the boards.

This source only publishes them and lets them fail and recover on command. The engines behind them run elsewhere
(``engine.simulated`` over HTTP, or in this process).
"""

import asyncio
from collections.abc import Callable, Container, Sequence

import msgspec

from promptai.fleet.replica import Replica, State


class SimulatedSource:
    """
    Publishes a fixed set of replicas.

    Args:
        replicas: Each with the URL of its engine.
    """

    def __init__(self, replicas: Sequence[Replica], *, name: str = "simulated") -> None:
        self.name = name
        self.configuration: object = tuple(replicas)
        self.exclusive = False
        self._replicas = {replica.id: replica for replica in replicas}
        self.replica_ids: Container[str] | None = frozenset(self._replicas)
        self._publish: Callable[[Sequence[Replica]], None] | None = None

    async def run(self, publish: Callable[[Sequence[Replica]], None]) -> None:
        """Publish all replicas at the start and whenever one fails or recovers."""
        self._publish = publish
        try:
            self._notify()
            await asyncio.get_running_loop().create_future()
        finally:
            self._publish = None

    def touch(self, replica_id: str) -> None:
        """Do nothing: these replicas never expire."""

    def wake(self, replica_id: str) -> None:
        """Do nothing: these replicas are never cold."""

    def fail(self, replica_id: str, reason: str = "does not answer") -> None:
        """Take a replica down."""
        self._set(replica_id, State.DOWN, reason)

    def recover(self, replica_id: str) -> None:
        """Make a replica ready again."""
        self._set(replica_id, State.READY, "")

    def _set(self, replica_id: str, state: State, reason: str) -> None:
        known = self._replicas[replica_id]
        self._replicas[replica_id] = msgspec.structs.replace(known, state=state, reason=reason)
        self._notify()

    def _notify(self) -> None:
        if self._publish is not None:
            self._publish(tuple(self._replicas.values()))
