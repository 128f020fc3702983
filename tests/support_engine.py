"""Servers of raw bytes, for responses that no library would send, and helpers of the tests of engines."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil

from promptai.engine.client import Arrival, EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import EngineBinary

Script = Callable[..., Path]
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Use = Callable[[EngineClient], Awaitable[object]]

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
#: A llama-server that is always healthy and ignores SIGTERM.
STUBBORN = """\
import http.server, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class RawServer:
    """A listening server; ``requests`` holds every request, headers and body."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[bytes] = []


@contextlib.asynccontextmanager
async def raw_server(*answers: bytes | Answer) -> AsyncIterator[RawServer]:
    """
    Listen on loopback; each request gets the next response, and the last response repeats.

    Args:
        answers: Bytes that are written before the connection is closed, or a
            function that handles the connection after a request.
    """
    number = 0
    handlers: set[asyncio.Task[object] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        handlers.add(asyncio.current_task())
        answer = answers[min(number, len(answers) - 1)]
        number += 1
        # A client may disconnect early; the test checks its side.
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            server.requests.append(await _request(reader))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    server = RawServer(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
    try:
        yield server
    finally:
        listener.close()
        for handler in filter(None, handlers):
            with contextlib.suppress(asyncio.CancelledError):
                await handler


async def _request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return head + await reader.readexactly(int(value))
    return head


def chunked(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def content(text: str) -> bytes:
    """An event with one piece of text."""
    return b'data: {"choices": [{"index": 0, "delta": {"content": "%b"}}]}\n\n' % text.encode()


def answer(status: str, body: bytes, kind: str = "application/json") -> bytes:
    """A complete response with a Content-Length."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def repeating(begin: bytes, again: bytes) -> Answer:
    """A response that sends ``again`` a hundred times a second, without end."""

    async def play(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        while True:
            writer.write(again)
            await writer.drain()
            await asyncio.sleep(0.01)

    return play


def silent_after(data: bytes) -> Answer:
    """A response that sends ``data`` and then nothing until the client disconnects."""

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.read()

    return play


#: The beginning and the end of a complete answer.
HELLO = STREAM_HEAD + chunked(content("hello"))
DONE = b"data: [DONE]\n\n"
END = chunked(DONE) + b"0\r\n\r\n"


async def chat(client: EngineClient, body: dict[str, object] | None = None) -> list[Arrival]:
    """All arrivals of one streamed chat."""
    return [arrival async for arrival in client.stream_chat(dict(CHAT) | (body or {}))]


def against(*answers: bytes | Answer, use: Use = chat, silence_s: float = 0.2) -> object:
    """The result of ``use`` with a client of a server that sends these responses."""

    async def play() -> object:
        async with raw_server(*answers) as server, EngineClient(server.url, silence_s=silence_s) as client:
            return await use(client)

    return asyncio.run(play())


def engine_of(command: Path | tuple[str, ...] | EngineBinary, model: Path, *, port: int | None = None) -> RunningEngine:
    """An engine for a model's file, not started yet."""
    if isinstance(command, Path):
        command = (str(command),)
    binary = EngineBinary("settings", command, None, None) if isinstance(command, tuple) else command
    flags = EngineFlags(model=str(model), port=port or free_port(), threads=1, context=256)
    return RunningEngine(binary, flags, log=model.with_suffix(".log"))


async def start_and_stop(engine: RunningEngine) -> None:
    """Start an engine and stop it."""
    async with engine:
        pass


def alive(pid: int | None) -> bool:
    """Whether a process exists and is not a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


async def until(ready: Callable[[], Awaitable[bool]]) -> None:
    """Poll until a condition holds, for at most 20 s."""
    async with asyncio.timeout(20):
        while not await ready():  # noqa: ASYNC110  no event announces it
            await asyncio.sleep(0.005)


def text_of(arrivals: list[Arrival]) -> str:
    """The text of the answer."""
    return "".join(arrival.chunk.content for arrival in arrivals)
