"""Write responses to clients, and keep connections alive while an answer is not there yet.

A client of a board waits for minutes, and every proxy in between closes a silent connection. So a stream that has not
begun within a second sends a comment now and then, which clients ignore. Clients that send ``x-promptai-status: 1``
get events instead, with the place in the queue, the progress of loading or prefill, and the estimated time left.

Before the first byte a failure is an HTTP status; after it, an error event in the stream.
"""

import asyncio
from contextlib import aclosing
from typing import Self

import msgspec
from aiohttp import web

from promptai.errors import PromptAIError
from promptai.gateway.admission import AdmittedRequest
from promptai.gateway.errors import ApiError, api_error, engine_refusal
from promptai.router.failover.request import RoutedRequest

#: First keep-alive; most answers of a warm board begin sooner.
_FIRST_PING_S = 1.0
#: Below this many unread bytes a write does not wait; above it a client has this long to read.
_BUFFER_BYTES, _UNREAD_S = 32 * 1024, 60.0
_PING = b": waiting\n\n"
_DONE = b"data: [DONE]\n\n"


class Heartbeat(msgspec.Struct, frozen=True):
    """
    Intervals of keep-alives.

    Attributes:
        ping_s: Seconds between comments; 0: none, for clients that cannot read them.
        status_s: Seconds between status events, if requested.
    """

    ping_s: float = 5.0
    status_s: float = 1.0


async def respond(admitted: AdmittedRequest) -> web.Response:
    """
    Return the complete response.

    Raises:
        PromptAIError, ApiError: The request failed.
    """
    reply = await admitted.routed.response()
    if reply.status != 200:
        raise engine_refusal(reply.status, reply.body)
    content_type = reply.content_type or "application/json"
    return web.Response(body=reply.body, headers={"Content-Type": content_type, **route_headers(admitted)})


async def stream(
    request: web.Request, admitted: AdmittedRequest, heartbeat: Heartbeat
) -> tuple[web.StreamResponse, int]:
    """
    Answer with an event stream.

    Returns:
        The response, and the status it would have if it had failed before its first byte.

    Raises:
        ApiError: The request failed before the first byte was sent.
    """
    status = 200
    with EventStream(request, admitted, heartbeat) as events:
        try:
            async with aclosing(admitted.routed.events()) as chunks:
                async for payloads in chunks:
                    await events.send(payloads)
        except PromptAIError as error:
            failure = api_error(error)
            await events.fail(failure)
            status = failure.status
        await events.end()
    return events.response, status


class EventStream:
    """
    An event stream to one client; a context manager that sends keep-alives during silences.

    Uses one timer, and a task only to send a keep-alive: most answers of a warm board begin before the first.
    """

    def __init__(self, request: web.Request, admitted: AdmittedRequest, heartbeat: Heartbeat) -> None:
        self.response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
        )
        self._request = request
        self._admitted = admitted
        self._heartbeat = heartbeat
        self._wants_status = request.headers.get("x-promptai-status") == "1"
        self._prepared = self._answering = False
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._keep_alive: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        interval = self._interval_s
        if interval is not None:
            first = 0.0 if self._wants_status else min(_FIRST_PING_S, interval)
            self._timer = self._loop.call_later(first, self._check_silence)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._keep_alive is not None and not self._keep_alive.cancel() and not self._keep_alive.cancelled():
            self._keep_alive.exception()  # a lost client; writing the answer reports it if it matters

    async def send(self, payloads: list[bytes]) -> None:
        """Send chunks of the answer."""
        if not self._answering:
            await self._start_answer()
        self._sent_at = self._loop.time()
        await self._write(b"".join([b"data: " + payload + b"\n\n" for payload in payloads]))

    async def fail(self, error: ApiError) -> None:
        """Send an error event; raises ``error`` if nothing has been sent, so that it becomes an HTTP status."""
        await self._finish_keep_alive()
        if not self._prepared:
            raise error
        self._answering = True  # ends status events, too
        await self._write(b"data: " + error.body() + b"\n\n")

    async def end(self) -> None:
        """Close the stream; no keep-alive may follow its end, however slowly the client reads."""
        if not self._answering:
            await self._start_answer()
        await self._finish_keep_alive()
        if self._timer is not None:
            self._timer.cancel()
        await self.response.write_eof(_DONE)

    @property
    def _interval_s(self) -> float | None:
        """Longest silence; ``None``: unlimited."""
        return (
            self._heartbeat.status_s if self._wants_status and not self._answering else self._heartbeat.ping_s or None
        )

    def _check_silence(self) -> None:
        """Send a keep-alive if nothing has been sent for the interval."""
        interval = self._interval_s
        if interval is None:
            return
        if self._answering and self._sent_at + interval > self._loop.time():
            self._timer = self._loop.call_at(self._sent_at + interval, self._check_silence)
        else:
            self._keep_alive = asyncio.create_task(self._send_keep_alive())

    async def _send_keep_alive(self) -> None:
        if not self._prepared:
            await self._prepare()
        if self._wants_status and not self._answering:
            await self._send_status(_status(self._admitted.routed))
        else:
            await self._write(_PING)
        self._sent_at = self._loop.time()
        if self._interval_s is not None:
            self._timer = self._loop.call_at(self._sent_at + self._interval_s, self._check_silence)

    async def _finish_keep_alive(self) -> None:
        """Wait for a keep-alive that is being sent: the response's head goes out once."""
        if self._keep_alive is not None:
            await self._keep_alive

    async def _start_answer(self) -> None:
        """Begin the answer; if the head has been sent before, a status event names the replica."""
        await self._finish_keep_alive()
        self._answering = True
        if not self._prepared:
            await self._prepare()
        elif self._wants_status:
            # The answer begins even if its first chunk has no text.
            status = _status(self._admitted.routed)
            await self._send_status({"stage": "decode"} | {key: status[key] for key in ("replica",) if key in status})

    async def _send_status(self, status: dict[str, object]) -> None:
        # Clients that ignore event names read it as a chunk: one without choices, like the usage chunk.
        event = msgspec.json.encode({"object": "promptai.status", "choices": [], **status})
        await self._write(b"event: promptai.status\ndata: " + event + b"\n\n")

    async def _write(self, data: bytes) -> None:
        """
        Write, and wait until the client has read enough.

        Raises:
            ConnectionError: The client is gone, or has not read for so long that another request shall have its slot.
        """
        transport = self._request.transport
        if transport is None or transport.get_write_buffer_size() + len(data) < _BUFFER_BYTES:
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
        self.response.headers.update(route_headers(self._admitted))
        await self.response.prepare(self._request)


def route_headers(admitted: AdmittedRequest) -> dict[str, str]:
    """Return the response headers that describe a request's route, as far as it is known now."""
    lease, found = admitted.routed.lease, {"x-promptai-model": admitted.model}
    reasons = [admitted.reason] if admitted.reason else []
    if lease is not None:
        timings = admitted.routed.timings
        cached = timings.cache_n if timings is not None and timings.cache_n is not None else None
        found["x-promptai-replica"] = lease.replica.id
        found["x-promptai-queue-ms"] = f"{1000 * lease.queued_s:.0f}"
        # An estimate until the engine reports; the usage at the end of the stream is exact.
        found["x-promptai-cached-tokens"] = str(cached if cached is not None else round(lease.cached_tokens))
        reasons.append(lease.reason)
    if reasons:
        found["x-promptai-route-reason"] = "; ".join(reasons)
    return {name: _header_value(value) for name, value in found.items()}


def _status(routed: RoutedRequest) -> dict[str, object]:
    status = routed.status()
    found: dict[str, object] = {"stage": status.stage}
    if routed.lease is not None:
        found["replica"] = routed.lease.replica.id
    if status.place is not None:
        found["place"] = status.place
    if status.share is not None:
        found["percent"] = round(100 * status.share)
    if status.left_s is not None:
        found["left_s"] = round(status.left_s, 1)
    return found


def _header_value(value: str) -> str:
    """Replace all but printable ASCII: names come from files and servers, and a header is one line."""
    if value.isascii() and value.isprintable():
        return value
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in value)
