import asyncio
import itertools
import logging

import pytest

from promptai.fleet.registry import Registry
from promptai.fleet.replica import Snapshot, State
from promptai.fleet.simulated import SimulatedSource
from support_registry import ScriptedSource, play, replica, states


def test_a_crashed_source_is_down_and_restarts_with_a_doubling_backoff(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each crash is one line in the log; the other source keeps running."""
    bad, good = ScriptedSource("bad", replica("a")), ScriptedSource("good", replica("b"))
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

    assert caplog.messages[0] == "source bad failed: ValueError: no such thing; restarting in 1 s"
    assert all("\n" not in message for message in caplog.messages)


def test_a_source_that_was_stable_for_long_restarts_with_a_short_backoff() -> None:
    source = ScriptedSource("a", replica("a"))
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


def test_keeps_the_first_of_two_replicas_with_the_same_id_and_reports_the_other() -> None:
    """Across sources and within one; the problem disappears once it is fixed."""
    second = ScriptedSource("two", replica("a", model="other"), replica("b"), replica("b"))
    registry = Registry([ScriptedSource("one", replica("a")), second, ScriptedSource("two")])

    async def test() -> None:
        await asyncio.sleep(0.1)
        assert [(found.id, found.model) for found in registry.snapshot.replicas] == [("a", "yi"), ("b", "yi")]
        assert registry.problems == (
            "source two is configured more than once; only the first is used",
            "replica a of two is ignored: one has a replica with the same id",
            "replica b of two is ignored: two has a replica with the same id",
        )
        second.publish([replica("b")])
        assert len(registry.problems) == 1

    play(registry, test)


def test_the_version_increases_only_on_a_change() -> None:
    source = ScriptedSource("a", replica("x"))
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


def test_a_failing_subscriber_affects_no_source_and_no_other_subscriber(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A subscriber that has unsubscribed is not called."""
    source = ScriptedSource("a", replica("x"))
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
    assert "a fleet subscriber failed" in caplog.text


def test_wake_and_touch_reach_the_source_of_the_replica() -> None:
    one, two = ScriptedSource("one", replica("a")), ScriptedSource("two", replica("b"))
    registry = Registry([one, two])

    async def test() -> None:
        await asyncio.sleep(0.1)
        registry.wake("b")
        registry.wake("nobody")
        assert (one.woken, two.woken) == ([], ["b"])

    play(registry, test)


def test_simulated_replicas_fail_and_recover_on_command() -> None:
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


def test_a_replica_that_never_answered_adds_no_model_name() -> None:
    snapshot = Snapshot(1, (replica("a", model=""), replica("b"), replica("c")))

    assert snapshot.models == ("yi",)
