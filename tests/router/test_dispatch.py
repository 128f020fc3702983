"""Moments between two states of a request; what admission promises is in gateway/test_admission."""

import asyncio

from promptai.engine.simulation import SimulationConfig
from promptai.router.dispatch import Waiter
from promptai.router.grant import Job
from promptai.router.prefix import chain
from support_clock import run_virtually
from support_serve import World

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
