"""HTTP to engines; the only module that uses aiohttp's client.

``engine.client`` measures over it and ``engine.http_upstream`` serves over it: both have the same limits and report the
same failure in the same words.

Every request opens its own connection. llama-server announces keep-alive but closes after every stream (b11549), and
a request that meets the closing connection fails as if the board had died. A new connection costs 0.1 ms on loopback.
The number of connections is not limited: a queue hidden here would be measured as the server's.

No server can keep a caller waiting for ever or fill its memory: silence, bodies and reasons for a refusal have limits.
Nothing is retried: a retry would hide from a measurement what happened, and in the gateway the router decides.
"""

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Self

import aiohttp

from promptai.engine.upstream import Reply, broken_off, no_connection
from promptai.errors import EngineDiedError, EngineProtocolError
from promptai.wire.sse import SseEvent, SseParser

#: The largest legitimate body: the probabilities of a vocabulary of 256k tokens take about 30 MB.
_MAX_BODY_BYTES = 64 * 1024 * 1024
_MAX_REASON_BYTES = 64 * 1024
_REASON_S = 30.0
_CONNECT_S = 10.0
#: Interval at which a running silence is compared with its limit, which may have become shorter.
_LOOK_S = 5.0
_MAX_DIGITS = 7
_FAILURES = (aiohttp.ClientError, OSError)  # TimeoutError is an OSError


class EngineSession:
    """
    An HTTP session with engines; an async context manager.

    Args:
        headers: Sent with every request.
        pass_through: True in the gateway: cookies are dropped, redirects are returned instead of followed, and bodies
            are requested and returned uncompressed, because they are passed on.
    """

    def __init__(self, headers: Mapping[str, str] | None = None, *, pass_through: bool = False) -> None:
        self._headers = dict(headers or {})
        self._pass_through = pass_through
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Open the session; connections are made by requests."""
        identity = {"Accept-Encoding": "identity"} if self._pass_through else {}
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar() if self._pass_through else None,
            headers=self._headers | identity,
            auto_decompress=not self._pass_through,
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close the session and every open connection."""
        if self._http is not None:
            await self._http.close()

    async def exchange(
        self,
        method: str,
        url: str,
        path: str,
        body: bytes | None = None,
        *,
        limit_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """
        Send a request and return the whole response, whatever its status.

        Raises:
            EngineDiedError: The connection failed, or the response was not complete within ``limit_s``.
            EngineProtocolError: The body is larger than any legitimate one.
        """
        http, begun = self._open(), False
        try:
            async with (
                asyncio.timeout(limit_s),
                http.request(
                    method, f"{url}{path}", data=body, headers=headers, allow_redirects=not self._pass_through
                ) as response,
            ):
                begun = True
                data = bytearray()
                await _read_into(data, response, _MAX_BODY_BYTES + 1)
        except _FAILURES as error:
            raise _translated(
                error, url, begun=begun, late=f"{url}{path} did not answer within {limit_s:g} s"
            ) from None
        if len(data) > _MAX_BODY_BYTES:
            raise EngineProtocolError(f"{url}{path} answered with more than {_MAX_BODY_BYTES} bytes")
        return Reply(response.status, bytes(data), response.headers.get("Content-Type", ""), _retry_after_s(response))

    @contextlib.asynccontextmanager
    async def stream(
        self,
        url: str,
        path: str,
        body: bytes,
        *,
        silence_s: Callable[[], float],
        headers: Mapping[str, str] | None = None,
        hint: str = "",
    ) -> AsyncIterator["EngineStream"]:
        """
        ``POST`` JSON, and hold the connection open until the block ends.

        Args:
            silence_s: The longest wait for the next bytes; called repeatedly while waiting, so it may change.
            hint: The hint of the error about a silence.

        Raises:
            EngineDiedError: The connection failed or fell silent, here or in the block.
        """
        http, loop, stream = self._open(), asyncio.get_running_loop(), None
        with SilenceTimer(silence_s) as timer:
            try:
                # llama-server sends headers only with its first result; other requests' work delays it, too.
                async with asyncio.timeout(None) as head:
                    timer.start(lambda: head.reschedule(loop.time()))
                    response = await http.post(
                        f"{url}{path}", data=body, headers=headers, allow_redirects=not self._pass_through
                    )
                    timer.stop()
                try:
                    stream = EngineStream(url, response, timer)
                    yield stream
                finally:
                    # release() would leave the engine computing until it notices that the client has left.
                    response.close()
            except _FAILURES as error:
                begun = stream is not None and stream.begun
                when = "in the middle of an answer" if begun else "before it began to answer"
                late = f"{url} was silent for {timer.exceeded_s:g} s {when}"
                raise _translated(error, url, begun=begun, late=late, hint=hint) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._http is None:
            raise RuntimeError("the session is used outside its async with block")
        return self._http


class EngineStream:
    """
    A response while it is being received.

    Attributes:
        begun: Whether the answer has begun, set by the reader; decides how a failure is reported.
    """

    def __init__(self, url: str, response: aiohttp.ClientResponse, timer: "SilenceTimer") -> None:
        self.begun = False
        self._url = url
        self._response = response
        self._timer = timer
        self._parser = SseParser()

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self._response.status

    @property
    def content_type(self) -> str:
        """The media type, without parameters."""
        return self._response.content_type

    @property
    def headers(self) -> Mapping[str, str]:
        """The response headers; names are case-insensitive."""
        return self._response.headers

    @property
    def retry_after_s(self) -> float | None:
        """Seconds of ``Retry-After``; ``None``: missing, or not a number of seconds."""
        return _retry_after_s(self._response)

    async def read(self, since: float | None = None) -> bytes:
        """
        Return the next bytes; empty at the end.

        Args:
            since: The loop's time from which the silence counts; ``None``: from now.
        """
        self._timer.start(self._expire, since)
        data = await self._response.content.readany()
        self._timer.stop()
        return data

    def parse(self, data: bytes) -> list[SseEvent]:
        """
        Return the events that these bytes complete.

        Raises:
            EngineProtocolError: They are not an event stream, or one event is too large.
        """
        try:
            return self._parser.feed(data)
        except ValueError as error:
            raise EngineProtocolError(f"{self._url} sent a broken event stream: {error}") from None

    async def reason(self) -> bytes:
        """Read the body of a refusal, as much of it as arrives in a limited time; its status is known already."""
        data = bytearray()
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(_REASON_S):
                await _read_into(data, self._response, _MAX_REASON_BYTES)
        return bytes(data)

    def _expire(self) -> None:
        self._response.content.set_exception(TimeoutError())


class SilenceTimer:
    """
    Ends the wait for an engine that has fallen silent; a context manager.

    One timer per stream: a timeout around each read cost a tenth of what passing on a chunk costs.

    Attributes:
        exceeded_s: The limit that was exceeded; 0.0 before.
    """

    def __init__(self, limit_s: Callable[[], float]) -> None:
        self.exceeded_s = 0.0
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None

    def __enter__(self) -> Self:
        """Start looking."""
        self._timer = self._loop.call_soon(self._look)
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop looking."""
        self._timer.cancel()

    def start(self, expire: Callable[[], None], since: float | None = None) -> None:
        """Count the silence from ``since``, or from now, and call ``expire`` when it lasts too long."""
        self._since, self._expire = self._loop.time() if since is None else since, expire

    def stop(self) -> None:
        """Stop counting: the time that the reader takes is not the engine's silence."""
        self._since = None

    def _look(self) -> None:
        next_look = self._loop.time() + _LOOK_S
        if self._since is not None:
            limit_s = self._limit_s()
            if self._since + limit_s <= self._loop.time():
                self.exceeded_s = limit_s
                self._expire()
                return
            next_look = min(next_look, self._since + limit_s)
        self._timer = self._loop.call_at(next_look, self._look)


async def _read_into(data: bytearray, response: aiohttp.ClientResponse, most: int) -> None:
    while len(data) < most and (piece := await response.content.read(most - len(data))):
        data += piece


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    """Return the seconds of ``Retry-After``; its other form (RFC 9110, 10.2.3), a date, needs the board's clock."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS else None


def _translated(error: Exception, url: str, *, begun: bool, late: str, hint: str = "") -> EngineDiedError:
    if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ConnectionTimeoutError):
        return EngineDiedError(late, hint=hint)
    return broken_off(url, _reason(error)) if begun else no_connection(url, _reason(error))


def _reason(error: Exception) -> str:
    """Describe a failure in the operating system's words, without the addresses that aiohttp puts into its own."""
    if not isinstance(error, aiohttp.ClientConnectorError):
        return " ".join(str(error).split()) or type(error).__name__
    cause = error.os_error
    if isinstance(cause, ssl.SSLError):  # its numbers are not errno
        return cause.strerror or "TLS failed"
    numbers = [cause.errno] if cause.errno is not None else map(int, re.findall(r"\[Errno (\d+)\]", str(cause)))
    words = dict.fromkeys(os.strerror(number) for number in numbers if number > 0)
    return ", ".join(words) or cause.strerror or "it cannot be reached"
