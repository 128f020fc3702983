"""Queueing and refusals of the whole admission path, and the accuracy of the announced waiting times."""

import asyncio
import itertools
from typing import Any

import msgspec
import pytest

from promptai.engine.simulator import Fault
from promptai.errors import NoCapacityError, RequestRefusedError, SaturatedError
from promptai.router.schedule.dispatcher import QueueLimits
from support_clients import ALONE, BOARD, TALK, Clients, one, play
from support_cold import Cold
from support_fleet import model
from support_serve import Heard, World, listen


def refusals(found: dict[str, Heard | BaseException]) -> list[str]:
    return [name for name, how in found.items() if isinstance(how, SaturatedError)]


@pytest.mark.parametrize("bound", [0, 1, 5, 64])
def test_refuses_requests_beyond_the_slots_and_the_queue_limit(bound: int) -> None:
    async def use(world: World) -> list[str]:
        clients = Clients(world)
        for number in range(2 + bound + 3):
            clients.ask(str(number), key=f"key {number}")
            await asyncio.sleep(0)
        return refusals(await clients.all())

    assert play(one(limits=QueueLimits(queue=bound)), use) == [str(bound + number) for number in (2, 3, 4)]


@pytest.mark.parametrize(("tokens", "slots"), [(20, 1), (100, 1), (50, 2)])
def test_retry_after_is_accurate_within_a_factor_of_two(tokens: int, slots: int) -> None:
    """A retry after that time is admitted; a retry after half of it is not."""

    async def use(world: World) -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        clients = Clients(world)
        for number in range(8):
            clients.ask(f"before {number}", key=f"key {number}", tokens=tokens)
        await asyncio.sleep(0.5)
        with pytest.raises(SaturatedError) as refused:
            await clients.ask("first", key="late", tokens=tokens)
        since = loop.time()
        while True:
            try:
                await asyncio.sleep(0.1)
                admitted = world.admitted(TALK, model="yi", key="late", max_tokens=1)
                await asyncio.wait_for(anext(admitted.routed.events()), 0.01)
            except TimeoutError:
                break
            except SaturatedError:
                continue
        actual_s = loop.time() - since
        del clients.tasks["first"]
        await clients.all()
        return refused.value.retry_after_s, actual_s

    config = msgspec.structs.replace(BOARD, slots=slots)
    retry_after_s, actual_s = play(one(config, limits=QueueLimits(queue=8 - slots)), use)

    assert actual_s / 2 <= retry_after_s <= max(2 * actual_s, 1.0)


def test_a_queue_full_of_one_key_still_accepts_another_key() -> None:
    """The newest requests of the heavy key are dropped; none of the light key is refused."""

    async def use(world: World) -> tuple[list[str], list[str]]:
        clients = Clients(world)
        for number in range(10):
            clients.ask(f"heavy {number}", key="heavy")
        await asyncio.sleep(0.1)
        for number in range(3):
            clients.ask(f"light {number}", key="light")
        found = await clients.all()
        return refusals(found), [name for name in clients.ended if name.startswith("light")]

    refused, answered = play(one(limits=QueueLimits(queue=8)), use)

    assert refused == ["heavy 9", "heavy 8", "heavy 7"][::-1]
    assert answered == ["light 0", "light 1", "light 2"]


def test_a_heavy_key_delays_a_light_key_by_at_most_one_request() -> None:
    async def use(world: World) -> tuple[list[float], list[str]]:
        clients = Clients(world)
        for number in range(100):
            clients.ask(f"heavy {number}", key="heavy", tokens=50)
        await asyncio.sleep(7)
        firsts = []
        for number in range(5):
            heard = await clients.ask(f"light {number}", key="light", tokens=5)
            firsts.append(heard.first_s or 0.0)
            await asyncio.sleep(3.3)
        for task in clients.tasks.values():
            task.cancel()
        await asyncio.wait(clients.tasks.values())
        return firsts, clients.ended

    firsts, ended = play(one(ALONE, limits=QueueLimits(queue=200)), use)

    one_request_s = 50 / 10 + 0.2
    assert max(firsts) <= one_request_s + 0.2
    assert [name for name in ended if name.startswith("light")] == [f"light {number}" for number in range(5)]
    assert len([name for name in ended if name.startswith("heavy")]) >= 5


def test_batch_requests_wait_at_most_five_minutes() -> None:
    """Interactive requests never pause; the batch request is answered after five minutes."""

    async def use(world: World) -> tuple[float, int]:
        clients = Clients(world)
        batch = {"x-promptai-priority": "batch"}
        for number in range(3):
            clients.ask(f"before {number}", tokens=40)
        admitted = clients.ask("batch", key="night", tokens=10, headers=batch)
        number = 0
        while not admitted.done():
            clients.ask(f"after {number}", tokens=40)
            number += 1
            await asyncio.sleep(4.0)
        behind = clients.ended.index("batch")
        await clients.all()
        return (await admitted).first_s or 0.0, behind

    waited, behind = play(one(ALONE), use)

    assert 300 <= waited <= 310
    assert behind > 70


def test_refuses_a_request_when_its_deadline_has_passed() -> None:
    async def use(world: World) -> tuple[BaseException | Heard, float]:
        clients = Clients(world)
        clients.ask("before", tokens=100)
        clients.ask("hurried", headers={"x-promptai-deadline": "2500ms"})
        loop = asyncio.get_running_loop()
        since = loop.time()
        await asyncio.wait([clients.tasks["hurried"]])
        waited = loop.time() - since
        return (await clients.all())["hurried"], waited

    refused, waited = play(one(ALONE), use)

    assert isinstance(refused, SaturatedError)
    assert waited == pytest.approx(2.5, abs=0.01)
    assert refused.message == "no slot for yi became free within 2.5 s"
    assert 5 <= refused.retry_after_s <= 12


@pytest.mark.parametrize("name", ["x-promptai-deadline", "x-promptai-budget"])
@pytest.mark.parametrize("value", ["soon", "0", "-1s", "1e3", "9" * 400, "nan"])
def test_refuses_an_invalid_time(name: str, value: str) -> None:
    async def use(world: World) -> RequestRefusedError:
        with pytest.raises(RequestRefusedError) as refused:
            world.admitted(TALK, model="auto", headers={name: value})
        return refused.value

    refused = play(one(), use)

    assert (refused.status, refused.code, refused.param) == (400, "wrong_header", name)
    assert len(refused.message) < 200


def test_many_requests_for_a_cold_model_load_it_once() -> None:
    async def use(world: Cold) -> tuple[list[str], list[float]]:
        clients = Clients(world)
        for number in range(50):
            clients.ask(str(number), key=f"key {number % 7}")
        found = await clients.all()
        return world.launcher.starts, [how.first_s or 0.0 for how in found.values() if isinstance(how, Heard)]

    starts, firsts = play(lambda: Cold(model("yi", slots=2), config=BOARD), use)

    assert starts == ["yi"]
    assert len(firsts) == 50
    assert min(firsts) == pytest.approx(10.0, abs=1.0)


def test_never_unloads_a_busy_model() -> None:
    """Memory holds one model; a request for the other waits until the long answer has ended."""

    async def use(world: Cold) -> tuple[list[Any], Heard, Heard]:
        clients = Clients(world)
        long = clients.ask("long", model="a", tokens=300)
        await asyncio.sleep(12)
        other = clients.ask("other", model="b")
        await asyncio.wait([long, other])
        return [(what, name) for _, what, name in world.launcher.log], await long, await other

    log, long, other = play(lambda: Cold(model("a", 3), model("b", 3), config=ALONE), use)

    assert log == [("start", "a"), ("stop", "a"), ("start", "b")]
    assert len(long.text.split()) == 300
    assert (other.first_s or 0.0) > 28


def test_a_retried_request_precedes_queued_requests() -> None:
    async def use(world: World) -> list[str]:
        world.engines["sim://a"].fault = Fault(kind="cut", after_tokens=0, times=1)
        clients = Clients(world)
        clients.ask("failing", key="x")
        await asyncio.sleep(0)
        for number in range(4):
            clients.ask(str(number), key=str(number))
        await clients.all()
        return clients.ended

    boards = {"a": ALONE}

    assert play(lambda: World(boards), use)[0] == "failing"


def test_a_client_that_disconnects_in_the_queue_leaves_nothing_behind() -> None:
    async def use(world: World) -> tuple[list[str], int]:
        clients = Clients(world)
        for name in ("running", "leaving", "staying"):
            clients.ask(name, key=name)
            await asyncio.sleep(0)
        clients.tasks["leaving"].cancel()
        await asyncio.sleep(0.1)
        waiting = [entry.request.key for entry in world.dispatcher.queued("yi")]
        await asyncio.wait(clients.tasks.values())
        return waiting, len(world.engines["sim://a"].sent)

    waiting, sent = play(one(ALONE), use)

    assert (waiting, sent) == (["staying"], 2)


def test_the_estimated_time_left_decreases_in_the_queue() -> None:
    async def use(world: World) -> list[tuple[float, float]]:
        clients = Clients(world)
        for number in range(4):
            clients.ask(f"before {number}", tokens=100)
        admitted = world.admitted(TALK, model="yi", max_tokens=10)
        mine = asyncio.create_task(listen(admitted))
        seen = []
        loop = asyncio.get_running_loop()
        while admitted.routed.lease is None or admitted.routed.lease.first_token_at is None:
            await asyncio.sleep(1)
            left = admitted.routed.status().left_s
            if left is not None:
                seen.append((loop.time(), left))
        await mine
        await clients.all()
        return [(at_s, left) for at_s, left in seen]

    seen = play(one(ALONE), use)

    lefts = [left for _, left in seen]
    assert len(lefts) >= 35
    assert all(later <= earlier + 1.0 for earlier, later in itertools.pairwise(lefts))
    end = seen[-1][0]
    assert all(left == pytest.approx(end - t, rel=0.25, abs=3.0) for t, left in seen)


def test_a_queued_request_survives_a_short_outage_but_not_a_long_one() -> None:
    """An admitted request waits through a short outage, but not a long one."""

    async def use(world: World) -> tuple[Heard | BaseException, Heard | BaseException, float]:
        clients, loop = Clients(world), asyncio.get_running_loop()
        clients.ask("running", tokens=20)
        clients.ask("short")
        await asyncio.sleep(1)
        world.source.fail("a")
        await asyncio.sleep(20)
        world.source.recover("a")
        await clients.all()
        clients.ask("again", tokens=20)
        clients.ask("long")
        await asyncio.sleep(1)
        world.source.fail("a")
        since = loop.time()
        await asyncio.wait([clients.tasks["long"]])
        found = await clients.all()
        return found["short"], found["long"], loop.time() - since

    short, long, waited = play(one(ALONE), use)

    assert isinstance(short, Heard)
    assert isinstance(long, NoCapacityError)
    assert 30 <= waited <= 32
