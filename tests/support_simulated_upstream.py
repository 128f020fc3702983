"""Simulated engines in the gateway's own process, without sockets, for tests on virtual time.

Responses and faults are those of ``engine.simulated`` over HTTP. Only the network is missing: it takes no time and
splits nothing.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Self

from promptai.engine.simulated_api import SimulatedApi, Stream
from promptai.engine.simulator import BrokenOff, Simulator
from promptai.engine.upstream import Piece, Reply, broken_off, is_done, no_connection, no_stream, refused, up_to_end
from promptai.errors import EngineDiedError
from promptai.wire.sse import SseEvent, SseParser


class SimulatedUpstream:
    """
    An ``Upstream`` of simulators; an async context manager that runs them inside its block.

    Args:
        engines: The engine at each URL. An engine that is running already is not stopped at the end.

    Attributes:
        engines: The same; an engine that is added later starts with ``revive``.
    """

    def __init__(self, engines: Mapping[str, Simulator]) -> None:
        self.engines = dict(engines)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Start the engines."""
        for url in self.engines:
            self.revive(url)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """End the engines that it started."""
        await self._stack.aclose()

    def kill(self, url: str) -> None:
        """End that engine: its streams break off, and its URL refuses connections."""
        self.engines[url].kill()

    def revive(self, url: str) -> None:
        """Start that engine again, with empty slots; does nothing when it is running."""
        simulator = self.engines[url]
        if not simulator.running:
            simulator.start()
            self._stack.push_async_exit(simulator)

    async def get(self, url: str, path: str, *, limit_s: float) -> Reply:
        """See ``Upstream``."""
        return await self._whole("GET", url, path, b"", limit_s)

    async def post(self, url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
        """See ``Upstream``."""
        return await self._whole("POST", url, path, body, limit_s)

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
        loop, parser = asyncio.get_running_loop(), SseParser()
        with self._translated(url):
            async with asyncio.timeout(silence_s()):
                answer = await self._api(url).answer("POST", path, body)
            if isinstance(answer, Reply):
                if answer.status != 200:
                    raise refused(url, answer.status, answer.body)
                raise no_stream(url, answer.body)
            async with contextlib.aclosing(answer):
                while True:
                    async with asyncio.timeout(silence_s()):
                        data = await anext(answer, None)
                    if data is None:
                        raise broken_off(url)
                    if data:
                        events, ended = up_to_end(parser.feed(data), ends)
                        yield Piece(loop.time(), events)
                        if ended:
                            return

    async def _whole(self, method: str, url: str, path: str, body: bytes, limit_s: float) -> Reply:
        with self._translated(url):
            async with asyncio.timeout(limit_s):
                answer = await self._api(url).answer(method, path, body)
                return answer if isinstance(answer, Reply) else await _collected(answer)

    def _api(self, url: str) -> SimulatedApi:
        simulator = self.engines.get(url)
        if simulator is None or not simulator.running:
            raise no_connection(url, "Connection refused")
        return SimulatedApi(simulator)

    @contextlib.contextmanager
    def _translated(self, url: str) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise EngineDiedError(f"{url} was silent for too long") from None
        except BrokenOff as broken:
            if broken.dies:
                self.engines[url].kill()
            raise broken_off(url) from None


async def _collected(stream: Stream) -> Reply:
    async with contextlib.aclosing(stream):
        return Reply(200, b"".join([data async for data in stream]), "text/event-stream")
