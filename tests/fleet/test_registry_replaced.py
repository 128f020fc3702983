"""Replacing sources while they run: which keep running, which drain, and which take over."""

import asyncio
import logging

import pytest

from promptai.fleet.registry import Registry
from promptai.fleet.replica import Replica, State
from support_registry import ScriptedSource, ids, play, replica, states


def test_unchanged_sources_keep_running_and_removed_ones_drain_until_forgotten() -> None:
    """Cold and dead replicas have nothing to finish and disappear at once."""
    stays = ScriptedSource("stays", replica("s"), configuration=1)
    goes = ScriptedSource(
        "goes", replica("a"), replica("b"), replica("c", state=State.COLD), replica("d", state=State.DOWN)
    )
    registry = Registry([stays, goes])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.forget("a")  # not removed yet: nothing happens
        registry.replace([ScriptedSource("stays", configuration=1), ScriptedSource("new", replica("n"))])
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


def test_replicas_that_drain_for_too_long_disappear() -> None:
    goes = ScriptedSource("goes", replica("a"))
    registry = Registry([goes], drain_s=30.0)

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([])
        await asyncio.sleep(29)
        assert ids(registry) == ["a"]
        await asyncio.sleep(2)
        assert (ids(registry), goes.ended) == ([], 1)

    play(registry, test)


def test_a_changed_source_takes_its_replicas_over_without_a_gap() -> None:
    """A replica that it no longer lists drains from then on."""
    old, new = (
        ScriptedSource("list", replica("a"), replica("b"), configuration=1),
        ScriptedSource("list", configuration=2),
    )
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


def test_an_exclusive_source_starts_after_its_predecessor_has_ended() -> None:
    """Otherwise two sets of engines would be loaded."""
    old = ScriptedSource("local", replica("a"), configuration=1, exclusive=True)
    new = ScriptedSource("local", replica("a", model="new"), configuration=2, exclusive=True)
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


def test_no_model_is_missing_while_a_source_waits_for_its_predecessor() -> None:
    """Not even between the two; idle replicas do not delay the successor."""
    old = ScriptedSource(
        "local",
        replica("a", model="streams"),
        replica("b", model="idle"),
        replica("c", model="cold", state=State.COLD),
        replica("d", model="loads", state=State.LOADING),
        configuration=1,
        exclusive=True,
    )
    new = ScriptedSource("local", configuration=2, exclusive=True)
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
        assert {found.reason for found in registry.snapshot.replicas} == {"restarting with changed settings"}
        assert not any(found.leaving for found in registry.snapshot.replicas)
        assert (old.ended, new.began) == (0, [])
        registry.forget("a")
        await asyncio.sleep(0.1)
        assert (old.ended, len(new.began)) == (1, 1)
        assert set(models) == {("streams", "idle", "cold", "loads")}
        new.publish([replica("c", model="cold", state=State.COLD), replica("e", model="new")])
        assert states(registry) == {"c": State.COLD, "e": State.READY}

    play(registry, test)


def test_removing_a_waiting_source_leaves_nothing_to_wait_for() -> None:
    """The replicas of its predecessor will not be back; a further successor changes nothing."""
    old = ScriptedSource("local", replica("a"), replica("b", state=State.COLD), configuration=1, exclusive=True)
    registry = Registry([old])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([ScriptedSource("local", configuration=2, exclusive=True)])
        registry.replace([ScriptedSource("local", configuration=3, exclusive=True)])
        await asyncio.sleep(1)
        assert states(registry) == {"a": State.DRAINING, "b": State.DRAINING}
        registry.replace([])
        await asyncio.sleep(1)
        assert [(found.id, found.leaving) for found in registry.snapshot.replicas] == [("a", True)]
        registry.forget("a")
        await asyncio.sleep(0.1)
        assert (ids(registry), old.ended) == ([], 1)

    play(registry, test)


def test_replicas_that_a_changed_source_has_not_probed_yet_keep_serving() -> None:
    """Under any id: another gateway has one id per model only after it has answered."""
    old = ScriptedSource("list", replica("a"), replica("b", model="qwen"), replica("c", model="phi"), configuration=1)
    new = ScriptedSource("list", configuration=2)
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


def test_replacing_sources_before_the_registry_runs_leaves_nothing() -> None:
    first, second = ScriptedSource("a", replica("a")), ScriptedSource("a", replica("b"), configuration=2)
    registry = Registry([first])
    registry.replace([second])

    async def test() -> None:
        await asyncio.sleep(0.1)
        assert (ids(registry), first.began) == (["b"], [])

    play(registry, test)


def test_replicas_that_the_successor_will_not_have_are_leaving() -> None:
    """No request waits for them; they finish their answers, and the others wait for the successor."""
    old = ScriptedSource(
        "local",
        replica("a"),
        replica("b", model="gone"),
        replica("c", model="cold", state=State.COLD),
        configuration=1,
        exclusive=True,
    )
    new = ScriptedSource("local", configuration=2, exclusive=True, replica_ids={"a", "d"})
    registry = Registry([old])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([new])
        registry.forget("a")
        await asyncio.sleep(1)
        assert [(found.id, found.state, found.leaving, found.reason) for found in registry.snapshot.replicas] == [
            ("a", State.DRAINING, False, "restarting with changed settings"),
            ("b", State.DRAINING, True, "removed from the settings"),
            ("c", State.DRAINING, True, "removed from the settings"),
        ]
        assert (old.ended, new.began) == (0, [])
        registry.forget("b")
        await asyncio.sleep(0.1)
        assert (old.ended, len(new.began)) == (1, 1)
        new.publish([replica("a")])
        assert states(registry) == {"a": State.READY}

    play(registry, test)


def test_a_replica_removed_and_restored_before_its_source_ends_is_not_leaving() -> None:
    old = ScriptedSource("local", replica("a"), configuration=1, exclusive=True)
    registry = Registry([old])

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([ScriptedSource("local", configuration=2, exclusive=True, replica_ids=set())])
        assert registry.snapshot.replicas[0].leaving
        registry.replace([ScriptedSource("local", configuration=3, exclusive=True, replica_ids={"a"})])
        assert not registry.snapshot.replicas[0].leaving

    play(registry, test)


@pytest.mark.parametrize("exclusive", [True, False], ids=["own-engines", "boards"])
def test_logs_answers_that_are_cut_off_once(caplog: pytest.LogCaptureFixture, *, exclusive: bool) -> None:
    """A board cuts nothing off: its engine keeps running."""
    old = ScriptedSource("list", replica("a"), replica("b"), replica("c"), configuration=1, exclusive=exclusive)
    registry = Registry([old], drain_s=30.0, busy=lambda replica_id: {"a": 2, "b": 1}.get(replica_id, 0))

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([ScriptedSource("list", replica("a"), configuration=2, exclusive=exclusive)])
        registry.forget("c")
        await asyncio.sleep(29)
        assert caplog.messages == []
        await asyncio.sleep(60)
        assert old.ended == 1

    with caplog.at_level(logging.INFO, "promptai.fleet"):
        play(registry, test)

    message = "source list ended after 30 s of draining; answers cut off: 3"
    assert caplog.messages == ([message] if exclusive else [])


def test_logs_nothing_about_answers_that_end_in_time(caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry([ScriptedSource("list", replica("a"), configuration=1, exclusive=True)], drain_s=30.0)

    async def test() -> None:
        await asyncio.sleep(1)
        registry.replace([ScriptedSource("list", replica("a"), configuration=2, exclusive=True)])
        await asyncio.sleep(29)
        registry.forget("a")
        await asyncio.sleep(60)

    with caplog.at_level(logging.INFO, "promptai.fleet"):
        play(registry, test)

    assert caplog.messages == []
