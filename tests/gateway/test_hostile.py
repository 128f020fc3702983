"""Hostile bytes on a socket get the error envelope or a closed connection, and the gateway survives."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import psutil
import pytest

from promptai.gateway.app import GatewayLimits
from promptai.gateway.auth import Guard
from promptai.gateway.keys import KeyStore
from support_hostile import SECRET, WORD, answers, error_of, silent, sound
from support_site import CHAT, FAST, Door, one, visit

BODY = b'{"messages": [{"role": "user", "content": "' + WORD.encode() + b'"}], "max_tokens": 2}'
KEY = b"Authorization: Bearer " + SECRET.encode() + b"\r\n"


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    silent(caplog)


def post(*lines: bytes, body: bytes = BODY, path: str = CHAT, version: bytes = b"1.1") -> bytes:
    """Return a request as bytes; ``lines`` replace its Content-Length."""
    length = [b"Content-Length: %d" % len(body)] if not lines else []
    head = [b"POST %b HTTP/%b" % (path.encode(), version), b"Host: localhost", *length, *lines]
    return b"\r\n".join(head) + b"\r\n" + KEY + b"\r\n" + body


def get(path: bytes, method: bytes = b"GET") -> bytes:
    return method + b" " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + KEY + b"\r\n"


def run_attack(use: Callable[[Door], Awaitable[bytes]], **options: object) -> bytes:
    """Return the bytes that a hostile client receives; checks that the gateway works and has no open request."""

    async def play(at: Door) -> bytes:
        received = await use(at)
        await asyncio.sleep(1)
        assert (await at.ask("/healthz")).status == 200
        assert at.gateway.open_requests == 0
        return received

    return visit(one(FAST), play, **options)


def statuses_of(*parts: bytes, pause_s: float = 0.0, finish: bool = False) -> list[int]:
    """Return the statuses of the responses, each checked for the envelope."""
    received = run_attack(lambda at: at.raw(*parts, pause_s=pause_s, finish=finish))
    return [sound(answer) for answer in answers(received)]


@pytest.mark.parametrize(
    ("lines", "statuses"),
    [
        ([b"Content-Length: 5"], [400]),
        ([b"Content-Length: -1"], [400]),
        ([b"Content-Length: +%d" % len(BODY)], [400]),
        ([b"Content-Length: 1e3"], [400]),
        ([b"Content-Length: 99999999999999999999999"], [400]),
        ([b"Content-Length: 104857600"], [413]),
        ([b"Content-Length: 4", b"Content-Length: %d" % len(BODY)], [400]),
        ([b"Content-Length: %d" % len(BODY), b"Transfer-Encoding: chunked"], [400]),
        ([b"Transfer-Encoding: chunked"], [400]),
        ([b"Transfer-Encoding: gzip, chunked"], [400]),
        ([b"Transfer-Encoding: wonders"], [400]),
        ([b"Transfer-Encoding : chunked"], [400]),
        ([b"Content-Length: %d" % len(BODY), b"Content-Encoding: gzip"], [400]),
        ([b"Content-Length: %d" % len(BODY), b"Content-Encoding: wonders"], [200]),
        ([b"Content-Length: %d" % len(BODY), b"Content-Type: text/plain; charset=utf-7"], [200]),
        ([b"Content-Length: %d" % len(BODY), b"Expect: 100-continue"], [200]),
        ([b"Content-Length: %d" % len(BODY), b"Upgrade: websocket", b"Connection: Upgrade"], [200]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refuses_false_headers_about_the_body(lines: list[bytes], statuses: list[int]) -> None:
    assert statuses_of(post(*lines)) == statuses


def test_a_body_shorter_than_its_content_length_gets_no_response() -> None:
    assert statuses_of(post(b"Content-Length: 1000"), finish=True) == []


@pytest.mark.parametrize(
    ("chunks", "status"),
    [
        (b"1\r\n \r\n" * 20_000 + b"0\r\n\r\n", 400),
        (b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n", 200),
        (b"ffffffffffffffffffff\r\n", 400),
        (b"1;" + b"a" * 100_000 + b"\r\n \r\n0\r\n\r\n", 400),
        (b"1\r\n \r\n0\r\n" + b"X: a\r\n" * 5000 + b"\r\n", 431),
        (b"-1\r\n", 400),
    ],
    ids=["flood", "good", "huge", "extension", "trailers", "negative"],
)
def test_limits_chunked_bodies(chunks: bytes, status: int) -> None:
    assert statuses_of(post(b"Transfer-Encoding: chunked", body=chunks))[:1] == [status]


@pytest.mark.parametrize("announced", [True, False])
def test_refuses_a_hundred_megabytes_early_without_storing_them(announced: bool) -> None:  # noqa: FBT001
    piece, most = b" " * 1_000_000, 0
    rss = psutil.Process().memory_info

    async def use(at: Door) -> bytes:
        nonlocal most
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        how = b"Content-Length: 100000000" if announced else b"Transfer-Encoding: chunked"
        writer.write(post(how, body=b""))
        before = rss().rss
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(piece if announced else b"%x\r\n" % len(piece) + piece + b"\r\n")
                await writer.drain()
                most = max(most, rss().rss - before)
        received = await reader.readuntil(b"}")
        writer.close()
        return received + await reader.read()

    received = run_attack(use, limits=GatewayLimits(body_bytes=1_000_000))

    assert error_of(answers(received)[0])["code"] == "request_too_large"
    assert b"Connection: close" in received
    assert most < 30_000_000


def test_a_slow_body_is_cut_off_after_thirty_seconds() -> None:
    begun = post(b"Content-Length: 100", body=b"")

    assert statuses_of(begun, *[b" "] * 35, pause_s=1.0) == [408]


def test_slow_headers_are_cut_off_after_75_seconds() -> None:
    async def use(at: Door) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n")
        begun = asyncio.get_running_loop().time()
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b"X: a\r\n")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        await reader.read(1)
        assert asyncio.get_running_loop().time() - begun <= 80
        writer.close()
        return b""

    run_attack(use)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (get(b"/healthz").replace(b"\r\n\r\n", b"\r\n" + b"X-A: b\r\n" * 300 + b"\r\n"), 431),
        (get(b"/healthz").replace(b"\r\n\r\n", b"\r\nX-A: " + b"b" * 100_000 + b"\r\n\r\n"), 431),
        (get(b"/healthz").replace(b"\r\n\r\n", b"\r\n" + b"b" * 100_000 + b": a\r\n\r\n"), 431),
        (get(b"/" + b"a" * 100_000), 431),
        (get(b"/v1/models/" + b"a" * 8000), 404),
        (get(b"/v1/models?" + b"a=b&" * 1900), 200),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200, 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /healthz HTTP/9.9\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /healthz\r\n\r\n", 200),
        (b"\r\n" * 3000 + get(b"/healthz"), 200),
        (get(b"/healthz").replace(b"Connection", b"Con\x00nection"), 400),
        (get(b"/healthz").replace(b": close", b": close\r\n folded: yes"), 400),
        (get(b"/healthz").replace(b"Host: localhost", b"Host: evil.example"), 403),
        (get(b"/healthz").replace(b"Host: localhost", b"Host: localhost@evil"), 403),
        (get(b"/healthz").replace(b"\r\n", b"\n"), 400),
    ],
    ids=lambda value: str(value[:40] if isinstance(value, bytes) else value),
)
def test_refuses_malformed_request_heads(data: bytes, status: int) -> None:
    assert statuses_of(data)[:1] == [status]


@pytest.mark.parametrize(
    "path",
    [
        b"/v1/../api/queue",
        b"/v1/models/../../api/queue",
        b"/healthz/../api/queue",
        b"/healthz/%2e%2e/api/queue",
        b"/healthz/..%2fapi%2fqueue",
        b"/%61pi/queue",
        b"/api%2fqueue",
        b"//api/queue",
        b"/api//queue",
        b"/api/queue/",
        b"/api/queue/.",
        b"/api/queue;a=b",
        b"/api/queue%00",
        b"/api/queue%20",
        b"/API/QUEUE",
        b"/api/queue?scope=infer",
        b"/api/queue#x",
        b"\\api\\queue",
        b"api/queue",
        b"*",
        b"http://localhost/api/queue",
        b"http://evil.example/api/queue",
        b"//evil.example/api/queue",
        b"/v1/models/%2e%2e%2f%2e%2e%2fapi%2fqueue",
        b"/v1/models/%ff%fe",
        b"/v1/models/%",
        b"/v1/models/%zz",
        b"/v1/models/%0d%0aSet-Cookie:%20a=b",
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [b"GET", b"POST", b"HEAD"])
def test_no_path_bypasses_the_scope_of_a_key(path: bytes, method: bytes, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, secret = store.add("app", scopes=("infer",))
    data = get(path, method).replace(SECRET.encode(), secret.encode())

    received = run_attack(lambda at: at.raw(data), guard=Guard(store, open=False))

    assert b"bound" not in received
    assert b"set-cookie" not in received.lower().partition(b"\r\n\r\n")[0]
    first = answers(received)[0]
    assert first.status in {400, 403, 404, 405}
    if method != b"HEAD":
        error_of(first)


@pytest.mark.parametrize("method", [b"PUT", b"DELETE", b"PATCH", b"TRACE", b"OPTIONS", b"BREW", b"get", b"PROPFIND"])
@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/healthz", b"/nowhere"])
def test_refuses_other_methods(method: bytes, path: bytes) -> None:
    found = statuses_of(get(path, method))

    assert len(found) == 1
    assert found[0] in ({404, 400} if path == b"/nowhere" else {400, 405})


def test_refuses_connect() -> None:
    assert statuses_of(b"CONNECT example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n")[:1] in ([400], [404], [405])


def test_pipelined_requests_are_answered_in_order() -> None:
    names = [b"one", b"two", b"three"]
    data = b"".join(post(b"X-Request-Id: " + name, b"Content-Length: %d" % len(BODY)) for name in names)

    received = run_attack(lambda at: at.raw(data))

    found = answers(received)
    assert [answer.status for answer in found] == [200] * 3
    assert [answer.headers["x-promptai-request-id"].encode() for answer in found] == names


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_an_answer_and_a_closed_connection(stream: bool) -> None:  # noqa: FBT001
    body = BODY.replace(b"}]", b'}], "stream": true') if stream else BODY

    received = run_attack(lambda at: at.raw(post(body=body, version=b"1.0")))

    found = answers(received)[0]
    assert (found.status, "transfer-encoding" in found.headers) == (200, False)
    assert (b"data: [DONE]" in found.body) is stream


def test_disconnects_at_any_byte_leave_nothing_behind() -> None:
    data = post(body=BODY.replace(b"}]", b'}], "stream": true'))

    async def use(at: Door) -> bytes:
        for end in range(0, len(data) + 1, 7):
            _, writer = await asyncio.open_connection("127.0.0.1", at.port)
            writer.write(data[:end])
            if end % 2:
                await asyncio.sleep(0)
                writer.transport.abort()
            else:
                writer.close()
        return b""

    run_attack(use)


def test_a_half_closed_connection_counts_as_a_disconnect() -> None:
    """A client that waits for a response keeps both sides open."""
    assert statuses_of(post(), finish=True) in ([], [200])


def test_closes_hundreds_of_silent_connections() -> None:
    async def use(at: Door) -> bytes:
        pairs = [await asyncio.open_connection("127.0.0.1", at.port) for _ in range(300)]
        assert (await at.ask("/healthz")).status == 200
        await asyncio.sleep(90)
        ends = [await reader.read() for reader, _ in pairs]
        for _, writer in pairs:
            writer.close()
        return b"".join(ends)

    assert run_attack(use) == b""
