import asyncio

from promptai.fleet.local import LocalModel
from promptai.fleet.replica import State
from support_clock import run_virtually
from support_fleet import GB, FakeEngine, FakeLauncher, LocalFleet, model, play


def test_a_failed_start_shows_the_engines_error_and_doubles_the_backoff() -> None:
    """Waking it during the backoff starts nothing; waking it afterwards tries again."""
    fleet = LocalFleet(model("yi"), launcher=FakeLauncher(load_s=1, broken=["yi"]))

    async def test() -> None:
        for rest_s in (5, 10, 20, 40, 80, 120, 120):
            fleet.wake("yi")
            await asyncio.sleep(1.1)
            assert (fleet.state("yi"), fleet.reason("yi")) == (State.DOWN, "the file is damaged (fetch it again)")
            fleet.wake("yi")
            await asyncio.sleep(rest_s - 0.5)
            assert fleet.state("yi") is State.DOWN
            await asyncio.sleep(0.8)
            assert fleet.state("yi") is State.COLD
        fleet.launcher.broken.clear()
        await fleet.use("yi")

    play(fleet, test)
    assert fleet.launcher.starts == ["yi"] * 8


def test_cancelling_while_a_model_loads_stops_its_engine() -> None:
    fleet = LocalFleet(model("yi"))

    async def test() -> None:
        fleet.wake("yi")
        await asyncio.sleep(3)
        assert len(fleet.launcher.alive) == 1

    play(fleet, test)
    assert fleet.watch.states("local/yi") == [State.COLD, State.LOADING]


def test_an_error_in_the_budget_ends_the_source_and_every_engine() -> None:
    """The registry restarts the source."""
    fleet = LocalFleet(model("yi"))

    async def main() -> None:
        fleet.wake("yi")
        task = asyncio.create_task(fleet.source.run(fleet.watch))
        await asyncio.sleep(11)
        assert fleet.state("yi") is State.READY
        fleet.source._budget_bytes = lambda: 1 // 0
        await asyncio.wait([task])
        failed = task.exception()
        assert isinstance(failed, ExceptionGroup)
        assert isinstance(failed.exceptions[0], ZeroDivisionError)
        assert fleet.launcher.alive == []

    run_virtually(main())


def test_an_engine_that_dies_is_cold_until_the_next_request() -> None:
    fleet = LocalFleet(model("yi"))

    async def test() -> None:
        await fleet.use("yi")
        await asyncio.sleep(100)
        fleet.launcher.engine("yi").kill()
        await asyncio.sleep(0.25)
        assert fleet.state("yi") is State.DOWN
        await asyncio.sleep(0.5)
        assert fleet.state("yi") is State.COLD
        assert fleet.reason("yi") == "the engine of yi died: killed by signal 9 (smaller model)"
        assert fleet.watch.states("local/yi")[-2:] == [State.DOWN, State.COLD]
        assert fleet.watch.now("local/yi").url == ""
        await asyncio.sleep(100)
        await fleet.use("yi")
        assert fleet.reason("yi") == ""

    play(fleet, test)
    assert fleet.launcher.starts == ["yi", "yi"]


def test_a_pinned_engine_restarts_at_once_and_later_if_it_keeps_dying() -> None:
    fleet = LocalFleet(model("yi", pinned=True), model("pre", preload=True), launcher=FakeLauncher(load_s=1))

    async def test() -> None:
        await asyncio.sleep(100)
        fleet.launcher.engine("yi").kill()
        fleet.launcher.engine("pre").kill()
        await asyncio.sleep(0.75)
        assert (fleet.state("yi"), fleet.state("pre")) == (State.LOADING, State.LOADING)
        for rest_s in (5, 10):
            await asyncio.sleep(2)
            fleet.launcher.engine("yi").kill()
            await asyncio.sleep(rest_s - 0.5)
            assert fleet.state("yi") is State.DOWN
            await asyncio.sleep(1.2)
            assert fleet.state("yi") is State.LOADING
        await asyncio.sleep(100)
        fleet.launcher.engine("yi").kill()
        await asyncio.sleep(0.75)
        assert fleet.state("yi") is State.LOADING

    play(fleet, test)


def test_a_preloaded_model_that_recovers_evicts_nothing() -> None:
    """Other models took its memory during its backoff."""
    fleet = LocalFleet(
        model("pre", 2, preload=True), model("x", 2), model("y", 2), launcher=FakeLauncher(load_s=1, broken=["pre"])
    )

    async def test() -> None:
        await asyncio.sleep(1.5)
        fleet.launcher.broken.clear()
        await fleet.use("x")
        await fleet.use("y")
        await asyncio.sleep(20)
        assert (fleet.state("pre"), fleet.state("x"), fleet.state("y")) == (State.COLD, State.READY, State.READY)
        await fleet.use("pre")

    play(fleet, test)


def test_a_pinned_model_dropped_by_a_dip_of_memory_loads_when_it_fits() -> None:
    """A busy model took its memory during its backoff; it does not wait for that one while it cannot fit."""
    fleet = LocalFleet(model("p", 2, pinned=True), model("q", 3), launcher=FakeLauncher(load_s=1))

    async def test() -> None:
        for _ in range(2):
            await asyncio.sleep(3)
            fleet.launcher.engine("p").kill()
        await asyncio.sleep(1)
        await fleet.use("q")
        fleet.in_flight["local/q"] = 1
        await asyncio.sleep(10)
        assert (fleet.state("p"), fleet.reason("p")) == (State.COLD, "waits for q to become idle")
        fleet.budget = 1 * GB
        await asyncio.sleep(0.6)
        assert fleet.state("p") is State.DOWN
        assert "needs 1.9 GiB" in fleet.reason("p")
        fleet.budget = 4 * GB
        await asyncio.sleep(1)
        assert (fleet.state("p"), fleet.reason("p")) == (State.COLD, "waits for q to become idle")
        fleet.in_flight["local/q"] = 0
        await asyncio.sleep(5)
        assert fleet.state("p") is State.READY

    play(fleet, test)


def test_a_model_that_no_longer_fits_drops_its_reason_for_waiting() -> None:
    fleet = LocalFleet(model("a", 3), model("b", 3))

    async def test() -> None:
        await fleet.use("a")
        fleet.in_flight["local/a"] = 1
        fleet.wake("b")
        await asyncio.sleep(1)
        fleet.budget = 1 * GB
        await asyncio.sleep(0.6)
        fleet.budget = 4 * GB
        await asyncio.sleep(0.6)
        assert (fleet.state("b"), fleet.reason("b")) == (State.COLD, "")

    play(fleet, test)


def test_an_engine_that_hangs_holds_its_memory_until_it_is_gone() -> None:
    """Ending it takes seconds; nothing is loaded beside it meanwhile."""
    fleet = LocalFleet(model("yi", 3), model("phi", 3), launcher=FakeLauncher(load_s=1))

    async def test() -> None:
        await fleet.use("yi")
        engine = fleet.launcher.engine("yi")
        engine.ends_s = 6.0
        engine.kill()
        await asyncio.sleep(0.5)
        fleet.wake("phi")
        await asyncio.sleep(3)
        assert [one.model.name for one in fleet.launcher.alive] == ["yi"]
        await asyncio.sleep(5)
        assert (fleet.state("phi"), [one.model.name for one in fleet.launcher.alive]) == (State.READY, ["phi"])

    play(fleet, test)


def test_an_engine_that_is_being_stopped_does_not_fail() -> None:
    """It is evicted and woken again before its pending liveness check reports a death."""
    fleet = LocalFleet(model("yi", ttl_s=10.0), launcher=FakeLauncher(load_s=1))

    async def test() -> None:
        await fleet.use("yi")
        engine = fleet.launcher.engine("yi")
        engine.death_s = 3.0
        await asyncio.sleep(10.6)
        assert fleet.state("yi") is State.DRAINING
        engine.kill()
        fleet.wake("yi")
        await asyncio.sleep(8)
        assert (fleet.state("yi"), fleet.reason("yi")) == (State.READY, "")

    play(fleet, test)
    assert fleet.launcher.starts == ["yi", "yi"]


def test_system_errors_are_reported_without_the_path() -> None:
    """Clients read it as the reason for a 503."""
    fleet = LocalFleet(model("yi"))

    async def test() -> None:
        def start(_model: LocalModel) -> FakeEngine:
            raise PermissionError(13, "Permission denied", "/home/pi/.cache/promptai/logs")

        fleet.launcher.start = start  # type: ignore[assignment, method-assign]
        fleet.wake("yi")
        await asyncio.sleep(0.5)
        assert (fleet.state("yi"), fleet.reason("yi")) == (State.DOWN, "Permission denied")

    play(fleet, test)
