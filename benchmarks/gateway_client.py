"""The client of ``gateway_cost.py``: asks, and notes when what came.

A client library would cost more than what is measured, so this one is a socket and a search for
bytes. It runs as a process of its own, takes one order as JSON from stdin and prints one result;
``cpu`` in it is this process's own share of one core: at 0.9 it is the client that was measured.

    one    each target in turn, one request at a time, on one connection each that stays open
    many   ``streams`` at once for each target in turn, for ``seconds`` each
"""

import asyncio
import contextlib
import re
import sys
import time
from urllib.parse import urlsplit

import msgspec

#: Some text, in whichever spelling; the role comes with an empty one or null.
_TEXT = re.compile(rb'"content": ?"[^"]')
_LIMIT_S = 60.0


class Target(msgspec.Struct, frozen=True):
    """
    Who is asked.

    Attributes:
        body: What, as JSON.
    """

    name: str
    url: str
    body: str


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """
    What is to be done.

    Attributes:
        rounds: Requests of each target with ``one``, turns with ``many``.
        warm_up: Requests of each that are not counted; with ``many`` all that begin in the first ``warm_s``.
        ramp_s: How long it takes until all streams have begun.
        key: Whoever wants an API key gets this one.
    """

    kind: str
    targets: list[Target]
    rounds: int
    warm_up: int = 20
    streams: int = 1
    seconds: float = 1.0
    ramp_s: float = 1.0
    key: str = "none"


class Seen(msgspec.Struct):
    """
    What came of one target.

    Attributes:
        first_s: To the first text of each answer; ``whole_s`` to its end.
        chunks: Of text, in answers that were counted or not.
        busy_s: Seconds that the target was being asked.
        failed: Requests without a whole answer; ``why`` is the last reason.
    """

    first_s: list[float] = []
    whole_s: list[float] = []
    chunks: int = 0
    busy_s: float = 0.0
    failed: int = 0
    why: str = ""


class Result(msgspec.Struct):
    """What came of an order, by target."""

    cpu: float
    seen: dict[str, Seen]


class StaleError(ConnectionError):
    """A connection was closed after the answer before; llama-server does so after every stream (b11549)."""


class Connection(asyncio.Protocol):
    """One connection; one request at a time."""

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
        """It is open."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  for the types
        self._transport = transport

    def connection_lost(self, _exc: Exception | None) -> None:
        """It has been closed; an answer that was under way is none."""
        self._transport = None
        if self._done is not None and not self._done.done():
            kind = ConnectionError if self._head or self._tail or self._body_left is not None else StaleError
            self._done.set_exception(kind("the connection was closed before the end of an answer"))

    @property
    def open(self) -> bool:
        """Whether it can be used again."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> float:
        """Send a request; the time at which its answer had come."""
        assert self._transport is not None  # noqa: S101  for the types
        self._done = asyncio.get_running_loop().create_future()
        self._head, self._body_left, self._tail, self.first_at, self.chunks = b"", None, b"", None, 0
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Note what has come."""
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


class Asker:
    """One who asks one target again and again, on one connection as long as it lasts."""

    def __init__(self, target: Target, seen: Seen, key: str) -> None:
        parts = urlsplit(target.url)
        self._host, self._port = parts.hostname or "", parts.port or 80
        body = target.body.encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._seen = seen
        self._connection: Connection | None = None

    async def ask(self, *, counted: bool) -> None:
        """One request."""
        seen = self._seen
        try:
            async with asyncio.timeout(_LIMIT_S):
                connection, sent, ended = await self._asked()
        except (OSError, TimeoutError) as error:
            seen.failed += 1
            seen.why = str(error) or type(error).__name__
            self.close()
            await asyncio.sleep(0.05)
            return
        seen.chunks += connection.chunks
        if connection.first_at is None:
            seen.failed += 1
            seen.why = "an answer without text"
        elif counted:
            seen.first_s.append(connection.first_at - sent)
            seen.whole_s.append(ended - sent)

    async def _asked(self) -> tuple[Connection, float, float]:
        """A connection that has an answer, when it was asked for, and when it had come; connecting does not count."""
        loop = asyncio.get_running_loop()
        if self._connection is not None and self._connection.open:
            sent = loop.time()
            with contextlib.suppress(StaleError):
                return self._connection, sent, await self._connection.ask(self._request)
        _, self._connection = await loop.create_connection(Connection, self._host, self._port)
        sent = loop.time()
        return self._connection, sent, await self._connection.ask(self._request)

    def close(self) -> None:
        """End its connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


async def one(order: Order, seen: dict[str, Seen]) -> None:
    """All targets in turn, one request at a time."""
    askers = [Asker(target, seen[target.name], order.key) for target in order.targets]
    for number in range(-order.warm_up, order.rounds):
        # The other way round every second time: whoever comes after another finds warmer caches.
        for asker in askers if number % 2 else reversed(askers):
            await asker.ask(counted=number >= 0)
    for asker in askers:
        asker.close()


async def many(order: Order, seen: dict[str, Seen]) -> None:
    """Each target in turn with all streams, several times over."""
    loop = asyncio.get_running_loop()
    for number in range(order.rounds):
        for target in order.targets if number % 2 else reversed(order.targets):
            begun = loop.time()
            await asyncio.gather(
                *(
                    _keep_asking(
                        order,
                        Asker(target, seen[target.name], order.key),
                        begun,
                        begun + order.ramp_s * n / order.streams,
                    )
                    for n in range(order.streams)
                )
            )
            seen[target.name].busy_s += loop.time() - begun


async def _keep_asking(order: Order, asker: Asker, begun: float, start: float) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(start - loop.time())
    while loop.time() < begun + order.ramp_s + order.seconds:
        # Only those that meet all the others count.
        await asker.ask(counted=loop.time() >= begun + order.ramp_s)
    asker.close()


async def main() -> None:
    """Carry out one order."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    seen = {target.name: Seen() for target in order.targets}
    cpu, wall = time.process_time(), time.perf_counter()
    await (one if order.kind == "one" else many)(order, seen)
    share = (time.process_time() - cpu) / (time.perf_counter() - wall)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.buffer.write(msgspec.json.encode(Result(share, seen)))


if __name__ == "__main__":
    asyncio.run(main())
