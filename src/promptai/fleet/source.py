"""The interface between the registry and the sources of replicas."""

from collections.abc import Callable, Container, Sequence
from typing import Protocol

from promptai.fleet.replica import Replica


class Source(Protocol):
    """
    Publishes replicas.

    Attributes:
        name: Identifies the source across reloads of the settings.
        configuration: Compared on a reload; a source whose name and configuration are unchanged keeps running.
        exclusive: A successor of the same name starts only after this source has ended, because both would use the
            same resource, such as the memory of this machine.
        replica_ids: Ids of all replicas that it will publish; ``None``: unknown until its servers have answered.
    """

    name: str
    configuration: object
    exclusive: bool
    replica_ids: Container[str] | None

    async def run(self, publish: Callable[[Sequence[Replica]], None]) -> None:
        """Publish all replicas whenever one changes, until cancelled; stops everything that it started."""

    def wake(self, replica_id: str) -> None:
        """Start loading a cold replica unless it is loading already; returns at once."""

    def touch(self, replica_id: str) -> None:
        """Record that a replica was assigned a request or finished one."""
