"""An engine without a model, for ``gateway_cost.py``: llama-server's chat API with canned answers.

The overhead of a gateway shows only in front of an engine that costs nothing. This engine answers with the same bytes
as llama-server (b11549), ``max_tokens`` chunks in all. By default it writes the whole answer at once, to do as little
as possible. A prompt with ``[[pace 20]]`` gets that many chunks a second, one write per chunk, as from a real engine;
``[[pace 0]]`` writes chunk by chunk as fast as possible.

Run as a process: it prints its address, and ends when stdin ends.
"""

import asyncio
import re
import sys

import msgspec

MODEL = "nothing"
SLOTS = 256
_CONTEXT = 4096
_PACE = re.compile(rb"\[\[pace (\d+)\]\]")
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\n"
    b"Keep-Alive: timeout=5, max=100\r\nTransfer-Encoding: chunked\r\n\r\n"
)
_LAST = b"0\r\n\r\n"
_BURST = 16


class Body(msgspec.Struct):
    """The fields of a request that matter here."""

    max_tokens: int = 1
    stream: bool = False
    return_progress: bool = False
    stream_options: dict[str, bool] | None = None


class Engine(asyncio.Protocol):
    """One client connection."""

    def __init__(self) -> None:
        self._data = b""
        self._transport: asyncio.Transport | None = None
        self._writing: asyncio.Task[None] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport for writing."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101  for the types
        self._transport = transport

    def connection_lost(self, _exc: Exception | None) -> None:
        """Stop writing."""
        if self._writing is not None:
            self._writing.cancel()

    def pause_writing(self) -> None:
        """Wait until the client catches up."""
        self._may_write.clear()

    def resume_writing(self) -> None:
        """Continue writing."""
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is complete."""
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        size = int(length[1]) if length else 0
        if not found or len(rest) < size:
            return
        self._data = rest[size:]
        method, path, _ = head.split(b" ", 2)
        self._answer(method, path, rest[:size])

    def _answer(self, method: bytes, path: bytes, body: bytes) -> None:
        if method == b"GET":
            self._write(_whole(_GETS.get(path)))
            return
        request = msgspec.json.decode(body, type=Body)
        if not request.stream:
            self._write(_whole(_message(request.max_tokens)))
            return
        pace = _PACE.search(body)
        begin, word, end = _events(request, int(pace[1]) if pace else 0)
        if pace is None:
            events = [*begin, *([word] * request.max_tokens), *end]
            self._write(_STREAM_HEAD + b"".join(map(_chunked, events)) + _LAST)
        else:
            self._writing = asyncio.create_task(self._stream(begin, [word] * request.max_tokens, end, int(pace[1])))

    async def _stream(self, begin: list[bytes], words: list[bytes], end: list[bytes], per_s: int) -> None:
        """Write one word at a time, at absolute times to avoid drift."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        self._write(_STREAM_HEAD)
        for event in begin:
            self._write(_chunked(event))
        for number, word in enumerate(words):
            if per_s:
                await asyncio.sleep(begun + number / per_s - loop.time())
            elif number % _BURST == 0:
                await asyncio.sleep(0)
            await self._may_write.wait()
            self._write(_chunked(word))
        for event in end:
            self._write(_chunked(event))
        self._write(_LAST)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _whole(value: object) -> bytes:
    body = msgspec.json.encode(value if value is not None else {"error": {"code": 404, "message": "File Not Found"}})
    status = b"200 OK" if value is not None else b"404 Not Found"
    kind = b"application/json; charset=utf-8"
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (status, kind, len(body), body)


def _events(request: Body, per_s: int) -> tuple[list[bytes], bytes, list[bytes]]:
    """Events as llama-server sends them: before the words, for each word, and after them."""
    role = _chunk({"role": "assistant", "content": None})
    begin = [_event({**role, "prompt_progress": _PROGRESS})] if request.return_progress else []
    last = _chunk({}, "length")
    if (request.stream_options or {}).get("include_usage"):
        end = [_event(last), _event({**last, "choices": [], **_usage(request.max_tokens, per_s)})]
    else:
        end = [_event({**last, "timings": _timings(request.max_tokens, per_s)})]
    return [*begin, _event(role)], _event(_chunk({"content": " word"})), [*end, b"data: [DONE]\n\n"]


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _chunk(delta: dict[str, object], reason: str | None = None) -> dict[str, object]:
    return {
        "choices": [{"finish_reason": reason, "index": 0, "delta": delta}],
        "created": 1764000000,
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "model": MODEL,
        "system_fingerprint": "b11549-0123456",
        "object": "chat.completion.chunk",
    }


def _timings(tokens: int, per_s: int = 0) -> dict[str, float]:
    step_ms = 1000 / (per_s or 10_000)  # the real pace: routers use these timings
    return {
        "cache_n": 0,
        "prompt_n": 12,
        "prompt_ms": 0.1,
        "prompt_per_token_ms": 0.01,
        "prompt_per_second": 120000.0,
        "predicted_n": tokens,
        "predicted_ms": step_ms * (tokens - 1),
        "predicted_per_token_ms": step_ms,
        "predicted_per_second": 1000 / step_ms,
    }


def _usage(tokens: int, per_s: int = 0) -> dict[str, object]:
    usage = {"completion_tokens": tokens, "prompt_tokens": 12, "total_tokens": 12 + tokens}
    return {"usage": usage, "timings": _timings(tokens, per_s)}


def _message(tokens: int) -> dict[str, object]:
    message = {"role": "assistant", "content": " word" * tokens}
    return {
        **_chunk({}),
        "choices": [{"finish_reason": "length", "index": 0, "message": message}],
        "object": "chat.completion",
        **_usage(tokens),
    }


_PROGRESS = {"total": 12, "cache": 0, "processed": 12, "time_ms": 0}
_GETS: dict[bytes, object] = {
    b"/health": {"status": "ok"},
    b"/props": {
        "total_slots": SLOTS,
        "default_generation_settings": {"n_ctx": _CONTEXT},
        "model_alias": MODEL,
        "build_info": "b11549-0123456",
    },
    b"/v1/models": {"object": "list", "data": [{"id": MODEL, "object": "model"}]},
}


async def main() -> None:
    """Listen until stdin ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Engine, "127.0.0.1", 0, backlog=512)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
