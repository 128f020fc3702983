"""Moments between two states of a request; what admission promises is in gateway/test_admission."""

import asyncio

import pytest

from promptai.engine.simulation import SimulationConfig
from promptai.engine.simulator import Fault
from promptai.errors import NoCapacityError
from promptai.router.dispatch import Waiter
from promptai.router.grant import Job
from promptai.router.policy import Affinity, Ask, Choice, Load
from promptai.router.prefix import chain
from support_clock import run_virtually
from support_serve import World, listen

JOB = Job(model="yi", prompt=chain("Is cell 12 up?"), tokens=4.0)


def test_a_request_that_has_its_slot_and_was_not_told_yet_has_nobody_before_it() -> None:
    """A status event may be due in that very moment."""

    async def play() -> int:
        world, seen = World({"a": SimulationConfig(model="yi")}), []

        def entered(waiter: Waiter) -> None:
            assert waiter.granted.done()
            seen.append(world.dispatcher.place(waiter))

        async with world.running(), world.dispatcher.grant(JOB, entered=entered):
            return seen[0]

    assert run_virtually(play()) == 0


def test_a_request_that_leaves_in_the_moment_in_which_it_is_given_a_slot_gives_it_back() -> None:
    async def play() -> tuple[bool, int]:
        waiters: list[Waiter] = []
        world = World({"a": SimulationConfig(model="yi")})

        async def ask() -> None:
            async with world.dispatcher.grant(JOB, entered=waiters.append):
                raise AssertionError("it was cancelled before")

        async with world.running():
            async with world.dispatcher.grant(JOB):
                second = asyncio.create_task(ask())
                await asyncio.sleep(0)
            given = waiters[0].granted.done()
            second.cancel()
            await asyncio.wait([second])
            return given, world.accounts.running("a")

    assert run_virtually(play()) == (True, 0)


def test_as_long_as_no_slot_is_free_nobody_chooses_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighing 50 boards for everybody who waits, whenever somebody comes or goes, took seconds."""
    weighed: list[int] = []
    choose = Affinity.choose

    def counted(self: Affinity, ask: Ask, loads: list[Load]) -> Choice | None:
        weighed.append(len(loads))
        return choose(self, ask, loads)

    monkeypatch.setattr(Affinity, "choose", counted)

    async def play() -> tuple[int, int, int]:
        world = World({name: SimulationConfig(model="yi") for name in "abc"})
        entered: list[Waiter] = []
        leave = [asyncio.Event() for _ in range(30)]

        async def ask(number: int) -> None:
            async with world.dispatcher.grant(JOB, entered=entered.append):
                await leave[number].wait()

        async with world.running():
            tasks = [asyncio.create_task(ask(number)) for number in range(30)]
            await asyncio.sleep(0)
            of_arrivals = len(weighed)
            leave[0].set()
            await asyncio.sleep(0.01)
            of_one_that_goes = len(weighed) - of_arrivals
            given = sum(waiter.granted.done() for waiter in entered)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return of_arrivals, of_one_that_goes, given

    of_arrivals, of_one_that_goes, given = run_virtually(play())

    assert (of_arrivals, given) == (30, 4)
    assert of_one_that_goes <= 3


def test_a_key_is_charged_what_its_request_took_whatever_was_expected() -> None:
    """A model's first answer is expected to have 200 tokens, and has ten."""

    async def play() -> dict[str, float]:
        world = World({"a": SimulationConfig(model="yi")})
        async with world.running():
            ticket = world.ticket([{"role": "user", "content": "up? " * 100}], key="k", max_tokens=10)
            await listen(ticket)
            return {"charged": world.dispatcher._queue("yi")._finish["k"], "prompt": ticket.flight.job.tokens}

    found = run_virtually(play())

    assert found["charged"] == pytest.approx(found["prompt"] + 10)


def test_a_request_that_was_sent_again_is_charged_its_answer_once() -> None:
    async def play() -> dict[str, float]:
        world = World({"a": SimulationConfig(model="yi"), "b": SimulationConfig(model="yi")})
        async with world.running():
            for engine in world.engines.values():
                engine.fault = Fault(kind="cut", after_tokens=0, times=1)
            ticket = world.ticket([{"role": "user", "content": "up? " * 100}], key="k", max_tokens=10)
            await listen(ticket)
            assert len(ticket.flight.grants) == 3
            return {"charged": world.dispatcher._queue("yi")._finish["k"], "prompt": ticket.flight.job.tokens}

    found = run_virtually(play())

    assert found["charged"] == pytest.approx(found["prompt"] + 10)


def test_nobody_waits_for_a_board_that_was_removed() -> None:
    """It finishes what it has; whoever comes now is told at once that there is none."""

    async def play() -> None:
        world = World({"a": SimulationConfig(model="yi")})
        async with world.running(), world.dispatcher.grant(JOB):
            world.registry.replace([])
            with pytest.raises(NoCapacityError):
                async with asyncio.timeout(1.0), world.dispatcher.grant(JOB):
                    pass

    run_virtually(play())
