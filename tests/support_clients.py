"""Concurrent requests of several clients to admission and routing, on virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from promptai.engine.simulation import SimulationConfig
from promptai.gateway.admission import AdmittedRequest
from support_clock import run_virtually
from support_cold import Cold
from support_serve import Heard, World, listen

T = TypeVar("T")
Place = TypeVar("Place", World, Cold)

#: 100 prompt tokens a second, then ten tokens a second, one or two at once.
ALONE = SimulationConfig(prefill_tps=100.0, decode_tps=10.0, model="yi")
BOARD = SimulationConfig(prefill_tps=100.0, decode_tps=10.0, slots=2, decode_slowdown=0.0, model="yi")
TALK = [{"role": "user", "content": "Is cell 12 up?"}]


def play(world: Callable[[], Place], use: Callable[[Place], Awaitable[T]]) -> T:
    """Run ``use`` in a world on virtual time; afterwards no request may be queued or hold a slot."""

    async def main() -> T:
        made = world()
        async with made.running():
            found = await use(made)
            await asyncio.sleep(1)
            models = made.registry.snapshot.models
            assert [len(made.dispatcher.queued(name)) for name in models] == [0] * len(models)
            assert [
                made.fleet_state.running(replica.id) for replica in made.registry.snapshot.replicas if replica.slots
            ]
            return found

    return run_virtually(main())


def one(config: SimulationConfig = BOARD, **settings: Any) -> Callable[[], World]:
    """A world of one engine."""
    return lambda: World({"a": config}, **settings)


class Clients:
    """Requests in flight, and the order in which they ended."""

    def __init__(self, world: World | Cold) -> None:
        self.world = world
        self.ended: list[str] = []
        self.tasks: dict[str, asyncio.Task[Heard]] = {}

    def ask(self, name: str, *, key: str = "local", tokens: int = 10, **fields: Any) -> asyncio.Task[Heard]:
        """Send a request in a task of its own."""
        wanted = fields.pop("model", "yi")
        messages = fields.pop("messages", TALK)
        if isinstance(self.world, Cold):
            admitted = self.world.admitted(wanted, messages, key=key, max_tokens=tokens, **fields)
        else:
            admitted = self.world.admitted(messages, model=wanted, key=key, max_tokens=tokens, **fields)
        self.tasks[name] = asyncio.create_task(self._hear(name, admitted))
        return self.tasks[name]

    async def _hear(self, name: str, admitted: AdmittedRequest) -> Heard:
        heard = await listen(admitted)
        lease = admitted.routed.lease
        assert lease is not None
        self.ended.append(name)
        return heard

    async def all(self) -> dict[str, Heard | BaseException]:
        """Wait for all requests; their answers, or the exceptions that ended them."""
        await asyncio.wait(self.tasks.values())
        return {name: task.exception() or task.result() for name, task in self.tasks.items()}
