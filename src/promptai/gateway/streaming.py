"""Write an answer to whoever asked, while it comes: the one place where time is felt.

A person in front of a board waits for minutes, and every proxy in between hangs up on silence.
So a stream that waits for longer than a second begins all the same: with a comment now and then,
which clients skip, and, for those who ask (``x-promptai-status: 1``), with events that say how many
are before them, how far loading or the prompt is, and when the first token should come.

Until then a failure is an HTTP status; after it, an error event in the stream.
"""

import asyncio
from contextlib import aclosing
from typing import Self

import msgspec
from aiohttp import web

from promptai.errors import BrokenOffError, NoCapacityError, PromptAIError, RequestRefusedError, SaturatedError
from promptai.gateway.admission import AdmittedRequest
from promptai.gateway.envelope import ApiError, from_engine, from_error
from promptai.router.failover.request import RoutedRequest

#: Whoever waits for longer is told so; most answers on a warm board begin sooner.
_PATIENCE_S = 1.0
#: As long as so little waits to be read, writing does not wait; beyond it a client has so long to read something.
_ROOM_BYTES, _UNREAD_S = 32 * 1024, 60.0
_PING = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"


class Heartbeat(msgspec.Struct, frozen=True):
    """
    How often a waiting client hears something.

    Attributes:
        ping_s: Between comments; 0: none at all, for clients that choke on them.
        status_s: Between status events, where they were asked for.
    """

    ping_s: float = 5.0
    status_s: float = 1.0


async def answer(admitted: AdmittedRequest) -> web.Response:
    """
    Answer in one piece.

    Raises:
        ApiError: There is no answer.
    """
    routed = admitted.routed
    try:
        reply = await routed.whole()
    except PromptAIError as error:
        raise as_api_error(error) from None
    if reply.status != 200:
        raise from_engine(reply.status, reply.body)
    return web.Response(
        body=reply.body, headers={"Content-Type": reply.content_type or "application/json", **told(admitted)}
    )


async def stream(request: web.Request, admitted: AdmittedRequest, rhythm: Heartbeat) -> tuple[web.StreamResponse, int]:
    """
    Answer as an event stream.

    Returns:
        The answer, and the status that it would have if it had not begun before it failed.

    Raises:
        ApiError: There is no answer, and nothing has been sent yet.
    """
    status = 200
    with EventStream(request, admitted, rhythm) as line:
        try:
            async with aclosing(admitted.routed.events()) as chunks:
                async for some in chunks:
                    await line.send(some)
        except PromptAIError as error:
            failure = as_api_error(error)
            await line.fail(failure)
            status = failure.status
        await line.end()
    return line.response, status


class EventStream:
    """
    One event stream to one client; inside its block the client is kept company in every silence.

    One timer, and a task only when it has something to say: most answers on a warm board begin sooner.
    """

    def __init__(self, request: web.Request, admitted: AdmittedRequest, rhythm: Heartbeat) -> None:
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        self._request = request
        self._ticket = admitted
        self._rhythm = rhythm
        self._asks = request.headers.get("x-promptai-status") == "1"
        self._prepared = self._answering = False
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._company: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        pause = self._pause_s
        if pause is not None:
            self._timer = self._loop.call_later(0.0 if self._asks else min(_PATIENCE_S, pause), self._speak)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._company is not None and not self._company.cancel() and not self._company.cancelled():
            self._company.exception()  # it had nobody to speak to; if that matters the answer finds out

    async def send(self, chunks: list[bytes]) -> None:
        """Send chunks of the answer."""
        if not self._answering:
            await self._answer()
        self._sent_at = self._loop.time()
        await self._write(b"".join([b"data: " + chunk + b"\n\n" for chunk in chunks]))

    async def fail(self, error: ApiError) -> None:
        """Say that there is no more; as an HTTP status if nothing has been sent."""
        await self._spoken()
        if not self._prepared:
            raise error
        self._answering = True  # an error ends the waiting, too
        await self._write(b"data: " + error.body() + b"\n\n")

    async def end(self) -> None:
        """Close the answer; nothing may be said behind its end, however long its client takes to read it."""
        if not self._answering:
            await self._answer()
        await self._spoken()
        if self._timer is not None:
            self._timer.cancel()
        await self.response.write_eof(_DONE)

    @property
    def _pause_s(self) -> float | None:
        """The longest silence; ``None``: there is no limit."""
        return self._rhythm.status_s if self._asks and not self._answering else self._rhythm.ping_s or None

    def _speak(self) -> None:
        """Fill a silence, if it still is one."""
        pause = self._pause_s
        if pause is None:
            return
        if self._answering and self._sent_at + pause > self._loop.time():
            self._timer = self._loop.call_at(self._sent_at + pause, self._speak)
        else:
            self._company = asyncio.create_task(self._keep_company())

    async def _keep_company(self) -> None:
        """Say that the connection lives, and what it waits for."""
        if not self._prepared:
            await self._prepare()
        if self._asks and not self._answering:
            await self._tell(_shown(self._ticket.routed))
        else:
            await self._write(_PING)
        self._sent_at = self._loop.time()
        if self._pause_s is not None:
            self._timer = self._loop.call_at(self._sent_at + self._pause_s, self._speak)

    async def _spoken(self) -> None:
        """Let what is being said be said: the head of an answer goes out once."""
        if self._company is not None:
            await self._company

    async def _answer(self) -> None:
        """Begin the answer; where the head went out before, say which replica gives it to those who ask."""
        await self._spoken()
        self._answering = True
        if not self._prepared:
            await self._prepare()
        elif self._asks:
            # A first chunk without text is the beginning, too.
            shown = _shown(self._ticket.routed)
            await self._tell({"stage": "decode"} | {name: shown[name] for name in ("replica",) if name in shown})

    async def _tell(self, shown: dict[str, object]) -> None:
        # Clients that know nothing of event names take it for a chunk: one without choices, as that with the usage is.
        event = msgspec.json.encode({"object": "promptai.status", "choices": [], **shown})
        await self._write(b"event: promptai.status\ndata: " + event + b"\n\n")

    async def _write(self, data: bytes) -> None:
        """
        Write, and wait until there is room for more.

        Raises:
            ConnectionError: The client has gone, or has not read for so long that somebody else shall have its slot.
        """
        transport = self._request.transport
        if transport is None or transport.get_write_buffer_size() + len(data) < _ROOM_BYTES:
            await self.response.write(data)
            return
        try:
            async with asyncio.timeout(_UNREAD_S):
                await self.response.write(data)
        except TimeoutError:
            transport.abort()
            raise ConnectionResetError("the client does not read") from None

    async def _prepare(self) -> None:
        self._prepared = True
        self.response.headers.update(told(self._ticket))
        await self.response.prepare(self._request)


def told(admitted: AdmittedRequest) -> dict[str, str]:
    """What an answer's headers say of its way; of a stream that began to wait, as far as it was known then."""
    lease, found = admitted.routed.lease, {"x-promptai-model": admitted.model}
    reasons = [admitted.why] if admitted.why else []
    if lease is not None:
        timings = admitted.routed.timings
        cached = timings.cache_n if timings is not None and timings.cache_n is not None else None
        found["x-promptai-replica"] = lease.replica.id
        found["x-promptai-queue-ms"] = f"{1000 * lease.queued_s:.0f}"
        # Before the engine has told, it is what we expect; the account at the end of the stream is exact.
        found["x-promptai-cached-tokens"] = str(cached if cached is not None else round(lease.cached))
        reasons.append(lease.reason)
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


def _shown(routed: RoutedRequest) -> dict[str, object]:
    stage = routed.stage()
    found: dict[str, object] = {"stage": stage.stage}
    if routed.lease is not None:
        found["replica"] = routed.lease.replica.id
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
