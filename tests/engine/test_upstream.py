"""``HttpUpstream`` over real sockets, against hostile and well-behaved servers."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.simulated import Fault, SimulatedEngine
from promptai.engine.simulation import SimulationConfig
from promptai.engine.simulator import Simulator
from promptai.engine.upstream import Piece, Upstream
from promptai.errors import EngineDiedError, EngineError, EngineProtocolError, EngineRefusedError
from promptai.wire.sse import MAX_EVENT_BYTES, SseEvent
from support_engine import (
    DONE,
    END,
    HELLO,
    STREAM_HEAD,
    Answer,
    answer,
    chunked,
    content,
    raw_server,
    repeating,
    silent_after,
    until,
)
from support_simulated_upstream import SimulatedUpstream
from support_simulator import CHAT, NATIVE, TALK, TEXT, chunks, ends, listen_into, open_stream, text

FAST = SimulationConfig(prefill_tps=1e6, decode_tps=1e5)
#: Ten milliseconds a token, one millisecond a prompt token.
SLOW = SimulationConfig(prefill_tps=1e3, decode_tps=100.0, batch=8)
REFUSAL = b'{"error": {"code": 503, "message": "Loading model", "type": "unavailable_error", "src": "x"}}'

Use = Callable[[HttpUpstream, str], Awaitable[Any]]


async def stream(upstream: HttpUpstream, url: str, silence_s: float = 0.2) -> list[Piece]:
    """Return all pieces of one stream."""
    return [piece async for piece in upstream.stream(url, CHAT, b"{}", silence_s=lambda: silence_s)]


def against(*answers: bytes | Answer, use: Use = stream) -> Any:
    """Run ``use`` against a server that sends these responses."""

    async def play() -> Any:
        async with raw_server(*answers) as server, HttpUpstream() as upstream:
            return await use(upstream, server.url)

    return asyncio.run(play())


def with_engine(use: Use, config: SimulationConfig = FAST, fault: Fault | None = None) -> Any:
    """Run ``use`` against a simulated engine behind a socket."""

    async def play() -> Any:
        async with asyncio.timeout(20), SimulatedEngine(config, fault=fault) as engine, HttpUpstream() as upstream:
            return await use(upstream, engine.base_url)

    return asyncio.run(play())


def events(pieces: list[Piece]) -> list[SseEvent]:
    """Return all events, including comments."""
    return [event for piece in pieces for event in piece.events]


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        pytest.param(silent_after(b""), EngineDiedError, "silent for 0.2 s before it began", id="slow-headers"),
        pytest.param(silent_after(STREAM_HEAD), EngineDiedError, "0.2 s in the middle", id="headers-only"),
        pytest.param(silent_after(HELLO), EngineDiedError, "silent for 0.2 s in the middle", id="silence"),
        pytest.param(b"", EngineDiedError, "no connection", id="nothing"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", EngineDiedError, "no connection", id="not-http"),
        pytest.param(HELLO, EngineDiedError, "broke off in the middle of an answer", id="cut"),
        pytest.param(HELLO + b"0\r\n\r\n", EngineDiedError, "broke off in the middle of an answer", id="no-done"),
        pytest.param(HELLO + b"zz\r\n", EngineDiedError, "Invalid character", id="broken-chunking"),
        pytest.param(STREAM_HEAD + chunked(b"data: \xff\n\n"), EngineProtocolError, "broken event", id="not-utf-8"),
        pytest.param(
            STREAM_HEAD + chunked(b"data: " + bytes(MAX_EVENT_BYTES)), EngineProtocolError, "more than", id="endless"
        ),
        pytest.param(answer("200 OK", b'{"choices": []}'), EngineProtocolError, "stream was requested", id="no-stream"),
        pytest.param(answer("503 Busy", REFUSAL), EngineRefusedError, "HTTP 503: Loading model", id="refusal"),
        pytest.param(answer("200 OK", REFUSAL), EngineRefusedError, "HTTP 200: Loading model", id="disguised"),
        pytest.param(answer("502 Bad", b"<html>"), EngineRefusedError, "HTTP 502: <html>", id="no-envelope"),
    ],
)
def test_a_failing_stream_raises_the_matching_error(reply: bytes | Answer, kind: type[EngineError], words: str) -> None:
    """No exception of aiohttp gets through."""
    with pytest.raises(kind, match=words):
        against(reply)


def test_passes_on_the_body_of_a_refusal() -> None:
    """With unknown fields; the beginning of an endless one."""
    with pytest.raises(EngineRefusedError) as caught:
        against(answer("503 Busy", REFUSAL))
    assert (caught.value.status, caught.value.kind, caught.value.body) == (503, "unavailable_error", REFUSAL)

    with pytest.raises(EngineRefusedError) as caught:
        against(repeating(b"HTTP/1.1 500 Oops\r\n\r\n", b"x" * 32_768))
    assert caught.value.body == b"x" * 65_536


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(b"40", 40.0), (b"0", 0.0), (b"-1", None), (b"1e9", None), (b"9" * 400, None), (b"soon", None)],
)
def test_reads_retry_after_in_seconds(header: bytes, seconds: float | None) -> None:
    refusal = answer("503 Busy", REFUSAL).replace(b"\r\n\r\n", b"\r\nRetry-After: " + header + b"\r\n\r\n", 1)

    with pytest.raises(EngineRefusedError) as caught:
        against(refusal)
    reply = against(refusal, use=lambda upstream, url: upstream.post(url, CHAT, b"{}", limit_s=5))

    assert caught.value.retry_after_s == reply.retry_after_s == seconds


@pytest.mark.parametrize(
    "reply",
    [repeating(b"HTTP/1.1 500 Oops\r\n\r\n", b"x"), silent_after(b"HTTP/1.1 500 Oops\r\n\r\n")],
    ids=["slowly", "without-saying-why"],
)
def test_reports_a_refusal_whose_body_does_not_end(reply: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its status is known."""
    monkeypatch.setattr("promptai.engine.connection._REASON_S", 0.1)

    with pytest.raises(EngineRefusedError, match="HTTP 500"):
        against(reply)


def test_names_an_unreachable_board_once_by_its_url() -> None:
    """The gateway replaces the URL for clients that must not see it."""

    async def play() -> str:
        async with HttpUpstream() as upstream:
            with pytest.raises(EngineDiedError) as caught:
                await upstream.get("http://127.0.0.1:1", "", limit_s=5)
            return caught.value.message

    assert asyncio.run(play()) == "no connection to http://127.0.0.1:1: Connection refused"


@pytest.mark.parametrize("way", ["stream", "post", "get"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://", "nonsense"])
def test_a_refused_connection_is_a_dead_engine(url: str, way: str) -> None:
    """An invalid URL, too."""

    async def play() -> None:
        async with HttpUpstream() as upstream:
            if way == "stream":
                await stream(upstream, url)
            elif way == "post":
                await upstream.post(url, CHAT, b"{}", limit_s=1.0)
            else:
                await upstream.get(url, "/health", limit_s=1.0)

    with pytest.raises(EngineDiedError, match=f"no connection to {url}"):
        asyncio.run(play())


@pytest.mark.parametrize(
    ("reply", "error", "words"),
    [
        (
            silent_after(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"),
            EngineDiedError,
            "not answer within 0.2 s",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", EngineDiedError, "broke off in the middle"),
        (answer("200 OK", b"x" * 1001), EngineProtocolError, "more than 1000 bytes"),
    ],
    ids=["silence", "cut", "huge"],
)
def test_a_failing_response_raises_the_matching_error(
    reply: bytes | Answer, error: type[EngineError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would keep the caller waiting, or fill the memory."""
    monkeypatch.setattr("promptai.engine.connection._MAX_BODY_BYTES", 1000)

    with pytest.raises(error, match=words):
        against(reply, use=lambda upstream, url: upstream.post(url, CHAT, b"{}", limit_s=0.2))


@pytest.mark.parametrize("way", ["stream", "post"])
def test_does_not_follow_redirects(way: str) -> None:
    """A compromised board could send prompts to any address."""

    async def play() -> list[bytes]:
        async with raw_server(HELLO + END) as other:
            moved = f"HTTP/1.1 307 Moved\r\nLocation: {other.url}{CHAT}\r\nContent-Length: 0\r\n\r\n".encode()
            async with raw_server(moved) as server, HttpUpstream() as upstream:
                if way == "stream":
                    with pytest.raises(EngineRefusedError, match="HTTP 307"):
                        await stream(upstream, server.url)
                else:
                    assert (await upstream.post(server.url, CHAT, b"{}", limit_s=1.0)).status == 307
            return other.requests

    assert asyncio.run(play()) == []


def test_yields_pieces_as_they_arrive_until_done() -> None:
    """Later bytes are ignored."""

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = content("grüße") + content("b") + DONE + b"data: late\n\n"
        writer.write(STREAM_HEAD)
        for byte in whole:
            writer.write(chunked(bytes([byte])))
        await writer.drain()
        await reader.read()

    pieces = against(slowly)

    assert text(pieces) == "grüßeb"
    assert events(pieces)[-1].data == "[DONE]"
    assert [piece.t for piece in pieces] == sorted(piece.t for piece in pieces)


def test_sends_a_key_only_to_its_own_engine() -> None:
    """And the body unchanged."""

    async def play() -> list[bytes]:
        async with raw_server(HELLO + END) as one, raw_server(HELLO + END) as two:
            async with HttpUpstream({one.url: "secret"}) as upstream:
                for server in (one, two):
                    async for _ in upstream.stream(server.url, CHAT, b'{"a":  1}', silence_s=lambda: 5.0):
                        pass
            return [*one.requests, *two.requests]

    with_key, without = asyncio.run(play())

    assert b"\r\nAuthorization: Bearer secret\r\n" in with_key
    assert b"\r\nAccept: text/event-stream\r\n" in with_key
    assert b"authorization" not in without.lower()
    assert with_key.endswith(b'\r\n\r\n{"a":  1}')


def test_use_outside_its_block_is_a_programming_error() -> None:
    with pytest.raises(RuntimeError, match="outside its async with block"):
        asyncio.run(HttpUpstream().get("http://127.0.0.1:1", "/", limit_s=1.0))


@pytest.mark.parametrize("pieces", [1, 12], ids=["prefill", "decode"])
@pytest.mark.timed
def test_closing_a_stream_frees_the_slot_at_once(pieces: int) -> None:
    """The engine notices the closed connection."""

    async def use(upstream: HttpUpstream, url: str) -> float:
        async def idle() -> bool:
            return b"true" not in (await upstream.get(url, "/slots", limit_s=5.0)).body

        words = [{"role": "user", "content": "x " * 1000}] if pieces == 1 else TALK
        reading = open_stream(upstream, url=url, return_progress=True, messages=words)
        async with contextlib.aclosing(reading):
            for _ in range(pieces):
                await anext(reading)
            assert not await idle()
        began = time.monotonic()
        await until(idle)
        return time.monotonic() - began

    assert with_engine(use, SLOW) < 1.0


def test_cancelling_before_the_headers_leaves_the_queue() -> None:
    async def use(upstream: HttpUpstream, url: str) -> bytes:
        async def waiting(count: int) -> bool:
            return b"deferred %d\n" % count in (await upstream.get(url, "/metrics", limit_s=5.0)).body

        tasks = [asyncio.create_task(listen_into([], open_stream(upstream, url=url))) for _ in range(2)]
        await until(lambda: waiting(1))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: waiting(0))
        return (await upstream.get(url, "/metrics", limit_s=5.0)).body

    assert b"deferred 0\n" in with_engine(use, SLOW)


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
@pytest.mark.parametrize(
    "fault",
    [
        None,
        Fault(kind="refuse"),
        Fault(kind="stall", after_tokens=2),
        Fault(kind="cut", after_tokens=2),
        Fault(kind="malformed", after_tokens=2),
        Fault(kind="error", after_tokens=2),
    ],
    ids=["well", "refuse", "stall", "cut", "malformed", "error"],
)
def test_http_and_in_process_upstreams_agree(path: str, fault: Fault | None) -> None:
    """The same events, and the same error where there is one."""

    async def use(upstream: Upstream, url: str) -> tuple[list[SseEvent], Any]:
        body = {"prompt": [1, 2, 3], "max_tokens": 5, "n_predict": 5, "return_progress": True}
        found: list[Piece] = []
        data = msgspec.json.encode({"stream": True, **body} | ({"messages": TALK} if path == CHAT else {}))
        try:
            await listen_into(found, upstream.stream(url, path, data, silence_s=lambda: 0.2, ends=ends(path)))
        except EngineError as error:
            return events(found), (type(error), getattr(error, "body", b""))
        return events(found), None

    async def in_process() -> tuple[list[SseEvent], Any]:
        async with SimulatedUpstream({"http://a": Simulator(FAST, fault=fault)}) as upstream:
            return await use(upstream, "http://a")

    over_http, in_this = with_engine(use, FAST, fault), asyncio.run(in_process())

    assert len(over_http[0]) == len(in_this[0])
    assert over_http[1] == in_this[1]
    for one, other in zip(over_http[0], in_this[0], strict=True):
        assert _timeless(one) == _timeless(other)


def _timeless(event: SseEvent) -> Any:
    try:
        body = msgspec.json.decode(event.data)
    except msgspec.DecodeError:
        return event.data
    timed = {name: sorted(body[name]) for name in ("timings", "prompt_progress") if name in body}
    return body | timed


def test_returns_responses_of_any_status() -> None:
    """With their content type."""

    async def use(upstream: HttpUpstream, url: str) -> list[Any]:
        return [
            await upstream.get(url, "/v1/nothing", limit_s=5.0),
            await upstream.post(url, CHAT, b"{nope", limit_s=5.0),
            await upstream.get(url, "/health", limit_s=5.0),
            await upstream.post(url, CHAT, msgspec.json.encode({"messages": TALK, "max_tokens": 2}), limit_s=5.0),
        ]

    missing, broken, healthy, answered = with_engine(use)

    assert (missing.status, msgspec.json.decode(missing.body)["error"]["type"]) == (404, "not_found_error")
    assert (broken.status, msgspec.json.decode(broken.body)["error"]["type"]) == (400, "invalid_request_error")
    assert (healthy.status, healthy.body, healthy.content_type) == (200, b'{"status":"ok"}', "application/json")
    assert len(msgspec.json.decode(answered.body)["choices"][0]["message"]["content"].split()) == 2


def test_concurrent_streams_are_complete() -> None:
    """Eight at a time."""

    async def use(upstream: HttpUpstream, url: str) -> list[str]:
        async def one(number: int) -> str:
            found: list[Piece] = []
            said = [{"role": "user", "content": f"mast {number % 4}"}]
            await listen_into(found, open_stream(upstream, url=url, messages=said, max_tokens=30))
            assert len(chunks(found)) == 32
            return text(found)

        return list(await asyncio.gather(*map(one, range(8))))

    found = with_engine(use, msgspec.structs.replace(FAST, slots=3))

    assert found[:4] == found[4:]
    assert len(set(found)) == 4
