"""Moments between two states of a request; what admission promises is in gateway/test_admission."""

import asyncio
from typing import Any

import msgspec
import pytest

from promptai.engine.simulation import SimulationConfig
from promptai.engine.simulator import Fault
from promptai.errors import NoCapacityError, SaturatedError
from promptai.router.estimate.breaker import Breaker
from promptai.router.estimate.policy import Affinity, Demand, Placement, ReplicaView
from promptai.router.estimate.prefix import chain
from promptai.router.schedule.dispatcher import QueueEntry, QueueLimits
from promptai.router.schedule.lease import LeaseResult, SlotRequest
from support_clock import run_virtually
from support_serve import World, listen

JOB = SlotRequest(model="yi", prompt=chain("Is cell 12 up?"), prompt_tokens=4.0)
#: Has 857 tokens at least.
LONG = SlotRequest(model="yi", prompt=chain("up? " * 1500), prompt_tokens=1500.0)


class Crowd:
    """
    Requests that keep their slots until they are told to leave.

    Attributes:
        waiters: By name.
    """

    def __init__(self, world: World) -> None:
        self.entries: dict[str, QueueEntry] = {}
        self._world = world
        self._leave: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, request: SlotRequest = JOB, **fields: Any) -> None:
        """Let one come."""
        self._tasks[name] = asyncio.create_task(self._hold(name, msgspec.structs.replace(request, **fields)))
        await asyncio.sleep(0)

    async def leave(self, name: str) -> None:
        """Let one that has its slot give it back."""
        self._leave[name].set()
        await self._tasks[name]

    def served(self) -> list[str]:
        """Who was given a slot."""
        return [name for name, it in self.entries.items() if it.leased.done() and not it.leased.exception()]

    async def refused(self, kind: type[Exception]) -> list[str]:
        """Who has been told so; everybody else leaves."""
        await asyncio.sleep(0)
        ended = [name for name, task in self._tasks.items() if task.done()]
        for task in self._tasks.values():
            task.cancel()
        found = dict(zip(self._tasks, await asyncio.gather(*self._tasks.values(), return_exceptions=True), strict=True))
        return [name for name in ended if isinstance(found[name], kind)]

    async def _hold(self, name: str, request: SlotRequest) -> None:
        leave = self._leave[name] = asyncio.Event()
        async with self._world.dispatcher.acquire(request, on_queued=lambda entry: self.entries.update({name: entry})):
            await leave.wait()


def mixed(*, limits: QueueLimits | None = None) -> World:
    """A board that holds long prompts, and one that does not; each has one slot."""
    configs = {"big": SimulationConfig(model="yi"), "small": SimulationConfig(model="yi", context=512)}
    return World(configs, limits=limits)


def test_a_request_with_a_slot_has_position_0() -> None:
    """A status event may be due in that very moment."""

    async def play() -> int:
        world, seen = World({"a": SimulationConfig(model="yi")}), []

        def entered(entry: QueueEntry) -> None:
            assert entry.leased.done()
            seen.append(world.dispatcher.position(entry))

        async with world.running(), world.dispatcher.acquire(JOB, on_queued=entered):
            return seen[0]

    assert run_virtually(play()) == 0


def test_a_request_cancelled_as_it_gets_a_slot_releases_it() -> None:
    async def play() -> tuple[bool, int]:
        entries: list[QueueEntry] = []
        world = World({"a": SimulationConfig(model="yi")})

        async def ask() -> None:
            async with world.dispatcher.acquire(JOB, on_queued=entries.append):
                raise AssertionError("it was cancelled before")

        async with world.running():
            async with world.dispatcher.acquire(JOB):
                second = asyncio.create_task(ask())
                await asyncio.sleep(0)
            given = entries[0].leased.done()
            second.cancel()
            await asyncio.wait([second])
            return given, world.fleet_state.running("a")

    assert run_virtually(play()) == (True, 0)


def test_without_a_free_slot_placements_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighing 50 boards for everybody who waits, whenever somebody comes or goes, took seconds."""
    weighed: list[int] = []
    choose = Affinity.choose

    def counted(self: Affinity, ask: Demand, loads: list[ReplicaView]) -> Placement | None:
        weighed.append(len(loads))
        return choose(self, ask, loads)

    monkeypatch.setattr(Affinity, "choose", counted)

    async def play() -> tuple[int, int, int]:
        world = World({name: SimulationConfig(model="yi") for name in "abc"})
        entered: list[QueueEntry] = []
        leave = [asyncio.Event() for _ in range(30)]

        async def ask(number: int) -> None:
            async with world.dispatcher.acquire(JOB, on_queued=entered.append):
                await leave[number].wait()

        async with world.running():
            tasks = [asyncio.create_task(ask(number)) for number in range(30)]
            await asyncio.sleep(0)
            of_arrivals = len(weighed)
            leave[0].set()
            await asyncio.sleep(0.01)
            of_one_that_goes = len(weighed) - of_arrivals
            given = sum(entry.leased.done() for entry in entered)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return of_arrivals, of_one_that_goes, given

    of_arrivals, of_one_that_goes, given = run_virtually(play())

    assert (of_arrivals, given) == (30, 4)
    assert of_one_that_goes <= 3


def test_a_key_is_charged_the_real_cost() -> None:
    """A model's first answer is expected to have 200 tokens, and has ten."""

    async def play() -> dict[str, float]:
        world = World({"a": SimulationConfig(model="yi")})
        async with world.running():
            admitted = world.admitted([{"role": "user", "content": "up? " * 100}], key="k", max_tokens=10)
            await listen(admitted)
            return {
                "charged": world.dispatcher._queue("yi")._finish["k"],
                "prompt": admitted.routed.slot_request.prompt_tokens,
            }

    found = run_virtually(play())

    assert found["charged"] == pytest.approx(found["prompt"] + 10)


def test_a_resubmitted_request_is_charged_once() -> None:
    async def play() -> dict[str, float]:
        world = World({"a": SimulationConfig(model="yi"), "b": SimulationConfig(model="yi")})
        async with world.running():
            for engine in world.engines.values():
                engine.fault = Fault(kind="cut", after_tokens=0, times=1)
            admitted = world.admitted([{"role": "user", "content": "up? " * 100}], key="k", max_tokens=10)
            await listen(admitted)
            assert len(admitted.routed.leases) == 3
            return {
                "charged": world.dispatcher._queue("yi")._finish["k"],
                "prompt": admitted.routed.slot_request.prompt_tokens,
            }

    found = run_virtually(play())

    assert found["charged"] == pytest.approx(found["prompt"] + 10)


def test_requests_do_not_wait_for_a_removed_board() -> None:
    """It finishes what it has; whoever comes now is told at once that there is none."""

    async def play() -> None:
        world = World({"a": SimulationConfig(model="yi")})
        async with world.running(), world.dispatcher.acquire(JOB):
            world.registry.replace([])
            with pytest.raises(NoCapacityError):
                async with asyncio.timeout(1.0), world.dispatcher.acquire(JOB):
                    pass

    run_virtually(play())


@pytest.mark.parametrize(
    ("queued", "newcomer", "goes"),
    [
        # Whose key, and whether it is of the batch class or was accepted before.
        ("n:batch n:batch n:batch", "a", "2"),
        ("n:batch m:batch n:batch", "a", "2"),
        ("k:batch k:batch a", "k", "1"),
        ("a a n:batch", "c", "2"),
        ("n:batch n:again-batch a", "c", "0"),
        ("n:again-batch a a", "c", "2"),
        ("a a b", "c", "1"),
        ("a b c", "d", "newcomer"),
        ("a a a", "n:batch", "newcomer"),
        ("a n:batch n:batch", "m:batch", "2"),
        ("a m:batch n:batch", "n:batch", "newcomer"),
        ("a n:again-batch n:batch", "n:batch", "newcomer"),
    ],
)
def test_batch_requests_are_shed_before_interactive_ones(queued: str, newcomer: str, goes: str) -> None:
    def fields(of: str) -> dict[str, Any]:
        key, _, kind = of.partition(":")
        return {"key": key, "batch": kind.endswith("batch"), "resubmitted": kind.startswith("again")}

    async def play() -> list[str]:
        world = World({"a": SimulationConfig(model="yi")}, limits=QueueLimits(queue=3))
        async with world.running():
            crowd = Crowd(world)
            await crowd.ask("has the slot")
            for number, of in enumerate(queued.split()):
                await crowd.ask(str(number), **fields(of))
            await crowd.ask("newcomer", **fields(newcomer))
            return await crowd.refused(SaturatedError)

    assert run_virtually(play()) == [goes]


def test_batch_requests_beyond_their_patience_are_not_shed_first() -> None:
    async def play() -> list[str]:
        world = World({"a": SimulationConfig(model="yi")}, limits=QueueLimits(queue=3))
        async with world.running():
            crowd = Crowd(world)
            await crowd.ask("has the slot")
            await crowd.ask("batch", key="n", batch=True)
            await asyncio.sleep(301)
            for number in range(2):
                await crowd.ask(str(number), key="a")
            await crowd.ask("newcomer", key="c")
            return await crowd.refused(SaturatedError)

    assert run_virtually(play()) == ["1"]


def test_a_free_board_goes_to_the_first_request_that_fits_it() -> None:
    async def play() -> list[str]:
        world = mixed(limits=QueueLimits(queue=100))
        async with world.running():
            crowd = Crowd(world)
            for number in range(71):
                await crowd.ask(str(number), LONG)
            await crowd.ask("short")
            return [*crowd.served(), *await crowd.refused(SaturatedError)]

    assert run_virtually(play()) == ["0", "short"]


def test_without_a_free_slot_only_the_first_requests_are_planned() -> None:
    async def play() -> int:
        world = World({"a": SimulationConfig(model="yi")}, limits=QueueLimits(queue=200))
        async with world.running():
            crowd = Crowd(world)
            for number in range(101):
                await crowd.ask(str(number))
            await asyncio.sleep(1.5)
            await crowd.refused(SaturatedError)
            return sum(entry.placement is not None for entry in crowd.entries.values())

    assert run_virtually(play()) == 1 + 64


def test_a_board_that_is_too_small_is_not_called_failing() -> None:
    async def play() -> NoCapacityError:
        world = mixed()
        async with world.running():
            world.fleet_state.breakers["big"] = Breaker(failures=3, opened_at=world.fleet_state.now(), cooldown_s=40.0)
            with pytest.raises(NoCapacityError) as refused:
                async with world.dispatcher.acquire(LONG):
                    pass
            return refused.value

    error = run_virtually(play())

    assert error.message == "no replica of yi can serve now (big: failing; small: context too small for this prompt)"
    assert error.retry_after_s == pytest.approx(40.0)


def test_a_healthy_board_is_never_called_failing() -> None:
    async def play() -> NoCapacityError:
        world = mixed()
        async with world.running():
            world.source.fail("big")
            return world.dispatcher.no_capacity("yi")

    assert "(big: does not answer; small: ready)" in run_virtually(play()).message


def test_a_trial_of_a_board_that_is_too_small_is_no_recovery() -> None:
    async def play() -> tuple[bool, bool]:
        world = mixed()
        async with world.running():
            world.source.fail("big")
            await asyncio.sleep(1)
            world.fleet_state.breakers["small"] = Breaker(failures=3, opened_at=0.0, cooldown_s=0.5, trial_at=0.9)
            with pytest.raises(NoCapacityError):
                async with asyncio.timeout(0.1), world.dispatcher.acquire(LONG):
                    pass
            return world.fleet_state._may_recover(JOB), world.fleet_state._may_recover(LONG)

    assert run_virtually(play()) == (True, False)


@pytest.mark.parametrize(("answers", "pieces", "told", "took"), [(1, 12, 10, 10), (3, 7, 30, 30), (3, 7, None, 7)])
def test_a_key_is_charged_for_every_answer(answers: int, pieces: int, told: int | None, took: int) -> None:
    """As many tokens as the engine says, else as many pieces as came."""

    async def play() -> tuple[float, float]:
        world = World({"a": SimulationConfig(model="yi")})
        async with world.running():
            finish = world.dispatcher._queue("yi")._finish
            request = msgspec.structs.replace(JOB, answers=answers, max_tokens=20, key="k")
            async with world.dispatcher.acquire(request) as lease:
                charged = finish["k"]
                for _ in range(pieces):
                    world.fleet_state.record_token(lease, world.fleet_state.now())
                lease.result = LeaseResult(generated_tokens=told)
            return charged, finish["k"]

    assert run_virtually(play()) == (JOB.prompt_tokens + answers * 20, JOB.prompt_tokens + took)


def test_learning_does_not_change_earlier_charges() -> None:
    """Twenty were queued when answers were expected to have 200 tokens, and all had five."""

    async def play() -> tuple[float, float]:
        world = World({"a": SimulationConfig(model="yi", slots=1, answer_tokens=1)})
        async with world.running():
            admitted_requests = [world.admitted([{"role": "user", "content": f"{n} up?"}], key="k") for n in range(20)]
            heard = await asyncio.gather(*map(listen, admitted_requests))
            used = sum(admitted.routed.slot_request.prompt_tokens for admitted in admitted_requests)
            for admitted in admitted_requests:
                assert admitted.routed.timings is not None
                used += admitted.routed.timings.predicted_n
            assert all(one.first_s is not None for one in heard)
            return world.dispatcher._queue("yi")._finish["k"], used

    charged, used = run_virtually(play())

    assert charged == pytest.approx(used)
