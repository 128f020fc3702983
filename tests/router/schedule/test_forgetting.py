"""Names come and go in a fleet; what a gateway knows of those that left must not pile up, nor outlive what it was."""

import asyncio
import contextlib

import msgspec

from promptai.engine.simulation import SimulationConfig
from promptai.fleet.replica import State
from promptai.fleet.simulated import SimulatedSource
from support_clock import run_virtually
from support_serve import World, listen

YI = SimulationConfig(prefill_tps=1000.0, decode_tps=10.0, model="yi")
TALK = [{"role": "user", "content": "Is cell 12 up? " * 10}]


def held(world: World) -> dict[str, int]:
    fleet_state = world.fleet_state
    return {
        "grants": len(fleet_state._leases),
        "prompts": len(fleet_state._prefilling),
        "streams": len(fleet_state._streams),
        "steps": len(fleet_state._curves),
        "breakers": len(fleet_state.breakers),
        "caches": len(fleet_state.index._caches),
        "queues": len(world.dispatcher._queues),
    }


async def move(world: World, *names: str) -> None:
    """Let the fleet be these replicas, all of them the one engine; each has a model of its own name."""
    (replica,) = world.source._replicas.values()
    pods = [msgspec.structs.replace(replica, id=name, model=name) for name in names]
    world.registry.replace([SimulatedSource([pod], name=pod.id) for pod in pods])
    await asyncio.sleep(0.1)
    for gone in {replica.id for replica in world.registry.snapshot.replicas} - set(names):
        world.registry.forget(gone)
    await asyncio.sleep(0.1)


def test_removed_replicas_leave_no_state() -> None:
    async def play() -> tuple[list[dict[str, int]], dict[str, int]]:
        world, during = World({"a": YI}), []
        async with world.running():
            for number in range(5):
                await move(world, f"pod-{number}")
                await listen(world.admitted(TALK, model=f"pod-{number}", max_tokens=10))
                during.append(held(world))
            await move(world)
            return during, held(world)

    during, after = run_virtually(play())

    assert [counts["streams"] for counts in during] == [1] * 5
    assert max(max(counts.values()) for counts in during) == 1
    assert set(after.values()) == {0}


def test_a_replica_removed_during_an_answer_leaves_no_state() -> None:
    async def play() -> tuple[dict[str, int], dict[str, int]]:
        world = World({"a": YI})
        async with world.running():
            await move(world, "pod")
            talk = asyncio.create_task(listen(world.admitted(TALK, model="pod", max_tokens=100)))
            await asyncio.sleep(3)
            await move(world)
            during = held(world)
            await talk
            return during, held(world)

    during, after = run_virtually(play())

    assert (during["grants"], during["streams"]) == (1, 1)
    assert {name: count for name, count in after.items() if name != "queues"} == dict.fromkeys(
        ("grants", "prompts", "streams", "steps", "breakers", "caches"), 0
    )


def test_a_stopped_engine_has_empty_caches() -> None:
    """It drains first, and comes back empty."""

    async def play() -> list[int]:
        world = World({"a": YI})
        async with world.running():
            await listen(world.admitted(TALK * 20, model="yi", max_tokens=10))
            chars = [world.fleet_state.index.chars("a")]
            for state in (State.DRAINING, State.COLD):
                world.source._set("a", state, "makes room for another model")
                chars.append(world.fleet_state.index.chars("a"))
            return chars

    ready, draining, cold = run_virtually(play())

    assert (ready == draining > 0, cold) == (True, 0)


def test_an_outage_counts_from_the_request_that_meets_it() -> None:
    """The first that met it left the queue long ago; the second one has all of its patience."""

    async def play() -> str | None:
        world = World({"a": YI, "b": YI})
        async with world.running():
            first = asyncio.create_task(listen(world.admitted(TALK, model="yi", max_tokens=1500)))
            await asyncio.sleep(1)
            mine, other = sorted(("a", "b"), key=world.fleet_state.running, reverse=True)
            second = asyncio.create_task(listen(world.admitted(TALK, model="yi", max_tokens=1500)))
            await asyncio.sleep(1)
            world.source.fail("a")
            world.source.fail("b")
            world.kill(mine)
            await asyncio.sleep(5)
            assert len(world.dispatcher.queued("yi")) == 1
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            await asyncio.sleep(60)
            world.kill(other)
            await asyncio.sleep(10)
            world.upstream.revive(f"sim://{mine}")
            world.source.recover(mine)
            return (await second).finish_reason

    assert run_virtually(play()) == "length"
