"""Write an answer to whoever asked, while it comes: the one place where time is felt.

A person in front of a board waits for minutes, and every proxy in between hangs up on silence.
So a stream that waits for longer than a second begins all the same: with a comment now and then,
which clients skip, and, for those who ask (``x-promptai-status: 1``), with events that say how many
are before them, how far loading or the prompt is, and when the first token should come.

Until then a failure is an HTTP status; after it, an error event in the stream.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from promptai.errors import BrokenOffError, NoCapacityError, PromptAIError, RequestRefusedError, SaturatedError
from promptai.gateway.desk import Ticket
from promptai.gateway.envelope import ApiError, from_engine, from_error
from promptai.router.flight import Flight

#: Whoever waits for longer is told so; most answers on a warm board begin sooner.
_PATIENCE_S = 1.0
_PING = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"


class Rhythm(msgspec.Struct, frozen=True):
    """
    How often a waiting client hears something.

    Attributes:
        ping_s: Between comments; 0: none at all, for clients that choke on them.
        status_s: Between status events, where they were asked for.
    """

    ping_s: float = 5.0
    status_s: float = 1.0


async def answer(ticket: Ticket) -> web.Response:
    """
    Answer in one piece.

    Raises:
        ApiError: There is no answer.
    """
    flight = ticket.flight
    try:
        reply = await flight.whole()
    except PromptAIError as error:
        raise as_api_error(error) from None
    if reply.status != 200:
        raise from_engine(reply.status, reply.body)
    return web.Response(
        body=reply.body, headers={"Content-Type": reply.content_type or "application/json", **told(ticket)}
    )


async def stream(request: web.Request, ticket: Ticket, rhythm: Rhythm) -> tuple[web.StreamResponse, int]:
    """
    Answer as an event stream.

    Returns:
        The answer, and the status that it would have if it had not begun before it failed.

    Raises:
        ApiError: There is no answer, and nothing has been sent yet.
    """
    status = 200
    line = _Line(request, ticket, rhythm, asks=request.headers.get("x-promptai-status") == "1")
    async with aclosing(ticket.flight.events()) as chunks:
        try:
            first = await _first(chunks, line)
            if first is not None:
                await line.tell_the_way()
                await line.send(first)
                async with line.pinging():
                    async for some in chunks:
                        await line.send(some)
        except PromptAIError as error:
            failure = as_api_error(error)
            await line.fail(failure)
            status = failure.status
    await line.end()
    return line.response, status


async def _first(chunks: AsyncGenerator[list[bytes], None], line: "_Line") -> list[bytes] | None:
    """The first chunks; until they are there, the client is kept company."""
    waiting = asyncio.ensure_future(anext(chunks, None))
    try:
        patience = line.first_wait_s
        while not (await asyncio.wait({waiting}, timeout=patience))[0]:
            await line.keep_company()
            patience = line.interval_s
        return await waiting
    finally:
        if not waiting.done():
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
        elif not waiting.cancelled():
            waiting.exception()  # if the client left in the same moment nobody else asks for it


class _Line:
    """One event stream to one client."""

    def __init__(self, request: web.Request, ticket: Ticket, rhythm: Rhythm, *, asks: bool) -> None:
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        self._request = request
        self._ticket = ticket
        self._rhythm = rhythm
        self._asks = asks
        self._begun = False
        self._sent_at = asyncio.get_running_loop().time()

    @property
    def interval_s(self) -> float | None:
        """Until something is said to a client that waits; ``None``: nothing is."""
        return self._rhythm.status_s if self._asks else self._rhythm.ping_s or None

    @property
    def first_wait_s(self) -> float | None:
        """Until that happens for the first time."""
        if self._asks:
            return 0.0
        return None if self.interval_s is None else min(_PATIENCE_S, self.interval_s)

    async def send(self, chunks: list[bytes]) -> None:
        """Send chunks of the answer."""
        if not self._begun:
            await self._begin()
        self._sent_at = asyncio.get_running_loop().time()
        await self.response.write(b"".join([b"data: " + chunk + b"\n\n" for chunk in chunks]))

    async def keep_company(self) -> None:
        """Say that the connection lives, and what it waits for."""
        if not self._begun:
            await self._begin()
        if self._asks:
            await self._tell(_shown(self._ticket.flight))
        else:
            await self.response.write(_PING)

    async def tell_the_way(self) -> None:
        """Say that the answer begins and which replica gives it, where the head went out before anybody knew."""
        if self._begun and self._asks:
            # A first chunk without text is the beginning, too.
            shown = _shown(self._ticket.flight)
            await self._tell({"stage": "decode"} | {name: shown[name] for name in ("replica",) if name in shown})

    async def _tell(self, shown: dict[str, object]) -> None:
        # Clients that know nothing of event names take it for a chunk: one without choices, as that with the usage is.
        event = msgspec.json.encode({"object": "promptai.status", "choices": [], **shown})
        await self.response.write(b"event: promptai.status\ndata: " + event + b"\n\n")

    @contextlib.asynccontextmanager
    async def pinging(self) -> AsyncGenerator[None, None]:
        """Inside the block a silence in the middle of the answer is filled too."""
        task = asyncio.create_task(self._ping()) if self._rhythm.ping_s else None
        try:
            yield
        finally:
            if task is not None:
                task.cancel()

    async def _ping(self) -> None:
        loop, pause = asyncio.get_running_loop(), self._rhythm.ping_s
        with contextlib.suppress(ConnectionError):
            while True:
                await asyncio.sleep(max(0.1, self._sent_at + pause - loop.time()))
                if loop.time() - self._sent_at >= pause:
                    self._sent_at = loop.time()
                    await self.response.write(_PING)

    async def fail(self, error: ApiError) -> None:
        """Say that there is no more; as an HTTP status if nothing has been sent."""
        if not self._begun:
            raise error
        await self.response.write(b"data: " + error.body() + b"\n\n")

    async def end(self) -> None:
        """Close the answer."""
        if not self._begun:
            await self._begin()
        await self.response.write_eof(_DONE)

    async def _begin(self) -> None:
        self._begun = True
        self.response.headers.update(told(self._ticket))
        await self.response.prepare(self._request)


def told(ticket: Ticket) -> dict[str, str]:
    """What an answer's headers say of its way; of a stream that began to wait, as far as it was known then."""
    grant, found = ticket.flight.grant, {"x-promptai-model": ticket.model}
    reasons = [ticket.why] if ticket.why else []
    if grant is not None:
        timings = ticket.flight.timings
        cached = timings.cache_n if timings is not None and timings.cache_n is not None else None
        found["x-promptai-replica"] = grant.replica.id
        found["x-promptai-queue-ms"] = f"{1000 * grant.queued_s:.0f}"
        # Before the engine has told, it is what we expect; the account at the end of the stream is exact.
        found["x-promptai-cached-tokens"] = str(cached if cached is not None else round(grant.cached))
        reasons.append(grant.reason)
    if reasons:
        found["x-promptai-route-reason"] = "; ".join(reasons)
    return {name: _header(value) for name, value in found.items()}


def as_api_error(error: PromptAIError) -> ApiError:
    """What a client is told of a request that failed on its way."""
    if isinstance(error, SaturatedError):
        return ApiError(429, error.message, code="saturated", hint=error.hint, retry_after_s=error.retry_after_s)
    if isinstance(error, NoCapacityError):
        return ApiError(503, error.message, code="no_capacity", hint=error.hint, retry_after_s=error.retry_after_s)
    if isinstance(error, RequestRefusedError):
        return ApiError(error.status, error.message, code=error.code, param=error.param, hint=error.hint)
    if isinstance(error, BrokenOffError):
        return ApiError(502, error.message, code="broken_off", hint=error.hint, src="engine")
    return from_error(error)


def _shown(flight: Flight) -> dict[str, object]:
    stage = flight.stage()
    found: dict[str, object] = {"stage": stage.stage}
    if flight.grant is not None:
        found["replica"] = flight.grant.replica.id
    if stage.place is not None:
        found["place"] = stage.place
    if stage.share is not None:
        found["percent"] = round(100 * stage.share)
    if stage.left_s is not None:
        found["left_s"] = round(stage.left_s, 1)
    return found


def _header(value: str) -> str:
    """Names come from files and servers; a header is one line of printable ASCII."""
    if value.isascii() and value.isprintable():
        return value
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in value)
