import asyncio

from promptai.fleet.replica import State
from support_fleet import GB, FakeLauncher, LocalFleet, model, play


def test_a_model_that_never_fits_is_down_with_the_figures() -> None:
    """And becomes cold when the budget grows."""
    fleet = LocalFleet(model("large", 9), model("small", 1))

    async def test() -> None:
        fleet.wake("large")
        await asyncio.sleep(1)
        assert (fleet.state("large"), fleet.state("small")) == (State.DOWN, State.COLD)
        assert "needs 8.4 GiB of memory, but the budget of all engines is 3.7 GiB" in fleet.reason("large")
        fleet.budget = 10 * GB
        await asyncio.sleep(1)
        assert (fleet.state("large"), fleet.reason("large")) == (State.COLD, "")
        await fleet.use("large")

    play(fleet, test)
    assert fleet.launcher.starts == ["large"]


def test_reports_that_the_prompt_cache_keeps_a_model_from_fitting() -> None:
    """Also beside a pinned model with a cache of the same size."""
    fleet = LocalFleet(model("kept", 1.2, pinned=True, cache_ram_mib=1024), model("small", 1.2, cache_ram_mib=1024))
    fleet.budget = 2 * GB

    async def test() -> None:
        await asyncio.sleep(15)
        assert fleet.state("kept") is State.READY
        assert "; unpin a model or use a smaller [gateway] cache_ram_mib (now 1024)" in fleet.reason("small")
        fleet.budget = GB // 2
        await asyncio.sleep(1)
        assert fleet.reason("small") == (
            "needs 1.1 GiB of memory, but the budget of all engines is 0.5 GiB; "
            "use a smaller [gateway] cache_ram_mib (now 1024)"
        )

    play(fleet, test)


def test_concurrent_requests_load_a_cold_model_once() -> None:
    """The progress grows, stays below 1 while loading, and is published twice a second."""
    fleet = LocalFleet(model("yi", slots=2, context=2048, load_s=30.0))

    async def test() -> None:
        for _ in range(50):
            fleet.wake("yi")
        await asyncio.sleep(0.1)
        for _ in range(50):
            fleet.wake("yi")
        await asyncio.sleep(9.8)
        assert fleet.state("yi") is State.LOADING
        progress = [found[0].progress for _, found in fleet.watch.seen if found[0].progress is not None]
        assert progress == sorted(progress)
        assert len(set(progress)) >= 18
        assert progress[-1] == 0.99
        await asyncio.sleep(0.5)
        ready = fleet.watch.now("local/yi")
        assert (ready.state, ready.url, ready.progress, ready.load_s) == (State.READY, "http://yi", None, 10.0)
        fleet.wake("yi")
        fleet.wake("nobody")
        await asyncio.sleep(60)

    play(fleet, test)
    assert fleet.launcher.starts == ["yi"]


def test_load_progress_excludes_the_empty_prompt_cache() -> None:
    """A model that consists of cache alone counts as read at once."""
    fleet = LocalFleet(model("yi", 2, cache_ram_mib=1024), model("odd", 1, cache_ram_mib=1024))

    async def test() -> None:
        fleet.wake("yi")
        fleet.wake("odd")
        await asyncio.sleep(2.1)
        # The fake has read 25 % to 31 % of the whole, of which it reads 46 % in the end.
        assert 0.54 <= (fleet.watch.now("local/yi").progress or 0) <= 0.67
        assert fleet.watch.now("local/odd").progress == 0.99

    play(fleet, test)


def test_loads_that_fit_run_concurrently() -> None:
    fleet = LocalFleet(model("a"), model("b"))

    async def test() -> None:
        fleet.wake("a")
        fleet.wake("b")
        await asyncio.sleep(10.5)
        assert (fleet.state("a"), fleet.state("b")) == (State.READY, State.READY)

    play(fleet, test)


def test_a_load_starts_after_the_evicted_engine_is_gone() -> None:
    """Two models that do not fit together are never in memory together."""
    fleet = LocalFleet(model("a", 3), model("b", 3))

    async def test() -> None:
        await fleet.use("a")
        fleet.wake("b")
        await asyncio.sleep(0.1)
        assert (fleet.state("a"), fleet.reason("a")) == (State.DRAINING, "makes room for b")
        assert len(fleet.launcher.alive) == 1
        await asyncio.sleep(12)
        assert (fleet.state("a"), fleet.state("b")) == (State.COLD, State.READY)
        assert fleet.watch.now("local/a").url == ""

    play(fleet, test)
    assert [(what, name) for _, what, name in fleet.launcher.log][:3] == [("start", "a"), ("stop", "a"), ("start", "b")]


def test_publishes_an_eviction_in_the_step_that_found_the_engine_idle() -> None:
    """A request routed at any other moment finds the engine busy or gone."""
    fleet = LocalFleet(model("a", 3), model("b", 3))

    async def test() -> None:
        await fleet.use("a")

        def route_at_once(replica_id: str) -> int:
            # No other task may run between the count and the publication.
            asyncio.get_running_loop().call_soon(route, replica_id)
            return 0

        def route(replica_id: str) -> None:
            if fleet.watch.now(replica_id).state is State.READY:
                routed.append(fleet.launcher.engine(replica_id.removeprefix("local/")).model.name)
            elif len(fleet.launcher.alive) == 1:
                refused.append(replica_id)

        routed: list[str] = []
        refused: list[str] = []
        fleet.source._busy = route_at_once
        fleet.wake("b")
        await asyncio.sleep(0.1)
        assert routed == []
        assert "local/a" in refused

    play(fleet, test)


def test_never_evicts_a_busy_engine_and_queues_loads_in_order() -> None:
    """A waiting load reports what it waits for."""
    fleet = LocalFleet(model("a", 3), model("b", 2), model("c", 2))

    async def test() -> None:
        await fleet.use("a")
        fleet.in_flight["local/a"] = 1
        fleet.wake("b")
        await asyncio.sleep(1)
        fleet.wake("c")
        await asyncio.sleep(40)
        assert (fleet.state("a"), fleet.state("b"), fleet.state("c")) == (State.READY, State.COLD, State.COLD)
        assert fleet.reason("b") == "waits for a to become idle"
        fleet.in_flight["local/a"] = 0
        await asyncio.sleep(20)
        assert (fleet.state("a"), fleet.state("b"), fleet.state("c")) == (State.COLD, State.READY, State.READY)

    play(fleet, test)
    assert fleet.launcher.starts == ["a", "b", "c"]


def test_a_load_overtakes_a_waiting_one_only_if_it_leaves_its_memory() -> None:
    """Both fit beside the running engine; the second would take memory that the waiting load needs."""
    fleet = LocalFleet(model("a", 2), model("b", 3), model("c", 1), model("d", 1))

    async def test() -> None:
        await fleet.use("a")
        fleet.in_flight["local/a"] = 1
        for name in "bdc":
            fleet.wake(name)
            await asyncio.sleep(0.5)
        assert [fleet.state(name) for name in "abcd"] == [State.READY, State.COLD, State.COLD, State.LOADING]
        await asyncio.sleep(30)
        fleet.in_flight.update({"local/a": 0, "local/d": 1})
        await asyncio.sleep(12)
        assert [fleet.state(name) for name in "abcd"] == [State.COLD, State.READY, State.COLD, State.READY]

    play(fleet, test)
    assert fleet.launcher.starts == ["a", "d", "b"]


def test_a_load_that_fits_does_not_wait_for_an_engine_that_is_ending() -> None:
    fleet = LocalFleet(
        model("yi", 2, ttl_s=5.0), model("other", 2), model("large", 3), launcher=FakeLauncher(stop_s=3.0)
    )

    async def test() -> None:
        await fleet.use("yi")
        await asyncio.sleep(5.5)
        for name in ("yi", "large", "other"):
            fleet.wake(name)
        await asyncio.sleep(0.3)
        states = [fleet.state(name) for name in ("yi", "large", "other")]
        assert states == [State.DRAINING, State.COLD, State.LOADING]
        await asyncio.sleep(14)
        assert (fleet.state("yi"), fleet.state("other")) == (State.READY, State.READY)

    play(fleet, test)


def test_a_load_gets_the_memory_of_two_models_with_steady_traffic() -> None:
    """Neither accepts a request after it has drained while the other has not."""
    fleet = LocalFleet(model("a", 2), model("b", 2), model("c", 4))

    async def traffic(name: str) -> None:
        while True:
            await asyncio.sleep(0.6)
            if fleet.state(name) is State.READY:
                fleet.in_flight[f"local/{name}"] = 1
                await asyncio.sleep(6)
                fleet.in_flight[f"local/{name}"] = 0

    async def test() -> None:
        await fleet.use("a")
        await fleet.use("b")
        async with asyncio.TaskGroup() as group:
            users = [group.create_task(traffic("a"))]
            await asyncio.sleep(3)
            users.append(group.create_task(traffic("b")))
            await asyncio.sleep(1)
            fleet.wake("c")
            await asyncio.sleep(59)
            assert (fleet.state("a"), fleet.state("b")) == (State.READY, State.READY)
            await asyncio.sleep(20)
            assert [fleet.state(name) for name in "abc"] == [State.COLD, State.COLD, State.READY]
            for user in users:
                user.cancel()

    play(fleet, test)


def test_a_load_that_waits_too_long_drains_the_busy_engine() -> None:
    """The engine finishes its requests, and accepts new ones if memory becomes free elsewhere."""
    fleet = LocalFleet(model("a", 3), model("b", 3))

    async def test() -> None:
        await fleet.use("a")
        fleet.in_flight["local/a"] = 1
        fleet.wake("b")
        await asyncio.sleep(59)
        assert fleet.state("a") is State.READY
        await asyncio.sleep(2)
        assert (fleet.state("a"), len(fleet.launcher.alive)) == (State.DRAINING, 1)
        fleet.budget = 6 * GB
        await asyncio.sleep(11)
        assert (fleet.state("a"), fleet.state("b")) == (State.READY, State.READY)

    play(fleet, test)


def test_keeps_a_new_engine_for_the_requests_that_waited_for_it() -> None:
    """Two models that evict each other: each is used once before it is evicted."""
    fleet = LocalFleet(model("a", 3), model("b", 3))

    async def test() -> None:
        fleet.wake("a")
        fleet.wake("b")
        await asyncio.sleep(10.5)
        assert fleet.state("a") is State.READY
        fleet.source.touch("local/a")
        await asyncio.sleep(0.5)
        assert fleet.state("a") is State.DRAINING
        fleet.wake("a")
        await asyncio.sleep(11)
        assert fleet.state("b") is State.READY
        await asyncio.sleep(5)  # the requests for b have been cancelled
        assert fleet.state("b") is State.DRAINING
        await asyncio.sleep(11)
        assert fleet.state("a") is State.READY

    play(fleet, test)


def test_evicts_the_least_recently_used_of_equals() -> None:
    fleet = LocalFleet(model("a", 2), model("b", 2), model("c", 2))

    async def test() -> None:
        await fleet.use("a")
        await fleet.use("b")
        fleet.source.touch("local/a")
        fleet.source.touch("local/nobody")
        await fleet.use("c")
        assert (fleet.state("a"), fleet.state("b")) == (State.READY, State.COLD)

    play(fleet, test)


def test_a_pinned_model_starts_at_once_and_is_never_evicted() -> None:
    """A model that does not fit beside it reports that."""
    fleet = LocalFleet(model("other", 3), model("kept", 2, pinned=True, ttl_s=5.0), model("small", 1))

    async def test() -> None:
        await asyncio.sleep(0.1)
        assert fleet.state("kept") is State.LOADING
        await asyncio.sleep(100)
        fleet.wake("other")
        await asyncio.sleep(30)
        assert (fleet.state("kept"), fleet.state("other"), fleet.state("small")) == (
            State.READY,
            State.DOWN,
            State.COLD,
        )
        assert "beside kept (pinned, 1.9 GiB)" in fleet.reason("other")

    play(fleet, test)
    assert fleet.launcher.starts == ["kept"]


def test_preloading_fills_the_memory_and_evicts_nothing() -> None:
    """Pinned models come first; a model that does not fit loads on its first request."""
    fleet = LocalFleet(model("a", 2, preload=True), model("b", 2, preload=True), model("kept", 1, pinned=True))

    async def test() -> None:
        await asyncio.sleep(60)
        assert (fleet.state("a"), fleet.state("b"), fleet.state("kept")) == (State.READY, State.COLD, State.READY)
        assert fleet.reason("b") == "not preloaded: no room now"
        await fleet.use("b")
        assert fleet.state("a") is State.COLD
        await asyncio.sleep(60)
        assert fleet.state("a") is State.COLD

    play(fleet, test)
    assert fleet.launcher.starts == ["kept", "a", "b"]


def test_stops_an_engine_that_is_idle_for_too_long() -> None:
    """Counted from its last use, at the end of a long answer."""
    fleet = LocalFleet(model("yi", ttl_s=60.0), model("other"))

    async def test() -> None:
        await fleet.use("yi")
        await fleet.use("other")
        fleet.in_flight["local/yi"] = 1
        await asyncio.sleep(300)
        fleet.in_flight["local/yi"] = 0
        await asyncio.sleep(59)
        assert fleet.state("yi") is State.READY
        await asyncio.sleep(2.5)
        assert (fleet.state("yi"), fleet.state("other")) == (State.COLD, State.READY)
        await fleet.use("yi")

    play(fleet, test)
    assert fleet.watch.states("local/yi")[:5] == [
        State.COLD,
        State.LOADING,
        State.READY,
        State.DRAINING,
        State.COLD,
    ]


def test_waking_an_engine_that_is_being_stopped_starts_it_again() -> None:
    fleet = LocalFleet(model("yi", ttl_s=5.0), launcher=FakeLauncher(stop_s=3.0))

    async def test() -> None:
        await fleet.use("yi")
        await asyncio.sleep(5.5)
        assert fleet.state("yi") is State.DRAINING
        fleet.wake("yi")
        await asyncio.sleep(14)
        assert fleet.state("yi") is State.READY

    play(fleet, test)


def test_the_same_models_are_the_same_configuration() -> None:
    one, two, other = LocalFleet(model("a")), LocalFleet(model("a")), LocalFleet(model("a", ttl_s=9.0))

    assert one.source.configuration == two.source.configuration
    assert one.source.configuration != other.source.configuration
    assert one.source.exclusive
    assert "local/a" in (one.source.replica_ids or ())
    assert "local/b" not in (one.source.replica_ids or ())


def test_remembers_a_wake_from_before_it_runs() -> None:
    """The model waits for the preloaded one and then replaces it."""
    fleet = LocalFleet(model("pre", 3, preload=True), model("asked", 3))
    fleet.wake("asked")

    async def test() -> None:
        await asyncio.sleep(30)
        assert (fleet.state("pre"), fleet.state("asked")) == (State.COLD, State.READY)

    play(fleet, test)
    assert fleet.launcher.starts == ["pre", "asked"]
