import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from promptai.engine.client import EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.launch import port_taken
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineStartError
from promptai.fleet.launcher import EngineLauncher, LaunchedEngine
from promptai.fleet.local import LocalModel, LocalSource
from promptai.fleet.registry import Registry
from promptai.fleet.replica import State
from promptai.models.bundled import bundled_model
from support_engine import alive, until

EMBEDDED = EngineBinary("embedded", (sys.executable, "-m", "promptai.engine.embedded"), None, None)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def flags_for(model: LocalModel, port: int) -> EngineFlags:
    """One thread, little context."""
    return EngineFlags(model=str(model.path), port=port, threads=1, context=512)


def launcher_of(folder: Path, *command: str, keys: dict[str, str] | None = None) -> EngineLauncher:
    """The real launcher; with the embedded engine unless a command is given."""
    binary = EngineBinary("settings", command, None, None) if command else EMBEDDED
    return EngineLauncher(binary, flags_for, folder / "logs", {} if keys is None else keys)


def tiny(name: str = "tiny") -> LocalModel:
    """The bundled model under another name."""
    return LocalModel(name=name, path=bundled_model(), needed_bytes=200_000_000)


async def hold(engine: LaunchedEngine) -> None:
    """Start it and keep it running."""
    async with engine:
        await asyncio.get_running_loop().create_future()


def gone(engine: LaunchedEngine) -> Callable[[], Awaitable[bool]]:
    """A condition to wait for: the engine is dead."""

    async def ended() -> bool:
        return await engine.death() is not None

    return ended


def test_gives_each_engine_a_port_of_its_own_and_names_logs_after_models(tmp_path: Path) -> None:
    """And rotates a large log."""
    launcher = launcher_of(tmp_path, "/bin/true")
    engines = [launcher.start(tiny("org/yi")) for _ in range(3)]
    log = tmp_path / "logs" / "org_yi.log"
    with log.open("wb") as sink:
        sink.truncate(9_000_000)
    launcher.start(tiny("org/yi"))

    assert all(engine.base_url.startswith("http://127.0.0.1:") for engine in engines)
    assert [engine.pid for engine in engines] == [None] * 3
    assert not log.exists()
    assert log.with_suffix(".log.old").stat().st_size == 9_000_000


def test_knows_no_process_before_the_start(tmp_path: Path) -> None:
    engine = launcher_of(tmp_path, "/bin/true").start(tiny())

    assert engine.resident_bytes() is None
    assert asyncio.run(engine.death()) is None


@pytest.mark.real
def test_an_engine_answers_only_its_gateway(tmp_path: Path) -> None:
    """A web page or another user on this machine would bypass all keys and limits."""
    keys: dict[str, str] = {}

    async def play() -> list[int]:
        async with launcher_of(tmp_path, keys=keys).start(tiny()) as engine:
            body = b'{"messages": [{"role": "user", "content": "up?"}], "max_tokens": 1}'
            statuses = []
            for known in (keys, {}, {engine.base_url: "wrong"}):
                async with HttpUpstream(known) as upstream:
                    answer = await upstream.post(engine.base_url, "/v1/chat/completions", body, limit_s=10.0)
                    statuses.append(answer.status)
            assert keys[engine.base_url] not in " ".join(Path(f"/proc/{engine.pid}/cmdline").read_text().split("\0"))
            return statuses

    assert asyncio.run(play()) == [200, 401, 401]
    assert keys == {}


@pytest.mark.real
def test_rotates_the_log_of_a_running_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine continues in the new log, and its last messages are found there."""
    monkeypatch.setattr("promptai.fleet.launcher._LOG_BYTES", 1_000)
    log, keys = tmp_path / "logs" / "tiny.log", dict[str, str]()

    async def play() -> tuple[int, bytes, str]:
        async with launcher_of(tmp_path, keys=keys).start(tiny()) as engine, HttpUpstream(keys) as upstream:
            begun = log.stat().st_size
            assert await engine.death() is None
            assert log.with_suffix(".log.old").stat().st_size == begun
            await upstream.post(engine.base_url, "/completion", b'{"prompt": "up?", "n_predict": 1}', limit_s=10.0)
            written = log.read_bytes()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            await until(gone(engine))
            return begun, written, str(await engine.death())

    begun, written, message = asyncio.run(play())

    assert 0 < len(written) < begun
    assert b"\0" not in written
    assert "killed by signal 9" in message


@pytest.mark.real
def test_an_engine_that_hangs_counts_as_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by a signal. Leaving the block ends it, and kills it if it does not react."""
    monkeypatch.setattr("promptai.fleet.launcher._LIVENESS_PERIOD_S", 0.05)
    monkeypatch.setattr("promptai.fleet.launcher._HANG_S", 0.4)
    monkeypatch.setattr("promptai.fleet.launcher._SLOWEST_TOKEN_S", 0.0)
    monkeypatch.setattr("promptai.engine.launch._STOP_S", 0.2)

    async def play() -> tuple[bool, str, int | None]:
        async with launcher_of(tmp_path).start(tiny()) as engine:
            await asyncio.sleep(0.6)
            well = await engine.death() is None
            assert engine.pid is not None
            os.killpg(engine.pid, signal.SIGSTOP)
            await until(gone(engine))
            return well, str(await engine.death()), engine.pid

    well, message, pid = asyncio.run(play())

    assert well
    assert "hangs: it has not answered for 0.4 s" in message
    assert not alive(pid)


@pytest.mark.real
def test_a_failed_start_reports_the_reason_and_leaves_nothing(tmp_path: Path) -> None:
    engine = launcher_of(tmp_path, sys.executable, "-c", "import sys; sys.exit('boom')").start(tiny())

    with pytest.raises(EngineStartError, match="boom"):
        asyncio.run(hold(engine))

    assert not alive(engine.pid)


@pytest.mark.real
@pytest.mark.timed
def test_cancelling_a_start_ends_the_engine_without_blocking_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the engine ignores SIGTERM, and however often the start is cancelled."""
    monkeypatch.setattr("promptai.engine.launch._STOP_S", 1.2)
    engine = launcher_of(tmp_path, sys.executable, "-c", DEAF).start(tiny())
    log = tmp_path / "logs" / "tiny.log"

    async def deaf() -> bool:
        return log.exists() and "deaf" in log.read_text()

    async def play() -> float:
        task = asyncio.create_task(hold(engine))
        await until(deaf)
        assert (engine.resident_bytes() or 0) > 1_000_000
        gaps, last = [0.0], time.monotonic()
        task.cancel()
        while not task.done():
            await asyncio.sleep(0.02)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
            task.cancel()
        assert task.cancelled()
        assert not alive(engine.pid)
        return max(gaps)

    assert asyncio.run(play()) < 0.9


@pytest.mark.real
def test_leaves_no_engine_when_the_loop_ends(tmp_path: Path) -> None:
    """The task that held it was never awaited."""
    engine = launcher_of(tmp_path).start(tiny())
    tasks: list[asyncio.Task[None]] = []

    async def listening() -> bool:
        return port_taken(int(engine.base_url.rpartition(":")[2]))

    async def play() -> None:
        tasks.append(asyncio.create_task(hold(engine)))
        await until(listening)

    asyncio.run(play())

    assert not alive(engine.pid)


@pytest.mark.real
@pytest.mark.timed
def test_serves_evicts_and_detects_the_death_of_real_engines(tmp_path: Path) -> None:
    """With memory for one engine: the second replaces the first, and its death is detected within a second."""
    models = (tiny("a"), tiny("b"))
    source = LocalSource(models, launcher_of(tmp_path), lambda: 300_000_000, lambda _: 0)
    registry = Registry([source])
    pids: list[int] = []

    def state(replica_id: str) -> State | None:
        found = registry.snapshot.find(replica_id)
        return found.state if found is not None else None

    async def serve(replica_id: str) -> None:
        registry.wake(replica_id)

        async def ready() -> bool:
            return state(replica_id) is State.READY

        await until(ready)
        replica = registry.snapshot.find(replica_id)
        assert replica is not None
        async with EngineClient(replica.url) as client:
            assert await client.healthy()
        source.touch(replica_id)
        engine = source._entries[replica_id].engine
        assert engine is not None
        assert engine.pid is not None
        assert (engine.resident_bytes() or 0) > 20_000_000
        pids.append(engine.pid)

    async def play() -> None:
        running = asyncio.create_task(registry.run())
        await asyncio.sleep(0.1)
        await serve("local/a")
        await serve("local/b")
        assert state("local/a") is State.COLD
        assert not alive(pids[0])
        seen: list[tuple[float, State]] = []
        registry.subscribe(lambda snapshot: seen.append((time.monotonic(), snapshot.replicas[1].state)))
        killed = time.monotonic()
        os.kill(pids[1], signal.SIGKILL)

        async def cold() -> bool:
            return state("local/b") is State.COLD

        await until(cold)
        assert seen[0][1] is State.DOWN
        assert seen[0][0] - killed < 1.0
        replica = registry.snapshot.find("local/b")
        assert replica is not None
        assert "killed by signal 9" in replica.reason
        await serve("local/b")
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(play())

    assert [alive(pid) for pid in pids] == [False] * 3
