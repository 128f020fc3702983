"""Shared by the tests of the fleet: fake servers and engines, and a subscriber that records publications."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from promptai.engine.upstream import Piece, Reply
from promptai.errors import EngineDiedError, EngineStartError
from promptai.fleet.local import LocalModel, LocalSource
from promptai.fleet.replica import Replica, State
from support_clock import run_virtually

GB = 1_000_000_000


@dataclass
class Host:
    """A server: its responses to ``GET`` by path; 404 for any other path."""

    answers: dict[str, tuple[int, object]] = field(default_factory=dict)
    dead: bool = False
    slow_s: float = 0.0


def llama_server(model: str = "yi", *, slots: int = 2, context: int = 4096) -> Host:
    """A host that responds like llama-server."""
    return Host(
        {
            "/health": (200, {"status": "ok"}),
            "/props": (
                200,
                {
                    "total_slots": slots,
                    "default_generation_settings": {"n_ctx": context},
                    "model_alias": model,
                    "model_path": f"/models/{model}.gguf",
                    "build_info": "b11549",
                },
            ),
            "/v1/models": (200, {"data": [{"id": model}]}),
        }
    )


class FakeUpstream:
    """An ``Upstream`` of fake hosts that records each request and runs no model."""

    def __init__(self, hosts: dict[str, Host]) -> None:
        self.hosts = hosts
        self.asked: list[tuple[float, str, str]] = []

    def paths(self, url: str) -> list[str]:
        """Paths that one host was asked for, in order."""
        return [path for _, asked, path in self.asked if asked == url]

    async def get(self, url: str, path: str, *, limit_s: float) -> Reply:
        """Respond as the host does."""
        self.asked.append((asyncio.get_running_loop().time(), url, path))
        host = self.hosts[url]
        if host.dead:
            raise EngineDiedError(f"{url} does not answer")
        await asyncio.sleep(min(host.slow_s, limit_s))
        if host.slow_s >= limit_s:
            raise EngineDiedError(f"{url} does not answer")
        status, body = host.answers.get(path, (404, {"error": "not found"}))
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Reply(status, raw, "application/json")

    async def post(self, url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
        """Fail: these tests send no work to an engine."""
        raise AssertionError(f"{url}{path} was asked to work: {body!r} {limit_s}")

    async def stream(self, url: str, path: str, body: bytes, **_settings: Any) -> AsyncGenerator[Piece, None]:
        """Fail: these tests send no work to an engine."""
        raise AssertionError(f"{url}{path} was asked to work: {body!r}")
        yield


class Watch:
    """A subscriber that records every publication with its time."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, tuple[Replica, ...]]] = []

    def __call__(self, replicas: Sequence[Replica]) -> None:
        """Record one publication."""
        self.seen.append((asyncio.get_running_loop().time(), tuple(replicas)))

    def now(self, replica_id: str) -> Replica:
        """A replica as last published."""
        return next(replica for replica in self.seen[-1][1] if replica.id == replica_id)

    def states(self, replica_id: str) -> list[State]:
        """The states of a replica in order, without repetitions."""
        states: list[State] = []
        for _, replicas in self.seen:
            for replica in replicas:
                if replica.id == replica_id and states[-1:] != [replica.state]:
                    states.append(replica.state)
        return states


class FakeEngine:
    """An engine that loads on virtual time and dies on command."""

    def __init__(self, launcher: "FakeLauncher", model: LocalModel) -> None:
        self._launcher = launcher
        self.model = model
        self.killed: EngineDiedError | None = None
        self.ends_s: float | None = None
        self.death_s = 0.0
        self.pid: int | None = None
        self._began = 0.0

    @property
    def base_url(self) -> str:
        """A URL for each model."""
        return f"http://{self.model.name}"

    def resident_bytes(self) -> int | None:
        """Bytes loaded so far; 10 % are resident from the start."""
        elapsed = asyncio.get_running_loop().time() - self._began
        return int(self.model.needed_bytes * (0.1 + elapsed / self._launcher.load_s))

    async def death(self) -> EngineDiedError | None:
        """Return the error that ``kill`` set, after ``death_s`` seconds; ``None`` while the engine lives."""
        if self.death_s:
            await asyncio.sleep(self.death_s)
        return self.killed

    def kill(self) -> None:
        """Make the engine die."""
        self.killed = EngineDiedError(f"the engine of {self.model.name} died: killed by signal 9", hint="smaller model")

    async def __aenter__(self) -> Self:
        self._began = asyncio.get_running_loop().time()
        assert self.model.name not in [engine.model.name for engine in self._launcher.alive]
        self._launcher.log.append((self._began, "start", self.model.name))
        self._launcher.alive.append(self)
        try:
            await asyncio.sleep(self._launcher.load_s)
            if self.model.name in self._launcher.broken:
                raise EngineStartError("the file is damaged", hint="fetch it again")
        except BaseException:
            self._launcher.alive.remove(self)
            raise
        return self

    async def __aexit__(self, *_exc: object) -> None:
        try:
            usual = 0.2 if self.killed else self._launcher.stop_s
            await asyncio.sleep(usual if self.ends_s is None else self.ends_s)
        finally:
            self._launcher.alive.remove(self)
            self._launcher.log.append((asyncio.get_running_loop().time(), "stop", self.model.name))


class FakeLauncher:
    """Starts fake engines; ``alive`` are those that hold memory."""

    def __init__(self, *, load_s: float = 10.0, stop_s: float = 1.0, broken: Sequence[str] = ()) -> None:
        self.load_s = load_s
        self.stop_s = stop_s
        self.broken = set(broken)
        self.alive: list[FakeEngine] = []
        self.log: list[tuple[float, str, str]] = []

    def start(self, model: LocalModel) -> FakeEngine:
        """Return an engine that starts when its context is entered."""
        return FakeEngine(self, model)

    @property
    def starts(self) -> list[str]:
        """Names of the models, in the order of their starts."""
        return [name for _, what, name in self.log if what == "start"]

    def engine(self, name: str) -> FakeEngine:
        """The live engine of a model."""
        return next(engine for engine in self.alive if engine.model.name == name)


class LocalFleet:
    """A local source on virtual time, whose memory budget and requests in flight the test sets."""

    def __init__(self, *models: LocalModel, launcher: FakeLauncher | None = None, budget: int = 4 * GB) -> None:
        self.launcher = launcher or FakeLauncher()
        self.budget = budget
        self.in_flight: dict[str, int] = {}
        self.watch = Watch()
        self.source = LocalSource(
            models, self.launcher, lambda: self.budget, lambda replica_id: self.in_flight.get(replica_id, 0)
        )

    def state(self, name: str) -> State:
        """State of a model, as last published."""
        return self.watch.now(f"local/{name}").state

    def reason(self, name: str) -> str:
        """Reason for a model's state, as last published."""
        return self.watch.now(f"local/{name}").reason

    def wake(self, name: str) -> None:
        """Request that a model be loaded."""
        self.source.wake(f"local/{name}")

    async def use(self, name: str) -> None:
        """Wake a model, wait until it is ready, and mark it as used."""
        self.wake(name)
        async with asyncio.timeout(1000):
            while self.state(name) is not State.READY:  # noqa: ASYNC110  virtual time
                await asyncio.sleep(0.1)
        self.source.touch(f"local/{name}")


def model(name: str, needed: float = 1.0, **settings: Any) -> LocalModel:
    """A local model that needs ``needed`` GB."""
    return LocalModel(name=name, path=Path(f"/models/{name}.gguf"), needed_bytes=int(needed * GB), **settings)


async def beside(work: Coroutine[Any, Any, None], play: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``work`` while ``play`` runs, then cancel it and wait for its end."""
    task = asyncio.create_task(work)
    try:
        await asyncio.sleep(0)
        await play()
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def play(fleet: LocalFleet, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a local source on virtual time while a test plays; afterwards no engine may be left."""

    async def main() -> None:
        try:
            await beside(fleet.source.run(fleet.watch), test)
        finally:
            left = [engine.model.name for engine in fleet.launcher.alive]
        assert left == []

    run_virtually(main())
