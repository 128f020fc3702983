import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from promptai.fleet.registry import Registry
from promptai.fleet.replica import Replica, Snapshot, State
from promptai.fleet.simulated import SimulatedSource
from support_clock import run_virtually
from support_fleet import beside

Publish = Callable[[Sequence[Replica]], None]


def replica(name: str, *, model: str = "yi", state: State = State.READY) -> Replica:
    """One that is ready."""
    return Replica(id=name, url=f"http://{name}", model=model, state=state)


class Told:
    """A source that publishes what it is told to, and fails when it is told to."""

    def __init__(self, name: str, *replicas: Replica, configuration: object = None, sole: bool = False) -> None:
        self.name = name
        self.configuration = configuration
        self.sole = sole
        self.replicas = replicas
        self.publish: Publish = lambda _: None
        self.error: Exception | None = None
        self.woken: list[str] = []
        self.touched: list[str] = []
        self.began: list[float] = []
        self.ended = 0

    def touch(self, replica_id: str) -> None:
        """Remember it."""
        self.touched.append(replica_id)

    async def run(self, publish: Publish) -> None:
        """Publish once, if there is something, and fail if told to."""
        self.publish = publish
        self.began.append(asyncio.get_running_loop().time())
        try:
            if self.replicas:
                publish(self.replicas)
            while self.error is None:  # noqa: ASYNC110  virtual time
                await asyncio.sleep(0.5)
            raise self.error
        finally:
            self.ended += 1

    def wake(self, replica_id: str) -> None:
        """Keep the wish."""
        self.woken.append(replica_id)


def ids(registry: Registry) -> list[str]:
    """Of all replicas now."""
    return [found.id for found in registry.snapshot.replicas]


def states(registry: Registry) -> dict[str, State]:
    """Of all replicas now."""
    return {found.id: found.state for found in registry.snapshot.replicas}


def play(registry: Registry, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run the registry while a test plays."""
    run_virtually(beside(registry.run(), test))


def test_a_source_that_crashes_is_down_with_the_reason_and_starts_again_after_a_rest_that_doubles(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line in the log for each time, and the other source goes on."""
    bad, good = Told("bad", replica("a")), Told("good", replica("b"))
    registry = Registry([bad, good])

    async def test() -> None:
        bad.error = ValueError("no\nsuch thing")
        await asyncio.sleep(0.9)
        assert states(registry) == {"a": State.DOWN, "b": State.READY}
        assert registry.snapshot.replicas[0].reason == "its source failed: ValueError: no such thing"
        await asyncio.sleep(400)
        assert good.began == [0.0]
        rests = [after - before for before, after in itertools.pairwise(bad.began)]
        assert rests[:8] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
        bad.error = None
        await asyncio.sleep(61)
        assert states(registry)["a"] is State.READY

    with caplog.at_level(logging.INFO, "promptai.fleet"):
        play(registry, test)

    assert caplog.messages[0] == "source bad failed: ValueError: no such thing; it is started again in 1 s"
    assert all("\n" not in message for message in caplog.messages)


def test_a_source_that_was_well_for_long_rests_shortly_when_it_crashes_again() -> None:
    source = Told("a", replica("a"))
    registry = Registry([source])

    async def test() -> None:
        source.error = ValueError()
        await asyncio.sleep(30)
        source.error = None
        await asyncio.sleep(200)
        source.error = ValueError()
        await asyncio.sleep(0.6)
        source.error = None
        await asyncio.sleep(1.1)
        assert states(registry) == {"a": State.READY}

    play(registry, test)


def test_of_two_replicas_with_one_id_the_first_is_kept_and_the_other_is_a_trouble() -> None:
    """Across sources and within one; and the trouble goes when it is mended."""
    second = Told("two", replica("a", model="other"), replica("b"), replica("b"))
    registry = Registry([Told("one", replica("a")), second, Told("two")])

    async def test() -> None:
        await asyncio.sleep(0.1)
        assert [(found.id, found.model) for found in registry.snapshot.replicas] == [("a", "yi"), ("b", "yi")]
        assert registry.troubles == (
            "source two is there more than once; the first one counts",
            "replica a of two is left out: one has one of that id",
            "replica b of two is left out: two has one of that id",
        )
        second.publish([replica("b")])
        assert len(registry.troubles) == 1

    play(registry, test)


def test_the_version_grows_only_with_what_changes_something() -> None:
    source = Told("a", replica("x"))
    registry = Registry([source])
    seen: list[Snapshot] = []
    registry.subscribe(seen.append)

    async def test() -> None:
        await asyncio.sleep(0.1)
        source.publish([replica("x")])
        source.publish([replica("x")])
        assert registry.snapshot.version == 1
        source.publish([replica("x"), replica("y")])
        source.publish([])

    assert registry.snapshot == Snapshot(0, ())
    play(registry, test)

    assert [(snapshot.version, len(snapshot.replicas)) for snapshot in seen] == [(1, 1), (2, 2), (3, 0)]


def test_a_subscriber_that_fails_ends_neither_the_source_nor_the_other_subscribers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And one that has left is not called."""
    source = Told("a", replica("x"))
    registry = Registry([source])
    seen: list[int] = []

    def fail(snapshot: Snapshot) -> None:
        raise ValueError(snapshot.version)

    registry.subscribe(fail)
    leave = registry.subscribe(lambda _: seen.append(0))
    registry.subscribe(lambda snapshot: seen.append(snapshot.version))

    async def test() -> None:
        leave()
        leave()
        await asyncio.sleep(0.1)
        assert (source.ended, seen) == (0, [1])

    play(registry, test)
    assert "a subscriber of the fleet failed" in caplog.text


def test_a_wish_goes_to_the_source_that_has_the_replica() -> None:
    one, two = Told("one", replica("a")), Told("two", replica("b"))
    registry = Registry([one, two])

    async def test() -> None:
        await asyncio.sleep(0.1)
        registry.wake("b")
        registry.wake("nobody")
        assert (one.woken, two.woken) == ([], ["b"])

    play(registry, test)


def test_what_settings_leave_alone_goes_on_and_what_they_remove_drains_until_it_is_forgotten() -> None:
    """Cold and dead ones have nothing to finish and are gone at once."""
    stays = Told("stays", replica("s"), configuration=1)
    goes = Told("goes", replica("a"), replica("b"), replica("c", state=State.COLD), replica("d", state=State.DOWN))
    registry = Registry([stays, goes])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.forget("a")  # not removed yet: nothing happens
        registry.replace([Told("stays", configuration=1), Told("new", replica("n"))])
        assert states(registry) == {"s": State.READY, "a": State.DRAINING, "b": State.DRAINING}
        assert [found.leaving for found in registry.snapshot.replicas] == [False, True, True]
        await asyncio.sleep(0.1)
        assert ids(registry) == ["s", "n", "a", "b"]
        assert (stays.began, stays.ended, goes.ended) == ([0.0], 0, 0)
        registry.wake("a")
        registry.forget("a")
        goes.publish([replica("a"), replica("b")])
        assert ids(registry) == ["s", "n", "b"]
        registry.forget("b")
        await asyncio.sleep(0.1)
        assert (ids(registry), goes.ended, goes.woken) == (["s", "n"], 1, [])

    play(registry, test)
    assert stays.ended == 1


def test_what_drains_for_too_long_is_gone() -> None:
    goes = Told("goes", replica("a"))
    registry = Registry([goes], drain_s=30.0)

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([])
        await asyncio.sleep(29)
        assert ids(registry) == ["a"]
        await asyncio.sleep(2)
        assert (ids(registry), goes.ended) == ([], 1)

    play(registry, test)


def test_a_changed_source_takes_its_replicas_over_without_a_moment_of_none() -> None:
    """What it does not name any more drains, from then on."""
    old, new = Told("list", replica("a"), replica("b"), configuration=1), Told("list", configuration=2)
    registry = Registry([old])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([new])
        await asyncio.sleep(1)
        assert states(registry) == {"a": State.READY, "b": State.READY}
        new.publish([replica("a"), replica("c")])
        assert states(registry) == {"a": State.READY, "c": State.READY, "b": State.DRAINING}
        assert [found.id for found in registry.snapshot.replicas if found.leaving] == ["b"]
        registry.forget("b")
        await asyncio.sleep(0.1)
        assert (ids(registry), old.ended, new.ended) == (["a", "c"], 1, 0)

    play(registry, test)


def test_a_source_that_owns_the_memory_begins_only_when_its_predecessor_has_ended() -> None:
    """Or two sets of engines would be loaded."""
    old = Told("local", replica("a"), configuration=1, sole=True)
    new = Told("local", replica("a", model="new"), configuration=2, sole=True)
    registry = Registry([old])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([new])
        await asyncio.sleep(5)
        assert (states(registry), new.began) == ({"a": State.DRAINING}, [])
        assert not registry.snapshot.replicas[0].leaving
        registry.forget("a")
        await asyncio.sleep(0.1)
        assert (old.ended, registry.snapshot.models) == (1, ("new",))

    play(registry, test)


def test_while_a_source_waits_for_its_predecessor_no_model_is_missing() -> None:
    """Not even in the moment between the two; those that have nothing to finish hold nobody up."""
    old = Told(
        "local",
        replica("a", model="streams"),
        replica("b", model="idle"),
        replica("c", model="cold", state=State.COLD),
        replica("d", model="loads", state=State.LOADING),
        configuration=1,
        sole=True,
    )
    new = Told("local", configuration=2, sole=True)
    registry = Registry([old])
    models: list[tuple[str, ...]] = []
    registry.subscribe(lambda snapshot: models.append(snapshot.models))

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([new])
        for name in "bcd":
            registry.forget(name)
        await asyncio.sleep(5)
        assert set(states(registry).values()) == {State.DRAINING}
        assert {found.reason for found in registry.snapshot.replicas} == {"settings were changed; it is started again"}
        assert not any(found.leaving for found in registry.snapshot.replicas)
        assert (old.ended, new.began) == (0, [])
        registry.forget("a")
        await asyncio.sleep(0.1)
        assert (old.ended, len(new.began)) == (1, 1)
        assert set(models) == {("streams", "idle", "cold", "loads")}
        new.publish([replica("c", model="cold", state=State.COLD), replica("e", model="new")])
        assert states(registry) == {"c": State.COLD, "e": State.READY}

    play(registry, test)


def test_a_source_that_waits_and_is_removed_leaves_nothing_to_wait_for() -> None:
    """What its predecessor had will not be back then; another one in its place changes nothing."""
    old = Told("local", replica("a"), replica("b", state=State.COLD), configuration=1, sole=True)
    registry = Registry([old])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([Told("local", configuration=2, sole=True)])
        registry.replace([Told("local", configuration=3, sole=True)])
        await asyncio.sleep(1)
        assert states(registry) == {"a": State.DRAINING, "b": State.DRAINING}
        registry.replace([])
        await asyncio.sleep(1)
        assert [(found.id, found.leaving) for found in registry.snapshot.replicas] == [("a", True)]
        registry.forget("a")
        await asyncio.sleep(0.1)
        assert (ids(registry), old.ended) == ([], 1)

    play(registry, test)


def test_what_a_changed_source_has_not_asked_yet_goes_on_as_it_was() -> None:
    """Under whatever id: another gateway is known by one for each model only when it has answered."""
    old = Told("list", replica("a"), replica("b", model="qwen"), replica("c", model="phi"), configuration=1)
    new = Told("list", configuration=2)
    registry = Registry([old])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([new])
        await asyncio.sleep(0.1)
        unknown = Replica(id="b", url="http://b", model="", state=State.LOADING)
        renamed = Replica(id="other", url="http://c", model="", state=State.LOADING)
        new.publish([replica("a"), unknown, renamed])
        registry.forget("c")
        await asyncio.sleep(1)
        assert registry.snapshot.models == ("yi", "qwen", "phi")
        assert states(registry) == dict.fromkeys("abc", State.READY) | {"other": State.LOADING}
        new.publish([replica("a"), replica("b", model="qwen"), replica("other", model="phi")])
        assert states(registry) == {"a": State.READY, "b": State.READY, "other": State.READY, "c": State.DRAINING}
        registry.forget("c")
        await asyncio.sleep(0.1)
        assert (ids(registry), old.ended) == (["a", "b", "other"], 1)

    play(registry, test)


def test_sources_that_are_replaced_before_anything_runs_leave_nothing() -> None:
    first, second = Told("a", replica("a")), Told("a", replica("b"), configuration=2)
    registry = Registry([first])
    registry.replace([second])

    async def test() -> None:
        await asyncio.sleep(0.1)
        assert (ids(registry), first.began) == (["b"], [])

    play(registry, test)


def test_pretended_replicas_fail_and_recover_on_command() -> None:
    source = SimulatedSource([replica("a"), replica("b", model="qwen")])
    registry = Registry([source])

    async def test() -> None:
        source.fail("b", "pulled the plug")
        await asyncio.sleep(0.1)
        assert states(registry) == {"a": State.READY, "b": State.DOWN}
        assert registry.snapshot.replicas[1].reason == "pulled the plug"
        source.recover("b")
        source.wake("b")
        assert registry.snapshot.of("qwen")[0].state is State.READY
        with pytest.raises(KeyError):
            source.fail("c")

    play(registry, test)


def test_a_replica_that_never_answered_adds_no_name_to_the_models() -> None:
    snapshot = Snapshot(1, (replica("a", model=""), replica("b"), replica("c")))

    assert snapshot.models == ("yi",)
