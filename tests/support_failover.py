"""Engines that are killed in the middle of answers, and a gateway in front of them.

Shared by ``benchmarks/failover.py``, which wants a hundred interruptions of each kind, and
``tests/gateway/test_nothing_is_lost.py``, which wants ten; ``support_referee`` judges the answers.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from promptai.engine.client import EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import locate
from promptai.engine.upstream import Piece, is_done
from promptai.errors import EngineError
from promptai.fleet.registry import Registry
from promptai.fleet.replica import Rates, Snapshot, State
from promptai.fleet.static import StaticServer, StaticSource
from promptai.gateway.admission import AdmissionRules
from promptai.gateway.app import Gateway
from promptai.gateway.auth import Guard
from promptai.gateway.server import GatewayServer
from promptai.models.bundled import bundled_model
from promptai.router.estimate.policy import STRATEGIES
from promptai.router.estimate.rates import RateBook
from promptai.router.schedule.dispatcher import Dispatcher
from promptai.router.schedule.fleet_state import FleetState
from promptai.wire.sse import SseEvent

MAX_TOKENS = 60
#: A request that takes so long hangs: none here needs a second.
HANG_S = 60.0


class Continuation(msgspec.Struct):
    """
    A request to resume an answer, and the engine's response.

    Attributes:
        prompt: Token ids that the gateway sent.
        tokens: Token ids that the engine reported; ``text`` is their text.
    """

    prompt: list[int] = []
    tokens: list[int] = []
    text: str = ""


class Heard(msgspec.Struct):
    """
    The answer that a client received.

    Attributes:
        ended: Number of finish reasons.
        pause_s: The longest time between two chunks.
    """

    text: str = ""
    replica: str = ""
    failure: str = ""
    tokens: int = 0
    ended: int = 0
    ids: set[str] = msgspec.field(default_factory=set)
    pause_s: float = 0.0


class Recorder(HttpUpstream):
    """An ``HttpUpstream`` that records all continuations by the ``seed`` of their request."""

    def __init__(self) -> None:
        super().__init__()
        self.continuations: dict[int, list[Continuation]] = {}

    async def stream(
        self,
        url: str,
        path: str,
        body: bytes,
        *,
        silence_s: Callable[[], float],
        ends: Callable[[SseEvent], bool] = is_done,
    ) -> AsyncGenerator[Piece, None]:
        """See ``Upstream``."""
        continuation = Continuation()
        if path == "/completion":
            asked = msgspec.json.decode(body, type=dict[str, Any])
            continuation.prompt = asked["prompt"]
            self.continuations.setdefault(asked.get("seed", -1), []).append(continuation)
        pieces = super().stream(url, path, body, silence_s=silence_s, ends=ends)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                for event in piece.events if continuation.prompt else ():
                    with contextlib.suppress(msgspec.DecodeError):
                        chunk = msgspec.json.decode(event.data, type=dict[str, Any])
                        continuation.tokens += [] if "prompt_progress" in chunk else chunk.get("tokens", [])
                        continuation.text += chunk.get("content", "")
                yield piece


class Boards:
    """Real engines that tests kill and restart; an async context manager."""

    def __init__(self, count: int, slots: int, folder: Path) -> None:
        self._folder = folder
        self._flags = [
            EngineFlags(model=str(bundled_model()), port=free_port(), threads=1, context=4096 * slots, slots=slots)
            for _ in range(count)
        ]
        self._running: dict[str, RunningEngine] = {}
        self._killed: list[RunningEngine] = []

    async def __aenter__(self) -> Self:
        await self.restart()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._bury()
        for engine in self._running.values():
            await asyncio.to_thread(engine.stop)

    @property
    def urls(self) -> list[str]:
        """URLs of the engines."""
        return [f"http://127.0.0.1:{flags.port}" for flags in self._flags]

    def kill(self, replica_id: str) -> None:
        """Kill the engine of a replica with SIGKILL, as the kernel does when memory is full."""
        engine = self._running.pop(replica_id, None)
        if engine is not None and engine.pid is not None:
            os.kill(engine.pid, signal.SIGKILL)
            self._killed.append(engine)

    async def restart(self) -> None:
        """Start the engines that do not run."""
        await self._bury()
        for number, flags in enumerate(self._flags):
            name = f"127.0.0.1:{flags.port}"
            if name not in self._running:
                engine = RunningEngine(locate(), flags, log=self._folder / f"engine-{number}.log")
                self._running[name] = await engine.__aenter__()

    async def _bury(self) -> None:
        for engine in self._killed:
            await asyncio.to_thread(engine.death)
        self._killed.clear()


@contextlib.asynccontextmanager
async def front(
    urls: Sequence[str], *, stall_s: float = 15.0, rates: Rates | None = None
) -> AsyncIterator[tuple[GatewayServer, Registry, Recorder]]:
    """Run a gateway in front of these engines."""
    async with Recorder() as upstream:
        registry = Registry(
            [StaticSource([StaticServer(url, rates=rates or Rates()) for url in urls], upstream, period_s=0.2)]
        )
        dispatcher = Dispatcher(FleetState(registry, RateBook()), STRATEGIES["affinity"]())
        gateway = Gateway(dispatcher, upstream, Guard(None, open=True), rules=AdmissionRules(stall_s=stall_s))
        watching = asyncio.create_task(registry.run())
        try:
            async with GatewayServer(gateway) as server:
                await all_ready(registry, len(urls))
                yield server, registry, upstream
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
            dispatcher.close()


async def all_ready(registry: Registry, count: int) -> None:
    """Wait until ``count`` replicas are ready in the registry."""
    ready = asyncio.Event()

    def look(snapshot: Snapshot) -> None:
        if sum(replica.state is State.READY for replica in snapshot.replicas) >= count:
            ready.set()

    unsubscribe = registry.subscribe(look)
    try:
        look(registry.snapshot)
        async with asyncio.timeout(HANG_S):
            await ready.wait()
    finally:
        unsubscribe()


async def ask(url: str, body: dict[str, Any], on_chunk: Callable[[Heard], None] = lambda _: None) -> Heard:
    """Stream one chat; ``on_chunk`` is called after every chunk."""
    heard, loop = Heard(), asyncio.get_running_loop()
    last = loop.time()

    def on_status(found: Any) -> None:
        heard.replica = found.get("x-promptai-replica", heard.replica)

    async with EngineClient(url, on_status=on_status) as client:
        try:
            async with contextlib.aclosing(client.stream_chat(body)) as arrivals:
                async for arrival in arrivals:
                    text = arrival.chunk.content
                    heard.text += text
                    heard.tokens += bool(text)
                    heard.ended += len(arrival.chunk.finish_reasons)
                    heard.pause_s, last = max(heard.pause_s, loop.time() - last), loop.time()
                    on_chunk(heard)
        except EngineError as error:
            heard.failure = error.message
    return heard


def chat(messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    """The body of a chat with greedy sampling."""
    return {"messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, **fields}
