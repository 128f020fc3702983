"""Outages: which boards are avoided, and how long a request waits."""

import asyncio
import itertools
from typing import Any

import msgspec
import pytest

from promptai.errors import BrokenOffError, EngineDiedError, EngineRefusedError, NoCapacityError
from promptai.router.estimate.breaker import BreakerState
from promptai.router.schedule.dispatcher import QueueLimits
from support_clock import run_virtually
from support_cold import Cold
from support_fleet import model
from support_routed import (
    FOR_EVER_S,
    PACE,
    Received,
    accept,
    arm,
    assert_one_answer,
    chat,
    first,
    receive,
    undisturbed,
    world,
)
from support_serve import World


def test_a_killed_board_is_avoided_at_once_and_its_requests_move() -> None:
    async def play() -> tuple[list[Received], BreakerState]:
        async with world().running() as running:
            admitted_requests = [
                accept(running, chat(messages=[{"role": "user", "content": f"Site {n}?"}])) for n in range(4)
            ]
            tasks = [asyncio.create_task(receive(admitted)) for admitted in admitted_requests]
            await asyncio.sleep(1)
            running.kill("one")
            found = [await task for task in tasks]
            late = await receive(accept(running, chat()))
            return [*found, late], running.fleet_state.breaker("one").state(running.fleet_state.now())

    received, state = run_virtually(play())

    assert state is not BreakerState.CLOSED
    assert [one.error for one in received] == [None] * 5
    assert sum(bool(one.routed.continuations) for one in received) == 2
    for number, one in enumerate(received[:4]):
        assert undisturbed(chat(messages=[{"role": "user", "content": f"Site {number}?"}])).text == one.text


def test_the_only_board_returns_after_5_seconds_and_completes_the_answer() -> None:
    async def play() -> Received:
        async with world("one").running() as running:

            def on_chunk(chunks: int) -> None:
                if chunks == 6:
                    running.kill("one")
                    running.source.fail("one")
                    asyncio.get_running_loop().call_later(5, back)

            def back() -> None:
                running.upstream.revive("sim://one")
                running.source.recover("one")

            return await receive(accept(running, chat()), on_chunk)

    received = run_virtually(play())

    assert_one_answer(undisturbed(chat()), received)
    assert 5 < received.took_s < 10


def test_a_board_is_used_again_although_its_recovery_is_not_reported() -> None:
    async def play() -> Received:
        async with world("one").running() as running:

            def on_chunk(chunks: int) -> None:
                if chunks == 6:
                    running.kill("one")
                    asyncio.get_running_loop().call_later(5, running.upstream.revive, "sim://one")

            return await receive(accept(running, chat()), on_chunk)

    assert_one_answer(undisturbed(chat()), run_virtually(play()))


@pytest.mark.parametrize("reported", [True, False])
@pytest.mark.parametrize("after", [0, 6])
def test_all_boards_dead_is_an_error_within_the_outage_limit(*, reported: bool, after: int) -> None:
    async def play() -> Received:
        async with world(limits=QueueLimits(outage_s=30)).running() as running:
            admitted = accept(running, chat())

            def kill() -> None:
                for name in ("one", "two"):
                    running.kill(name)
                    if reported:
                        running.source.fail(name)

            def on_chunk(chunks: int) -> None:
                if chunks == after:
                    kill()

            if not after:
                asyncio.get_running_loop().call_soon(kill)
            return await receive(admitted, on_chunk)

    received = run_virtually(play())

    assert isinstance(received.error, (NoCapacityError, BrokenOffError, EngineDiedError))
    assert received.error.message
    assert received.took_s < 60


def test_silence_has_a_limit_even_if_rates_are_unknown() -> None:
    async def play() -> Received:
        async with world("one", known_rates=False).running() as running:
            admitted = accept(running, chat())
            arm(running, "one", "stall", 3, times=None)
            return await receive(admitted)

    received = run_virtually(play())

    assert isinstance(received.error, BrokenOffError)
    assert received.took_s < FOR_EVER_S / 4


def test_attempts_are_limited() -> None:
    async def play() -> Received:
        async with world("one", "two", "three").running() as running:
            for name in ("one", "two", "three"):
                arm(running, name, "cut", 1, times=None)
            return await receive(accept(running, chat()))

    received = run_virtually(play())

    assert isinstance(received.error, BrokenOffError)
    assert "all 4 attempts failed" in received.error.hint
    assert len(received.routed.continuations) == 3
    usual = undisturbed(chat()).text
    assert usual.startswith(received.text)
    assert received.text


@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_refusing_boards_are_tried_again_after_a_pause(names: tuple[str, ...]) -> None:
    """Without a pause, all attempts within milliseconds meet the same state."""

    async def play() -> Received:
        async with world(*names).running() as running:
            for name in names:
                arm(running, name, "refuse", 0, times=None)
            asyncio.get_running_loop().call_later(0.3, repair, running)
            return await receive(accept(running, chat()))

    def repair(running: World) -> None:
        for engine in running.engines.values():
            engine.fault = None

    received = run_virtually(play())

    assert_one_answer(undisturbed(chat()), received)
    assert set(received.routed.retries) == {"busy"}
    assert received.took_s < run_virtually(_alone()).took_s + 1.0


async def _alone() -> Received:
    async with world("one").running() as running:
        return await receive(accept(running, chat()))


def test_a_refusing_board_gets_four_attempts_with_growing_pauses() -> None:
    async def play() -> Received:
        async with world("one").running() as running:
            arm(running, "one", "refuse", 0, times=None)
            return await receive(accept(running, chat()))

    received = run_virtually(play())

    sent = [lease.started_at for lease in received.routed.leases]
    pauses = [after - before for before, after in itertools.pairwise(sent)]
    assert isinstance(received.error, EngineRefusedError)
    assert len(sent) == 4
    assert pauses == pytest.approx([0.25, 0.5, 2.0], abs=0.05)  # then the breaker opens for its first cooldown


def test_a_new_board_is_used_at_once_during_a_pause() -> None:
    async def play() -> Received:
        async with world("one", "two").running() as running:
            running.source.fail("two")
            arm(running, "one", "refuse", 0, times=1)
            asyncio.get_running_loop().call_later(0.1, running.source.recover, "two")
            return await receive(accept(running, chat()))

    received = run_virtually(play())

    assert_one_answer(undisturbed(chat()), received)
    assert [lease.replica.id for lease in received.routed.leases] == ["one", "two"]
    assert received.routed.leases[1].started_at - received.routed.leases[0].started_at == pytest.approx(0.1, abs=0.05)


def test_a_pausing_request_is_queued_and_holds_no_slot() -> None:
    async def play() -> tuple[str, int]:
        async with world("one").running() as running:
            arm(running, "one", "refuse", 0, times=1)
            admitted = accept(running, chat())
            receiving = asyncio.create_task(receive(admitted))
            await asyncio.sleep(0.2)
            seen = admitted.routed.status().stage, running.fleet_state.running("one")
            assert (await receiving).error is None
            return seen

    assert run_virtually(play()) == ("queued", 0)


def mixed(*, queue: int = 64) -> World:
    """A board with a large context and one with a small context; each has one slot."""
    big = msgspec.structs.replace(PACE, slots=1)
    configs = {"big": big, "small": msgspec.structs.replace(big, context=512)}
    return World(configs, limits=QueueLimits(queue=queue, outage_s=30))


def long_chat(**fields: Any) -> dict[str, Any]:
    return chat(messages=[{"role": "user", "content": "up? " * 1500}], **fields)


def begin(running: World, body: dict[str, Any]) -> asyncio.Task[Received]:
    return asyncio.create_task(receive(accept(running, body)))


def test_a_prompt_that_fits_only_a_dead_board_fails() -> None:
    async def play() -> tuple[list[Received], list[Received]]:
        async with mixed().running() as running:
            before = begin(running, long_chat(max_tokens=5))
            await asyncio.sleep(0.1)
            waiting = [begin(running, long_chat()) for _ in range(2)]
            await asyncio.sleep(0.1)
            running.source.fail("big")
            shorts = [begin(running, chat()) for _ in range(30)]
            assert (await before).error is None
            return [await one for one in waiting], [await one for one in shorts]

    waited, shorts = run_virtually(play())

    assert [one.error for one in shorts] == [None] * 30
    assert max(one.took_s for one in shorts) > 50
    assert [type(one.error) for one in waited] == [NoCapacityError] * 2
    assert all(30 <= one.took_s <= 32 for one in waited)
    assert "small: context too small for this prompt" in str(waited[0].error)


def test_servable_requests_are_not_rejected_with_unservable_ones() -> None:
    """One board is gone; a request for the other one is queued behind all requests for the first."""

    async def play() -> tuple[list[Received], Received]:
        async with mixed(queue=100).running() as running:
            tasks = [begin(running, long_chat(max_tokens=5)), begin(running, chat(max_tokens=450))]
            await asyncio.sleep(0.1)
            waiting = [begin(running, long_chat()) for _ in range(70)]
            await asyncio.sleep(0.1)
            short = begin(running, chat())
            await asyncio.sleep(0)
            running.source.fail("big")
            found = [await one for one in waiting], await short
            await asyncio.gather(*tasks)
            return found

    waited, short = run_virtually(play())

    assert all(isinstance(one.error, NoCapacityError) and 30 <= one.took_s <= 32 for one in waited)
    assert short.error is None
    assert short.took_s > 40


def test_a_request_that_pauses_longer_than_the_outage_limit_is_served() -> None:
    async def play() -> float:
        async with world("one", limits=QueueLimits(outage_s=30)).running() as running:
            slot_request = accept(running, chat()).routed.slot_request
            now = running.fleet_state.now()
            pausing = msgspec.structs.replace(slot_request, avoid_until={"one": now + 50}, resubmitted=True)
            async with running.dispatcher.acquire(pausing) as lease:
                return lease.started_at - now

    assert run_virtually(play()) == pytest.approx(50.0, abs=0.1)


def test_the_outage_limit_starts_anew_after_a_recovery() -> None:
    async def play() -> Received:
        async with world("one", config=msgspec.structs.replace(PACE, slots=1)).running() as running:
            before = begin(running, chat(max_tokens=500))
            await asyncio.sleep(0.1)
            waiting = begin(running, chat())
            await asyncio.sleep(0.1)
            running.source.fail("one")
            await asyncio.sleep(20)
            running.source.recover("one")
            await asyncio.sleep(5)
            running.source.fail("one")
            received = await waiting
            before.cancel()
            return received

    received = run_virtually(play())

    assert isinstance(received.error, NoCapacityError)
    assert 55 <= received.took_s <= 57


@pytest.mark.parametrize(("names", "status"), [(("one", "two"), 400), (("one",), 500)], ids=["two", "one"])
def test_a_request_that_all_engines_object_to_opens_no_breaker(names: tuple[str, ...], status: int) -> None:
    """The objection comes in the stream, e.g. to a grammar that matches nothing; one board alone may be at fault."""

    async def play() -> tuple[Received, set[BreakerState], Received]:
        async with world(*names).running() as running:
            for name in names:
                arm(running, name, "error", 0, times=2 // len(names))
            refused = await receive(accept(running, chat()))
            states = {running.fleet_state.breaker(name).state(running.fleet_state.now()) for name in names}
            return refused, states, await receive(accept(running, chat()))

    refused, states, other = run_virtually(play())

    assert isinstance(refused.error, EngineRefusedError)
    assert refused.error.status == status
    assert len(refused.routed.leases) == 2
    assert states == {BreakerState.CLOSED}
    assert other.error is None


def test_each_board_pauses_for_its_retry_after() -> None:
    """The shorter Retry-After of a board that failed later does not count."""

    async def play() -> dict[str, float]:
        async with world().running() as running:
            slot_request = accept(running, chat()).routed.slot_request
            now = running.fleet_state.now()
            pausing = msgspec.structs.replace(
                slot_request, avoid_until={"one": now + 8, "two": now + 3}, resubmitted=True
            )
            async with running.dispatcher.acquire(pausing) as lease:
                return {lease.replica.id: lease.started_at - now}

    assert run_virtually(play()) == {"two": pytest.approx(3, abs=0.05)}


@pytest.mark.parametrize("after", [0, 6])
def test_an_objection_counts_as_failure_if_another_engine_answers(after: int) -> None:
    async def play() -> tuple[Received, int]:
        async with world().running() as running:
            admitted = accept(running, chat())
            name = first(running, admitted)
            arm(running, name, "error", after)
            return await receive(admitted), running.fleet_state.breaker(name).failures

    received, failures = run_virtually(play())

    assert_one_answer(undisturbed(chat()), received)
    assert failures == 1


def test_clients_do_not_learn_the_url_of_a_board() -> None:
    async def play() -> Received:
        async with world("one").running() as running:
            arm(running, "one", "cut", 3, times=None)
            return await receive(accept(running, chat(max_tokens=None, tools=[{"type": "function"}])))

    received = run_virtually(play())

    assert isinstance(received.error, BrokenOffError)
    assert "sim://" not in str(received.error)
    assert "one broke off" in str(received.error)


def test_a_model_that_cannot_load_fails_with_its_reason() -> None:
    """Later attempts to load it, and the pauses between them, count towards the outage limit."""

    async def play() -> tuple[Received, int]:
        cold = Cold(model("yi"), config=PACE, limits=QueueLimits(outage_s=30))
        cold.launcher.broken.add("yi")
        async with cold.running() as running:
            received = await receive(running.admitted("yi", [{"role": "user", "content": "up?"}]))
            return received, len(cold.launcher.starts)

    received, starts = run_virtually(play())

    assert isinstance(received.error, NoCapacityError)
    assert received.took_s < 30 + 2 * 10 + 10
    assert starts <= 3
