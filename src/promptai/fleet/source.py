"""Where replicas come from, as the registry sees it."""

from collections.abc import Callable, Container, Sequence
from typing import Protocol

from promptai.fleet.replica import Replica


class Source(Protocol):
    """
    One origin of replicas.

    Attributes:
        name: What the registry keeps its replicas under.
        configuration: What it was made from; an equal one goes on when settings are read again.
        exclusive: Whether another of its name may begin only when this one has ended, because they would
            compete for something: the memory of this machine.
        replica_ids: Of all replicas that it will publish; ``None``: it has to ask first.
    """

    name: str
    configuration: object
    exclusive: bool
    replica_ids: Container[str] | None

    async def run(self, publish: Callable[[Sequence[Replica]], None]) -> None:
        """Publish all of its replicas whenever one changes, until cancelled; ends what it started."""

    def wake(self, replica_id: str) -> None:
        """A cold replica of this source is wanted: begin to start it, if that has not begun; returns at once."""

    def touch(self, replica_id: str) -> None:
        """A replica of this source has been given a request, or has finished one."""
