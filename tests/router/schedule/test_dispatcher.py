"""The dispatcher's races and corner cases; tests/gateway/test_admission covers what admission guarantees."""

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

REQUEST = SlotRequest(model="yi", prompt=chain("Is cell 12 up?"), prompt_tokens=4.0)
#: At least 857 tokens by the lower bound of its length.
LONG = SlotRequest(model="yi", prompt=chain("up? " * 1500), prompt_tokens=1500.0)


class Requests:
    """
    Requests that hold their slots until they are cancelled.

    Attributes:
        entries: Queue entries by request name.
    """

    def __init__(self, world: World) -> None:
        self.entries: dict[str, QueueEntry] = {}
        self._world = world
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def submit(self, name: str, request: SlotRequest = REQUEST, **fields: Any) -> None:
        """Submit a request under a name."""
        self._tasks[name] = asyncio.create_task(self._hold(name, msgspec.structs.replace(request, **fields)))
        await asyncio.sleep(0)

    def served(self) -> list[str]:
        """Names of the requests that got a slot."""
        return [name for name, entry in self.entries.items() if entry.leased.done() and not entry.leased.exception()]

    async def failed_with(self, kind: type[Exception]) -> list[str]:
        """Names of the requests that failed with this error; cancels all others."""
        await asyncio.sleep(0)
        ended = [name for name, task in self._tasks.items() if task.done()]
        for task in self._tasks.values():
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        by_name = dict(zip(self._tasks, outcomes, strict=True))
        return [name for name in ended if isinstance(by_name[name], kind)]

    async def _hold(self, name: str, request: SlotRequest) -> None:
        async with self._world.dispatcher.acquire(request, on_queued=lambda entry: self.entries.update({name: entry})):
            await asyncio.Event().wait()


def mixed_fleet(*, limits: QueueLimits | None = None) -> World:
    """A replica whose context holds long prompts and one whose context does not; one slot each."""
    configs = {"big": SimulationConfig(model="yi"), "small": SimulationConfig(model="yi", context=512)}
    return World(configs, limits=limits)


def test_a_request_that_just_got_its_slot_has_position_0() -> None:
    """A status event may be due at that moment."""

    async def scenario() -> int:
        world, seen = World({"a": SimulationConfig(model="yi")}), []

        def on_queued(entry: QueueEntry) -> None:
            assert entry.leased.done()
            seen.append(world.dispatcher.position(entry))

        async with world.running(), world.dispatcher.acquire(REQUEST, on_queued=on_queued):
            return seen[0]

    assert run_virtually(scenario()) == 0


def test_a_request_cancelled_as_it_gets_a_slot_releases_it() -> None:
    async def scenario() -> tuple[bool, int]:
        entries: list[QueueEntry] = []
        world = World({"a": SimulationConfig(model="yi")})

        async def submit() -> None:
            async with world.dispatcher.acquire(REQUEST, on_queued=entries.append):
                raise AssertionError("the request was cancelled before it could hold the slot")

        async with world.running():
            async with world.dispatcher.acquire(REQUEST):
                second = asyncio.create_task(submit())
                await asyncio.sleep(0)
            leased = entries[0].leased.done()
            second.cancel()
            await asyncio.wait([second])
            return leased, world.fleet_state.running("a")

    assert run_virtually(scenario()) == (True, 0)


def test_queued_requests_keep_their_placement_while_no_slot_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighing 50 boards for every queued request at every arrival and departure took seconds."""
    calls: list[int] = []
    choose = Affinity.choose

    def counted(self: Affinity, demand: Demand, views: list[ReplicaView]) -> Placement | None:
        calls.append(len(views))
        return choose(self, demand, views)

    monkeypatch.setattr(Affinity, "choose", counted)

    async def scenario() -> tuple[int, int, int]:
        world = World({name: SimulationConfig(model="yi") for name in "abc"})
        entries: list[QueueEntry] = []
        finished = [asyncio.Event() for _ in range(30)]

        async def submit(number: int) -> None:
            async with world.dispatcher.acquire(REQUEST, on_queued=entries.append):
                await finished[number].wait()

        async with world.running():
            tasks = [asyncio.create_task(submit(number)) for number in range(30)]
            await asyncio.sleep(0)
            on_arrival = len(calls)
            finished[0].set()
            await asyncio.sleep(0.01)
            on_departure = len(calls) - on_arrival
            leased = sum(entry.leased.done() for entry in entries)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            return on_arrival, on_departure, leased

    on_arrival, on_departure, leased = run_virtually(scenario())

    assert (on_arrival, leased) == (30, 4)
    assert on_departure <= 3


def test_a_key_is_charged_the_actual_tokens_not_the_estimate() -> None:
    """The first answer of a model is estimated at 200 tokens; this one has ten."""

    async def scenario() -> dict[str, float]:
        world = World({"a": SimulationConfig(model="yi")})
        async with world.running():
            admitted = world.admitted([{"role": "user", "content": "up? " * 100}], key="k", max_tokens=10)
            await listen(admitted)
            return {
                "charged": world.dispatcher._queue("yi")._finish["k"],
                "prompt": admitted.routed.slot_request.prompt_tokens,
            }

    found = run_virtually(scenario())

    assert found["charged"] == pytest.approx(found["prompt"] + 10)


def test_a_resubmitted_request_is_charged_once() -> None:
    async def scenario() -> dict[str, float]:
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

    found = run_virtually(scenario())

    assert found["charged"] == pytest.approx(found["prompt"] + 10)


def test_a_new_request_does_not_wait_for_a_removed_replica() -> None:
    """The removed replica finishes its requests; new ones fail at once with NoCapacityError."""

    async def scenario() -> None:
        world = World({"a": SimulationConfig(model="yi")})
        async with world.running(), world.dispatcher.acquire(REQUEST):
            world.registry.replace([])
            with pytest.raises(NoCapacityError):
                async with asyncio.timeout(1.0), world.dispatcher.acquire(REQUEST):
                    pass

    run_virtually(scenario())


@pytest.mark.parametrize(
    ("queued", "newcomer", "rejected"),
    [
        # key, or key:kind for a batch request or one accepted before (again-batch)
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
def test_a_full_queue_rejects_batch_requests_first(queued: str, newcomer: str, rejected: str) -> None:
    def fields(spec: str) -> dict[str, Any]:
        key, _, kind = spec.partition(":")
        return {"key": key, "batch": kind.endswith("batch"), "resubmitted": kind.startswith("again")}

    async def scenario() -> list[str]:
        world = World({"a": SimulationConfig(model="yi")}, limits=QueueLimits(queue=3))
        async with world.running():
            requests = Requests(world)
            await requests.submit("has the slot")
            for number, spec in enumerate(queued.split()):
                await requests.submit(str(number), **fields(spec))
            await requests.submit("newcomer", **fields(newcomer))
            return await requests.failed_with(SaturatedError)

    assert run_virtually(scenario()) == [rejected]


def test_a_batch_request_past_its_patience_is_not_rejected_first() -> None:
    async def scenario() -> list[str]:
        world = World({"a": SimulationConfig(model="yi")}, limits=QueueLimits(queue=3))
        async with world.running():
            requests = Requests(world)
            await requests.submit("has the slot")
            await requests.submit("batch", key="n", batch=True)
            await asyncio.sleep(301)
            for number in range(2):
                await requests.submit(str(number), key="a")
            await requests.submit("newcomer", key="c")
            return await requests.failed_with(SaturatedError)

    assert run_virtually(scenario()) == ["1"]


def test_a_free_replica_serves_a_request_behind_many_that_it_cannot_serve() -> None:
    async def scenario() -> list[str]:
        world = mixed_fleet(limits=QueueLimits(queue=100))
        async with world.running():
            requests = Requests(world)
            for number in range(71):
                await requests.submit(str(number), LONG)
            await requests.submit("short")
            return [*requests.served(), *await requests.failed_with(SaturatedError)]

    assert run_virtually(scenario()) == ["0", "short"]


def test_only_the_first_64_queued_requests_are_placed_while_no_slot_is_free() -> None:
    async def scenario() -> int:
        world = World({"a": SimulationConfig(model="yi")}, limits=QueueLimits(queue=200))
        async with world.running():
            requests = Requests(world)
            for number in range(101):
                await requests.submit(str(number))
            await asyncio.sleep(1.5)
            await requests.failed_with(SaturatedError)
            return sum(entry.placement is not None for entry in requests.entries.values())

    assert run_virtually(scenario()) == 1 + 64


def test_a_replica_with_too_small_a_context_is_neither_reported_as_failing_nor_waited_for() -> None:
    async def scenario() -> NoCapacityError:
        world = mixed_fleet()
        async with world.running():
            world.fleet_state.breakers["big"] = Breaker(failures=3, opened_at=world.fleet_state.now(), cooldown_s=40.0)
            with pytest.raises(NoCapacityError) as raised:
                async with world.dispatcher.acquire(LONG):
                    pass
            return raised.value

    error = run_virtually(scenario())

    assert error.message == "no replica of yi can serve now (big: failing; small: context too small for this prompt)"
    assert error.retry_after_s == pytest.approx(40.0)


def test_a_healthy_replica_is_reported_as_ready() -> None:
    async def scenario() -> NoCapacityError:
        world = mixed_fleet()
        async with world.running():
            world.source.fail("big")
            return world.dispatcher.no_capacity("yi")

    assert "(big: does not answer; small: ready)" in run_virtually(scenario()).message


def test_a_replica_on_trial_gives_no_hope_to_a_prompt_longer_than_its_context() -> None:
    async def scenario() -> tuple[bool, bool]:
        world = mixed_fleet()
        async with world.running():
            world.source.fail("big")
            await asyncio.sleep(1)
            world.fleet_state.breakers["small"] = Breaker(failures=3, opened_at=0.0, cooldown_s=0.5, trial_at=0.9)
            with pytest.raises(NoCapacityError):
                async with asyncio.timeout(0.1), world.dispatcher.acquire(LONG):
                    pass
            return world.fleet_state._may_recover(REQUEST), world.fleet_state._may_recover(LONG)

    assert run_virtually(scenario()) == (True, False)


@pytest.mark.parametrize(
    ("answers", "chunks", "reported", "charged_tokens"), [(1, 12, 10, 10), (3, 7, 30, 30), (3, 7, None, 7)]
)
def test_a_key_is_charged_for_all_answers_of_its_request(
    answers: int, chunks: int, reported: int | None, charged_tokens: int
) -> None:
    """By the tokens that the engine reports; otherwise by the chunks received."""

    async def scenario() -> tuple[float, float]:
        world = World({"a": SimulationConfig(model="yi")})
        async with world.running():
            finish = world.dispatcher._queue("yi")._finish
            request = msgspec.structs.replace(REQUEST, answers=answers, max_tokens=20, key="k")
            async with world.dispatcher.acquire(request) as lease:
                estimated = finish["k"]
                for _ in range(chunks):
                    world.fleet_state.record_token(lease, world.fleet_state.now())
                lease.result = LeaseResult(generated_tokens=reported)
            return estimated, finish["k"]

    assert run_virtually(scenario()) == (REQUEST.prompt_tokens + answers * 20, REQUEST.prompt_tokens + charged_tokens)


def test_charges_stay_exact_when_the_expected_answer_length_changes() -> None:
    """Twenty requests are queued at an estimate of 200 tokens per answer; each answer has five."""

    async def scenario() -> tuple[float, float]:
        world = World({"a": SimulationConfig(model="yi", slots=1, answer_tokens=1)})
        async with world.running():
            admitted_requests = [world.admitted([{"role": "user", "content": f"{n} up?"}], key="k") for n in range(20)]
            answers = await asyncio.gather(*map(listen, admitted_requests))
            used = sum(admitted.routed.slot_request.prompt_tokens for admitted in admitted_requests)
            for admitted in admitted_requests:
                assert admitted.routed.timings is not None
                used += admitted.routed.timings.predicted_n
            assert all(answer.first_s is not None for answer in answers)
            return world.dispatcher._queue("yi")._finish["k"], used

    charged, used = run_virtually(scenario())

    assert charged == pytest.approx(used)
