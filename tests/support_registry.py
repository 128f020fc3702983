"""Shared by the tests of the registry: a scripted source, and views of the fleet."""

import asyncio
from collections.abc import Callable, Container, Coroutine, Sequence
from typing import Any

from promptai.fleet.registry import Registry
from promptai.fleet.replica import Replica, State
from support_clock import run_virtually
from support_fleet import beside

Publish = Callable[[Sequence[Replica]], None]


def replica(name: str, *, model: str = "yi", state: State = State.READY) -> Replica:
    """A replica, ready unless ``state`` is given."""
    return Replica(id=name, url=f"http://{name}", model=model, state=state)


class ScriptedSource:
    """A source that publishes given replicas and fails on command."""

    def __init__(
        self,
        name: str,
        *replicas: Replica,
        configuration: object = None,
        exclusive: bool = False,
        replica_ids: Container[str] | None = None,
    ) -> None:
        self.name = name
        self.configuration = configuration
        self.exclusive = exclusive
        self.replica_ids = replica_ids
        self.replicas = replicas
        self.publish: Publish = lambda _: None
        self.error: Exception | None = None
        self.woken: list[str] = []
        self.touched: list[str] = []
        self.began: list[float] = []
        self.ended = 0

    def touch(self, replica_id: str) -> None:
        """Record the call."""
        self.touched.append(replica_id)

    async def run(self, publish: Publish) -> None:
        """Publish the replicas once, if there are any; raise ``error`` once it is set."""
        self.publish = publish
        self.began.append(asyncio.get_running_loop().time())
        try:
            if self.replicas:
                publish(self.replicas)
            while self.error is None:  # noqa: ASYNC110  virtual time
                await asyncio.sleep(0.5)
            raise self.error
        finally:
            self.ended += 1

    def wake(self, replica_id: str) -> None:
        """Record the call."""
        self.woken.append(replica_id)


def ids(registry: Registry) -> list[str]:
    """Current ids of all replicas."""
    return [found.id for found in registry.snapshot.replicas]


def states(registry: Registry) -> dict[str, State]:
    """Current states of all replicas."""
    return {found.id: found.state for found in registry.snapshot.replicas}


def play(registry: Registry, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run the registry while a test plays."""
    run_virtually(beside(registry.run(), test))
