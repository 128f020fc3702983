"""A gateway in front of simulated engines, with real sockets on both sides."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

import msgspec

from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.simulated import SimulatedEngine
from promptai.engine.simulation import SimulationConfig
from promptai.fleet.local import LocalSource
from promptai.fleet.registry import Registry
from promptai.fleet.replica import Rates, Replica, State
from promptai.fleet.simulated import SimulatedSource
from promptai.gateway.auth import Guard
from promptai.gateway.streaming import Heartbeat
from promptai.router.estimate.policy import Affinity
from promptai.router.estimate.rates import RateBook
from promptai.router.schedule.dispatcher import Dispatcher, QueueLimits
from promptai.router.schedule.fleet_state import FleetState
from support_fleet import FakeLauncher, model
from support_site import CHAT, Door, asking, door

#: Name of the model that never finishes loading.
COLD = "cold"


class Site(NamedTuple):
    """
    A gateway, its engines and the parts that tests inspect.

    Attributes:
        engines: The engines by replica id: ``a``, ``b`` and so on.
    """

    door: Door
    engines: dict[str, SimulatedEngine]
    registry: Registry
    dispatcher: Dispatcher
    guard: Guard

    def busy(self, name: str = "a") -> int:
        """Requests that an engine computes or queues."""
        scheduler = self.engines[name].simulator.scheduler
        return sum(slot.request is not None for slot in scheduler.slots) + len(scheduler.queue)

    def counts(self, served: str = "yi") -> dict[str, int]:
        """Every counter of a model's requests; all are 0 when there are none."""
        fleet_state = self.dispatcher.fleet_state
        return {
            "engine": sum(map(self.busy, self.engines)),
            "leases": sum(fleet_state.running(replica.id) for replica in self.registry.snapshot.replicas),
            "queue": len(self.dispatcher.queued(served)),
            "gateway": self.door.gateway.open_requests,
            "meter": self.guard.meter.running("local"),
        }

    def state(self, replica_id: str) -> State | None:
        """State of a replica; ``None`` when there is no such replica."""
        found = self.registry.snapshot.find(replica_id)
        return found.state if found is not None else None


@contextlib.asynccontextmanager
async def site(*configs: SimulationConfig, queue: int = 64) -> AsyncGenerator[Site, None]:
    """Run a gateway in front of these engines and of a model that never finishes loading."""
    loading = LocalSource([model(COLD)], FakeLauncher(load_s=3600.0), lambda: 10**12, lambda _: 0)
    async with contextlib.AsyncExitStack() as stack:
        engines = {
            chr(ord("a") + number): await stack.enter_async_context(SimulatedEngine(config))
            for number, config in enumerate(configs)
        }
        registry = Registry([SimulatedSource([_replica(*pair) for pair in engines.items()]), loading])
        running = asyncio.create_task(registry.run())
        stack.push_async_callback(_end, running)
        upstream = await stack.enter_async_context(HttpUpstream())
        dispatcher = Dispatcher(FleetState(registry, RateBook()), Affinity(), QueueLimits(queue=queue))
        stack.callback(dispatcher.close)
        guard = Guard(None, open=True)
        opened = await stack.enter_async_context(
            door(dispatcher, upstream, guard=guard, heartbeat=Heartbeat(ping_s=0.2, status_s=0.2))
        )
        found = Site(opened, engines, registry, dispatcher, guard)
        await soon(lambda: found.state("a") is State.READY and found.state(f"local/{COLD}") is State.COLD)
        yield found
        assert opened.troubles == []


async def soon(happens: Callable[[], bool], within_s: float = 10.0) -> float:
    """Wait until a condition holds; return the seconds that it took."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    while not happens():
        assert loop.time() - begun < within_s, f"not within {within_s:g} s"
        await asyncio.sleep(0.005)
    return loop.time() - begun


def request_of(**fields: object) -> bytes:
    """A chat request as bytes."""
    body = msgspec.json.encode(asking(CHAT, fields))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def _replica(name: str, engine: SimulatedEngine) -> Replica:
    config = engine.config
    return Replica(
        id=name,
        url=engine.base_url,
        model=config.model,
        slots=config.slots,
        context=config.context,
        host_cache_tokens=config.host_cache,
        rates=Rates(prefill_tps=config.prefill_tps, decode_tps=config.decode_tps, source="settings"),
    )


async def _end(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])
