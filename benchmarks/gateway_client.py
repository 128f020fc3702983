"""The load client of ``gateway_cost.py``: send requests, and time the first word and the end of each answer.

A client library would cost more than the gateway under test, so this client is a socket and a byte search. It runs as
a separate process, reads one ``LoadPlan`` as JSON from stdin and prints one ``Result``. ``cpu`` is this process's
share of one core; at 0.9 the figures measure the client.

    one    each target in turn, one request at a time, on one keep-alive connection each
    many   ``streams`` concurrent streams for each target in turn, for ``seconds`` each
"""

import asyncio
import contextlib
import re
import sys
import time
from urllib.parse import urlsplit

import msgspec

#: Non-empty text, with or without a space after the colon; the role chunk has an empty string or null.
_TEXT = re.compile(rb'"content": ?"[^"]')
_LIMIT_S = 60.0


class Target(msgspec.Struct, frozen=True):
    """
    An address under test.

    Attributes:
        body: The request, as JSON.
    """

    name: str
    url: str
    body: str


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """
    The requests to send.

    Attributes:
        rounds: Requests per target with ``one``, turns with ``many``.
        warm_up: Uncounted requests per target with ``one``; ``many`` does not count those of the first ``ramp_s``.
        ramp_s: Time until all streams have begun.
        key: API key, sent to every target.
    """

    kind: str
    targets: list[Target]
    rounds: int
    warm_up: int = 20
    streams: int = 1
    seconds: float = 1.0
    ramp_s: float = 1.0
    key: str = "none"


class Measured(msgspec.Struct):
    """
    The answers of one target.

    Attributes:
        first_s: Time to the first text of each answer; ``whole_s`` to its end.
        chunks: Chunks of text, in counted and uncounted answers.
        busy_s: Time under load.
        failed: Requests without a complete answer; ``why`` is the last reason.
    """

    first_s: list[float] = []
    whole_s: list[float] = []
    chunks: int = 0
    busy_s: float = 0.0
    failed: int = 0
    why: str = ""


class Result(msgspec.Struct):
    """Measurements of one ``LoadPlan``, by target."""

    cpu: float
    measured: dict[str, Measured]


class StaleError(ConnectionError):
    """The server closed the connection after the previous answer, as llama-server does after every stream (b11549)."""


class Connection(asyncio.Protocol):
    """One connection with one request at a time."""

    def __init__(self) -> None:
        self.first_at: float | None = None
        self.chunks = 0
        self._clock = asyncio.get_running_loop().time
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._body_left: int | None = None
        self._tail = b""
        self._done: asyncio.Future[float] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for writing."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  for the types
        self._transport = transport

    def connection_lost(self, _exc: Exception | None) -> None:
        """Fail a pending answer: ``StaleError`` if nothing of it has arrived, else ``ConnectionError``."""
        self._transport = None
        if self._done is not None and not self._done.done():
            kind = ConnectionError if self._head or self._tail or self._body_left is not None else StaleError
            self._done.set_exception(kind("the connection was closed before the end of an answer"))

    @property
    def open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, request: bytes) -> float:
        """Send a request and return the loop time at the end of its answer."""
        assert self._transport is not None  # noqa: S101  for the types
        self._done = asyncio.get_running_loop().create_future()
        self._head, self._body_left, self._tail, self.first_at, self.chunks = b"", None, b"", None, 0
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        """Abort the connection."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse the head, then search the body for text and its end."""
        now = self._clock()
        if self._tail or self._body_left is not None:
            self._body(data, now)
            return
        head, found, body = (self._head + data).partition(b"\r\n\r\n")
        if not found:
            self._head = head
            return
        if b" 200 " not in head[:20]:
            self._fail(head.partition(b"\r")[0].decode())
            return
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        self._body_left = int(length[1]) if length else None
        self._tail = b" "
        if body:
            self._body(body, now)

    def _body(self, data: bytes, now: float) -> None:
        texts = len(_TEXT.findall(data))
        self.chunks += texts
        if texts and self.first_at is None:
            self.first_at = now
        if self._body_left is not None:
            self._body_left -= len(data)
            ended = self._body_left <= 0
        else:
            self._tail = (self._tail + data[-7:])[-7:]
            ended = self._tail.endswith(b"\r\n0\r\n\r\n")
        if ended and self._done is not None and not self._done.done():
            self._done.set_result(now)

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError(why))
        self.close()


class Stream:
    """Requests to one target, one after another, on one connection as long as it lasts."""

    def __init__(self, target: Target, measured: Measured, key: str) -> None:
        parts = urlsplit(target.url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        body = target.body.encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._measured = measured
        self._connection: Connection | None = None

    async def send(self, *, counted: bool) -> None:
        """Send one request and record its times if it is counted."""
        measured = self._measured
        try:
            async with asyncio.timeout(_LIMIT_S):
                connection, sent, ended = await self._exchange()
        except (OSError, TimeoutError) as error:
            measured.failed += 1
            measured.why = str(error) or type(error).__name__
            self.close()
            await asyncio.sleep(0.05)
            return
        measured.chunks += connection.chunks
        if connection.first_at is None:
            measured.failed += 1
            measured.why = "an answer without text"
        elif counted:
            measured.first_s.append(connection.first_at - sent)
            measured.whole_s.append(ended - sent)

    async def _exchange(self) -> tuple[Connection, float, float]:
        """Return the connection with its answer, the time of sending and of its end; connecting does not count."""
        loop = asyncio.get_running_loop()
        if self._connection is not None and self._connection.open:
            sent = loop.time()
            with contextlib.suppress(StaleError):
                return self._connection, sent, await self._connection.send(self._request)
        _, self._connection = await loop.create_connection(Connection, self._host, self._port)
        sent = loop.time()
        return self._connection, sent, await self._connection.send(self._request)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def one(plan: LoadPlan, measured: dict[str, Measured]) -> None:
    """Send one request at a time to each target in turn."""
    streams = [Stream(target, measured[target.name], plan.key) for target in plan.targets]
    for number in range(-plan.warm_up, plan.rounds):
        # Reverse every second round: the second target finds warmer caches.
        for stream in streams if number % 2 else reversed(streams):
            await stream.send(counted=number >= 0)
    for stream in streams:
        stream.close()


async def many(plan: LoadPlan, measured: dict[str, Measured]) -> None:
    """Load each target in turn with all streams, in several rounds."""
    loop = asyncio.get_running_loop()
    for number in range(plan.rounds):
        for target in plan.targets if number % 2 else reversed(plan.targets):
            begun = loop.time()
            await asyncio.gather(
                *(
                    _keep_sending(
                        plan,
                        Stream(target, measured[target.name], plan.key),
                        begun,
                        begun + plan.ramp_s * n / plan.streams,
                    )
                    for n in range(plan.streams)
                )
            )
            measured[target.name].busy_s += loop.time() - begun


async def _keep_sending(plan: LoadPlan, stream: Stream, begun: float, start: float) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(start - loop.time())
    while loop.time() < begun + plan.ramp_s + plan.seconds:
        # Requests count once all streams run.
        await stream.send(counted=loop.time() >= begun + plan.ramp_s)
    stream.close()


async def main() -> None:
    """Carry out one plan."""
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=LoadPlan)
    measured = {target.name: Measured() for target in plan.targets}
    cpu, wall = time.process_time(), time.perf_counter()
    await (one if plan.kind == "one" else many)(plan, measured)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(msgspec.json.encode(Result(share, measured)))


if __name__ == "__main__":
    asyncio.run(main())
