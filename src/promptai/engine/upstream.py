"""HTTP to engines as the gateway needs it: bodies go through as they are.

A gateway that decodes every answer into types loses what it does not know; one that
waits for whole answers cannot stream. So requests and answers are bytes here, streams are
events as they arrive, and only what went wrong is understood.
"""

import asyncio
import contextlib
import os
import re
import ssl
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, Self

import aiohttp
import msgspec

from promptai.errors import EngineDiedError, EngineProtocolError, EngineRefusedError
from promptai.wire.openai import ErrorBody, error_in
from promptai.wire.sse import SseEvent, SseParser

#: The largest honest body: the probabilities of a vocabulary of 256k tokens take about 30 MB.
_MAX_BODY_BYTES = 64 * 1024 * 1024
_MAX_REASON_BYTES = 64 * 1024
_MAX_DIGITS = 7
_REASON_S = 30.0
_CONNECT_S = 10.0
#: How often a silence is looked at whose limit may have become shorter.
_LOOK_S = 5.0
_JSON = "application/json"


class Reply(NamedTuple):
    """
    A whole answer, whatever its status.

    Attributes:
        retry_after_s: What its ``Retry-After`` says; ``None``: nothing that is a number of seconds.
    """

    status: int
    body: bytes
    content_type: str
    retry_after_s: float | None = None


class Piece(msgspec.Struct, frozen=True):
    """
    What the bytes that arrived at one moment completed.

    Attributes:
        t: The loop's time at which they arrived.
        events: The events, keep-alive comments among them; may be none.
    """

    t: float
    events: list[SseEvent]


def is_done(event: SseEvent) -> bool:
    """Whether an event ends a stream of OpenAI's form."""
    return event.data == "[DONE]"


class Upstream(Protocol):
    """Something that reaches engines by their URL."""

    async def get(self, url: str, path: str, *, limit_s: float) -> Reply:
        """
        ``GET``; the whole answer.

        Raises:
            EngineDiedError: The connection failed, or there was no whole answer within ``limit_s``.
            EngineProtocolError: It is larger than any honest answer.
        """

    async def ask(self, url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
        """
        ``POST`` of JSON; the whole answer.

        Raises:
            EngineDiedError: The connection failed, or there was no whole answer within ``limit_s``.
            EngineProtocolError: It is larger than any honest answer.
        """

    def stream(
        self,
        url: str,
        path: str,
        body: bytes,
        *,
        silence_s: Callable[[], float],
        ends: Callable[[SseEvent], bool] = is_done,
    ) -> AsyncGenerator[Piece, None]:
        """
        ``POST`` of JSON; the events of its answer as they arrive. Closing it closes the connection.

        Args:
            silence_s: The longest wait for the next bytes, asked again and again while they are waited for.
            ends: Whether an event is the last of a whole answer; it is yielded, and nothing after it.

        Raises:
            EngineRefusedError: An HTTP status other than 200, or an error instead of a stream; ``body`` holds
                what came with it.
            EngineDiedError: The connection failed, fell silent, or ended before the answer did.
            EngineProtocolError: Something that is no event stream.
        """


class HttpUpstream:
    """
    Engines over HTTP; an async context manager.

    Every request has a connection of its own, which closing a stream closes, and there is no limit on
    their number: who waits for whom is decided elsewhere. None is used twice: llama-server says keep-alive
    and closes after every stream (b11549), and a request that meets that looks like a board that has died.

    Args:
        keys: The API key of each URL that wants one; looked up for each request, so that it may change.
    """

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._keys = keys if keys is not None else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        """Be ready to connect."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            # What comes is passed on as it is, so that it had better come plain.
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close whatever is open."""
        if self._session is not None:
            await self._session.close()

    async def get(self, url: str, path: str, *, limit_s: float) -> Reply:
        """See ``Upstream``."""
        return await self._whole("GET", url, path, None, limit_s)

    async def ask(self, url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
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
        loop, parser, wait = asyncio.get_running_loop(), SseParser(), _Wait(url)
        with wait.translated(), _Patience(wait, silence_s) as patience:
            # llama-server sends no head before its first result: what others have computed there counts, too.
            async with asyncio.timeout(None) as head:
                patience.waits(lambda: head.reschedule(loop.time()))
                response = await self._open().post(
                    f"{url}{path}",
                    data=body,
                    headers=self._headers(url, accept="text/event-stream"),
                    allow_redirects=False,
                )
                patience.heard()
            try:
                if response.status != 200 or response.content_type == _JSON:
                    raise await _no_stream(url, response)
                wait.begun = True
                while data := await patience.readany(response.content):
                    t = loop.time()
                    events, ended = up_to_end(wait.feed(parser, data), ends)
                    yield Piece(t, events)
                    if ended:
                        return
                raise broken_off(url)
            finally:
                # Not release(): the engine computes on until it notices that nobody reads.
                response.close()

    async def _whole(self, method: str, url: str, path: str, body: bytes | None, limit_s: float) -> Reply:
        wait = _Wait(f"{url}{path}", limit_s)
        with wait.translated():
            async with (
                asyncio.timeout(limit_s),
                self._open().request(
                    method, f"{url}{path}", data=body, headers=self._headers(url, accept=_JSON), allow_redirects=False
                ) as response,
            ):
                data = await _read(response, _MAX_BODY_BYTES + 1)
                if len(data) > _MAX_BODY_BYTES:
                    raise EngineProtocolError(f"{url}{path} answered more than {_MAX_BODY_BYTES} bytes")
                return Reply(response.status, data, response.headers.get("Content-Type", ""), _retry_after_s(response))

    def _headers(self, url: str, *, accept: str) -> dict[str, str]:
        headers = {"Content-Type": _JSON, "Accept": accept}
        if key := self._keys.get(url):
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("HttpUpstream is used outside its async with block")
        return self._session


class _Wait:
    """What is waited for, for the sentence that says that it did not come."""

    def __init__(self, where: str, limit_s: float = 0.0) -> None:
        self.where = where
        self.limit_s = limit_s
        self.begun = False

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        """Where the exceptions of aiohttp end."""
        try:
            yield
        except aiohttp.ConnectionTimeoutError as error:
            raise self._lost(error) from None
        except TimeoutError:
            when = "in the middle of an answer" if self.begun else "before it began to answer"
            raise EngineDiedError(f"{self.where} was silent for {self.limit_s:g} s {when}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise broken_off(self.where, error) if self.begun else self._lost(error) from None

    def feed(self, parser: SseParser, data: bytes) -> list[SseEvent]:
        """The events that these bytes complete."""
        try:
            return parser.feed(data)
        except ValueError as error:
            raise EngineProtocolError(f"{self.where} sent a broken event stream: {error}") from None

    def _lost(self, error: Exception) -> EngineDiedError:
        return EngineDiedError(f"no connection to {self.where}: {_reason(error)}", hint="is it still running there?")


class _Patience:
    """
    Ends the wait for an engine that has fallen silent; a context manager.

    One timer a stream: a timeout around each read cost a tenth of what passing a chunk on costs.
    """

    def __init__(self, wait: _Wait, silence_s: Callable[[], float]) -> None:
        self._wait = wait
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None

    def __enter__(self) -> Self:
        self._timer = self._loop.call_soon(self._look)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._timer.cancel()

    def waits(self, give_up: Callable[[], None]) -> None:
        """From now on something is waited for; ``give_up`` ends that."""
        self._since, self._give_up = self._loop.time(), give_up

    def heard(self) -> None:
        """Something has come; the time that whoever gets it takes is not the engine's silence."""
        self._since = None

    async def readany(self, content: aiohttp.StreamReader) -> bytes:
        """
        The next bytes; none at the end.

        Raises:
            TimeoutError: None have come for too long.
        """
        self.waits(lambda: content.set_exception(TimeoutError()))
        data = await content.readany()
        self.heard()
        return data

    def _look(self) -> None:
        next_look = self._loop.time() + _LOOK_S
        if self._since is not None:
            limit_s = self._silence_s()
            if self._since + limit_s <= self._loop.time():
                self._wait.limit_s = limit_s
                self._give_up()
                return
            next_look = min(next_look, self._since + limit_s)
        self._timer = self._loop.call_at(next_look, self._look)


def up_to_end(events: list[SseEvent], ends: Callable[[SseEvent], bool]) -> tuple[list[SseEvent], bool]:
    """Events up to the last of a whole answer, and whether it is among them."""
    for number, event in enumerate(events, 1):
        if ends(event):
            return events[:number], True
    return events, False


def broken_off(where: str, error: Exception | None = None) -> EngineDiedError:
    """The connection ended before the answer did."""
    reason = f": {_reason(error)}" if error is not None else ""
    return EngineDiedError(f"{where} broke off in the middle of an answer{reason}")


def refused(url: str, status: int, body: bytes, retry_after_s: float | None = None) -> EngineRefusedError:
    """An HTTP status that is no success, with whatever envelope it came in."""
    error = error_in(body) or ErrorBody(body[:200].decode("utf-8", "replace").strip())
    return EngineRefusedError(
        f"{url} answered HTTP {status}: {error.message[:300]}",
        status=status,
        kind=error.type,
        body=body,
        retry_after_s=retry_after_s,
    )


def no_stream(url: str, body: bytes) -> EngineRefusedError | EngineProtocolError:
    """HTTP 200, and then no stream of events: an error in disguise, or something else."""
    if error_in(body) is not None:
        return refused(url, 200, body)
    return EngineProtocolError(f"{url} answered at once, where a stream of events was asked for")


async def _no_stream(url: str, response: aiohttp.ClientResponse) -> EngineRefusedError | EngineProtocolError:
    """Why it does not stream, as far as it says so in a short time: its status is known."""
    body = b""
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_REASON_S):
            body = await _read(response, _MAX_REASON_BYTES)
    if response.status == 200:
        return no_stream(url, body)
    return refused(url, response.status, body, _retry_after_s(response))


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    """Of its two forms (RFC 9110, 10.2.3) the seconds; nothing is known of a board's clock, so dates say nothing."""
    told = response.headers.get("Retry-After", "")
    return float(told) if told.isascii() and told.isdecimal() and len(told) <= _MAX_DIGITS else None


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """A body, up to so many bytes."""
    data = bytearray()
    while len(data) < most and (piece := await response.content.read(most - len(data))):
        data += piece
    return bytes(data)


def _reason(error: Exception) -> str:
    if not isinstance(error, aiohttp.ClientConnectorError):
        return " ".join(str(error).split()) or type(error).__name__
    # Its own words, and mostly its cause's, are addresses.
    cause = error.os_error
    if isinstance(cause, ssl.SSLError):  # numbers of its own
        return cause.strerror or "TLS failed"
    numbers = [cause.errno] if cause.errno is not None else map(int, re.findall(r"\[Errno (\d+)\]", str(cause)))
    words = dict.fromkeys(os.strerror(number) for number in numbers if number > 0)
    return ", ".join(words) or cause.strerror or "it cannot be reached"
