"""Engines over HTTP, as the gateway reaches them: bodies pass through unchanged."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Self

from promptai.engine.connection import EngineSession, EngineStream
from promptai.engine.upstream import Piece, Reply, broken_off, is_done, no_stream, refused, up_to_end
from promptai.errors import EngineProtocolError, EngineRefusedError
from promptai.wire.sse import SseEvent

_JSON = "application/json"


class HttpUpstream:
    """
    An ``Upstream`` over HTTP; an async context manager.

    Args:
        keys: The API key of each URL that requires one; read for each request, so it may change.
    """

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._keys = keys if keys is not None else {}
        self._session = EngineSession(pass_through=True)

    async def __aenter__(self) -> Self:
        """Open the session."""
        await self._session.__aenter__()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close the session and its connections."""
        await self._session.__aexit__()

    async def get(self, url: str, path: str, *, limit_s: float) -> Reply:
        """See ``Upstream``."""
        headers = self._headers(url, accept=_JSON)
        return await self._session.exchange("GET", url, path, limit_s=limit_s, headers=headers)

    async def post(self, url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
        """See ``Upstream``."""
        headers = self._headers(url, accept=_JSON)
        return await self._session.exchange("POST", url, path, body, limit_s=limit_s, headers=headers)

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
        loop, headers = asyncio.get_running_loop(), self._headers(url, accept="text/event-stream")
        async with self._session.stream(url, path, body, silence_s=silence_s, headers=headers) as stream:
            if stream.status != 200 or stream.content_type == _JSON:
                raise await _rejected(url, stream)
            stream.begun = True
            while data := await stream.read():
                t = loop.time()
                events, ended = up_to_end(stream.parse(data), ends)
                yield Piece(t, events)
                if ended:
                    return
            raise broken_off(url)

    def _headers(self, url: str, *, accept: str) -> dict[str, str]:
        headers = {"Content-Type": _JSON, "Accept": accept}
        if key := self._keys.get(url):
            headers["Authorization"] = f"Bearer {key}"
        return headers


async def _rejected(url: str, stream: EngineStream) -> EngineRefusedError | EngineProtocolError:
    body = await stream.reason()
    return no_stream(url, body) if stream.status == 200 else refused(url, stream.status, body, stream.retry_after_s)
