"""A whole gateway in this process, in front of simulated engines: on virtual time, or in a thread in real time."""

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self, TypeVar

import aiohttp
import msgspec

from promptai.engine.simulation import SimulationConfig
from promptai.engine.upstream import Upstream
from promptai.gateway.admission import AdmissionRules
from promptai.gateway.app import Gateway, GatewayLimits
from promptai.gateway.auth import Guard
from promptai.gateway.server import GatewayServer
from promptai.gateway.streaming import Heartbeat
from promptai.router.schedule.dispatcher import Dispatcher
from support_clock import run_virtually
from support_cold import Cold
from support_gateway import Answer
from support_serve import World

T = TypeVar("T")

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TALK = [{"role": "user", "content": "Is cell 12 up?"}]
#: 100 prompt tokens a second, then ten tokens a second.
SLOW = SimulationConfig(prefill_tps=100.0, decode_tps=10.0, model="yi")
#: So fast that no request waits.
FAST = msgspec.structs.replace(SLOW, prefill_tps=1e6, decode_tps=1e5, slots=4)


class Line(NamedTuple):
    """
    One event of a stream.

    Attributes:
        t: Time of arrival.
        kind: ``comment``, the name of the event, or empty for a plain event.
    """

    t: float
    kind: str
    data: str

    @property
    def value(self) -> dict[str, Any]:
        """The data as JSON."""
        found: dict[str, Any] = msgspec.json.decode(self.data)
        return found


class Streamed(NamedTuple):
    """A stream, read to its end."""

    status: int
    headers: dict[str, str]
    lines: list[Line]

    def of(self, kind: str) -> list[Line]:
        """The events of one kind."""
        return [line for line in self.lines if line.kind == kind]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The chunks of the answer."""
        return [line.value for line in self.of("") if line.data != "[DONE]"]

    @property
    def text(self) -> str:
        """The text of the answer."""
        choices = [choice for chunk in self.chunks for choice in chunk.get("choices", ())]
        return "".join((choice.get("delta") or {}).get("content") or choice.get("text") or "" for choice in choices)

    @property
    def whole(self) -> bool:
        """Whether the stream ended with ``[DONE]``."""
        return bool(self.lines) and self.lines[-1].data == "[DONE]"


class Door:
    """A listening gateway, and a client for it; ``troubles`` are unhandled errors on the loop."""

    def __init__(self, gateway: Gateway, server: GatewayServer, client: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.port = server.port
        self.url = server.url
        self.client = client
        self.troubles: list[dict[str, Any]] = []

    async def ask(self, path: str, method: str = "GET", **fields: Any) -> Answer:
        """Send one well-formed request."""
        async with self.client.request(method, f"{self.url}{path}", **fields) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, headers, await response.read())

    async def get(self, path: str) -> Any:
        """The JSON of a response, which must be 200."""
        answer = await self.ask(path)
        assert answer.status == 200, answer.body
        return msgspec.json.decode(answer.body)

    async def chat(self, path: str = CHAT, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Answer:
        """Send a request and read the whole response."""
        return await self.ask(path, "POST", json=asking(path, fields), headers=headers)

    async def stream(self, path: str = CHAT, *, headers: Mapping[str, str] | None = None, **fields: Any) -> Streamed:
        """Send a request and read its stream, with the time of each line."""
        loop, lines = asyncio.get_running_loop(), list[Line]()
        body = asking(path, {"stream": True, **fields})
        async with self.client.post(f"{self.url}{path}", json=body, headers=headers) as response:
            found = {name.lower(): value for name, value in response.headers.items()}
            if not found["content-type"].startswith("text/event-stream"):
                return Streamed(response.status, found, [Line(loop.time(), "", await response.text())])
            kind = ""
            async for raw in response.content:
                line = raw.decode().rstrip("\n")
                if line.startswith(":"):
                    lines.append(Line(loop.time(), "comment", line))
                elif line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    lines.append(Line(loop.time(), kind, line.removeprefix("data: ")))
                elif not line:
                    kind = ""
            return Streamed(response.status, found, lines)

    async def raw(self, *parts: bytes, pause_s: float = 0.0, finish: bool = False, limit: int = 1_000_000) -> bytes:
        """Send bytes; return all that the gateway sends until it closes or is silent for a second."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        found = b""
        try:
            for part in parts:
                writer.write(part)
                await asyncio.sleep(pause_s)
            if finish:
                writer.write_eof()
            with contextlib.suppress(TimeoutError, ConnectionError):
                while True:
                    async with asyncio.timeout(1.0):
                        data = await reader.read(65536)
                    if not data:
                        break
                    found += data
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        return found


def asking(path: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a request: ``fields``, and defaults for what the path needs."""
    needed: dict[str, dict[str, Any]] = {
        CHAT: {"messages": TALK, "max_tokens": 4},
        TEXT: {"prompt": "Cell 12", "max_tokens": 4},
        EMBED: {"input": "Cell 12"},
    }
    return {"model": "yi", **needed[path], **fields}


@contextlib.asynccontextmanager
async def door(
    dispatcher: Dispatcher,
    upstream: Upstream,
    *,
    guard: Guard | None = None,
    rules: AdmissionRules | None = None,
    heartbeat: Heartbeat | None = None,
    limits: GatewayLimits | None = None,
) -> AsyncGenerator[Door, None]:
    """Run a gateway on loopback, with a client for it."""
    loop = asyncio.get_running_loop()
    gateway = Gateway(
        dispatcher, upstream, guard or Guard(None, open=True), rules=rules, heartbeat=heartbeat, limits=limits
    )
    connector = aiohttp.TCPConnector(force_close=True)
    no_limit = aiohttp.ClientTimeout(total=None)
    async with GatewayServer(gateway) as server, aiohttp.ClientSession(connector=connector, timeout=no_limit) as client:
        found = Door(gateway, server, client)
        loop.set_exception_handler(lambda _loop, context: found.troubles.append(context))
        try:
            yield found
        finally:
            loop.set_exception_handler(None)


def visit(world: Callable[[], World | Cold], use: Callable[[Door], Awaitable[T]], **options: Any) -> T:
    """Run ``use`` against a world's gateway on virtual time; an unhandled error on the loop fails the test."""

    async def play() -> T:
        made = world()
        async with made.running(), door(made.dispatcher, made.upstream, **options) as opened:
            found = await use(opened)
            await asyncio.sleep(0)
            gc.collect(1)  # a task reports an exception that was never retrieved when it is freed
        assert opened.troubles == []
        return found

    return run_virtually(play())


def one(config: SimulationConfig = SLOW, **settings: Any) -> Callable[[], World]:
    """Make worlds of one engine."""
    return lambda: World({"a": config}, **settings)


class Threaded:
    """
    A gateway in a thread of its own, in real time, for clients that block.

    Attributes:
        url: The gateway's URL, inside the block.
    """

    def __init__(self, run: Callable[["Threaded"], Awaitable[None]]) -> None:
        self.url = ""
        self.failed: list[BaseException] = []
        self._run = run
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._play, daemon=True)

    def __enter__(self) -> Self:
        """Start the gateway and wait until it listens."""
        self._thread.start()
        assert self._ready.wait(30)
        if self.failed:
            raise self.failed[0]
        return self

    def __exit__(self, *_exc: object) -> None:
        """Stop the gateway; raises if it failed."""
        if self._loop is not None and self._over is not None:
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)
        assert self.failed == []

    async def until_over(self, url: str) -> None:
        """Publish the URL and wait for the end of the block."""
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self.url = url
        self._ready.set()
        await self._over.wait()

    def _play(self) -> None:
        async def main() -> None:
            await self._run(self)

        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001  raised in the thread of the test
            self.failed.append(error)
        finally:
            self._ready.set()


@contextlib.contextmanager
def threaded(world: Callable[[], World], **options: Any) -> Iterator[Threaded]:
    """Run a world's gateway in a thread."""

    async def run(thread: Threaded) -> None:
        made = world()
        async with made.running(), door(made.dispatcher, made.upstream, **options) as opened:
            await thread.until_over(opened.url)
        assert opened.troubles == []

    with Threaded(run) as thread:
        yield thread
