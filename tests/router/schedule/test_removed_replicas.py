"""Replicas come and go in a fleet; state about removed ones must neither accumulate nor outlive them."""

import asyncio
import contextlib

import msgspec

from promptai.engine.simulation import SimulationConfig
from promptai.fleet.replica import State
from promptai.fleet.simulated import SimulatedSource
from support_clock import run_virtually
from support_serve import World, listen

YI = SimulationConfig(prefill_tps=1000.0, decode_tps=10.0, model="yi")
MESSAGES = [{"role": "user", "content": "Is cell 12 up? " * 10}]


def entry_counts(world: World) -> dict[str, int]:
    """Number of entries in each table of the router's state."""
    fleet_state = world.fleet_state
    return {
        "leases": len(fleet_state._leases),
        "prefilling": len(fleet_state._prefilling),
        "streams": len(fleet_state._streams),
        "curves": len(fleet_state._curves),
        "breakers": len(fleet_state.breakers),
        "caches": len(fleet_state.index._caches),
        "queues": len(world.dispatcher._queues),
    }


async def rename_replicas(world: World, *names: str) -> None:
    """Replace the fleet by replicas with these names, all on the one engine; each serves a model of its own name."""
    (replica,) = world.source._replicas.values()
    pods = [msgspec.structs.replace(replica, id=name, model=name) for name in names]
    world.registry.replace([SimulatedSource([pod], name=pod.id) for pod in pods])
    await asyncio.sleep(0.1)
    for gone in {replica.id for replica in world.registry.snapshot.replicas} - set(names):
        world.registry.forget(gone)
    await asyncio.sleep(0.1)


def test_removed_replicas_leave_no_state_behind() -> None:
    async def scenario() -> tuple[list[dict[str, int]], dict[str, int]]:
        world, during = World({"a": YI}), []
        async with world.running():
            for number in range(5):
                await rename_replicas(world, f"pod-{number}")
                await listen(world.admitted(MESSAGES, model=f"pod-{number}", max_tokens=10))
                during.append(entry_counts(world))
            await rename_replicas(world)
            return during, entry_counts(world)

    during, after = run_virtually(scenario())

    assert [counts["streams"] for counts in during] == [1] * 5
    assert max(max(counts.values()) for counts in during) == 1
    assert set(after.values()) == {0}


def test_a_replica_removed_during_an_answer_leaves_no_state_behind() -> None:
    async def scenario() -> tuple[dict[str, int], dict[str, int]]:
        world = World({"a": YI})
        async with world.running():
            await rename_replicas(world, "pod")
            answer = asyncio.create_task(listen(world.admitted(MESSAGES, model="pod", max_tokens=100)))
            await asyncio.sleep(3)
            await rename_replicas(world)
            during = entry_counts(world)
            await answer
            return during, entry_counts(world)

    during, after = run_virtually(scenario())

    assert (during["leases"], during["streams"]) == (1, 1)
    assert {name: count for name, count in after.items() if name != "queues"} == dict.fromkeys(
        ("leases", "prefilling", "streams", "curves", "breakers", "caches"), 0
    )


def test_an_engine_stopped_for_another_model_has_empty_caches() -> None:
    """It drains first, with its cache; when it starts again, the cache is empty."""

    async def scenario() -> list[int]:
        world = World({"a": YI})
        async with world.running():
            await listen(world.admitted(MESSAGES * 20, model="yi", max_tokens=10))
            chars = [world.fleet_state.index.chars("a")]
            for state in (State.DRAINING, State.COLD):
                world.source._set("a", state, "makes room for another model")
                chars.append(world.fleet_state.index.chars("a"))
            return chars

    ready, draining, cold = run_virtually(scenario())

    assert (ready == draining > 0, cold) == (True, 0)


def test_the_outage_limit_starts_anew_for_each_request() -> None:
    """The first request to hit the outage has left the queue; the second one may wait the full limit."""

    async def scenario() -> str | None:
        world = World({"a": YI, "b": YI})
        async with world.running():
            first = asyncio.create_task(listen(world.admitted(MESSAGES, model="yi", max_tokens=1500)))
            await asyncio.sleep(1)
            first_replica, other_replica = sorted(("a", "b"), key=world.fleet_state.running, reverse=True)
            second = asyncio.create_task(listen(world.admitted(MESSAGES, model="yi", max_tokens=1500)))
            await asyncio.sleep(1)
            world.source.fail("a")
            world.source.fail("b")
            world.kill(first_replica)
            await asyncio.sleep(5)
            assert len(world.dispatcher.queued("yi")) == 1
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            await asyncio.sleep(60)
            world.kill(other_replica)
            await asyncio.sleep(10)
            world.upstream.revive(f"sim://{first_replica}")
            world.source.recover(first_replica)
            return (await second).finish_reason

    assert run_virtually(scenario()) == "length"
