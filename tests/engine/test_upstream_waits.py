"""How long ``HttpUpstream`` waits for a silent engine, and what ends a silence, over real sockets."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey

from promptai.engine.connection import _reason
from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.upstream import Piece
from promptai.errors import EngineDiedError
from support_engine import END, HELLO, STREAM_HEAD, Answer, chunked, raw_server, silent_after
from support_simulator import CHAT, text


async def heard(upstream: HttpUpstream, url: str) -> list[Piece]:
    """Return all pieces of one stream."""
    return [piece async for piece in upstream.stream(url, CHAT, b"{}", silence_s=lambda: 0.2)]


def against(answer: Answer, *, use: Callable[[HttpUpstream, str], Awaitable[Any]]) -> Any:
    """Run ``use`` against a server that sends this response."""

    async def play() -> Any:
        async with raw_server(answer) as server, HttpUpstream() as upstream:
            return await use(upstream, server.url)

    return asyncio.run(play())


def test_comments_count_as_life_and_are_passed_on() -> None:
    """Any bytes do; the reader decides what they are worth."""

    async def pings(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for _ in range(6):
            await asyncio.sleep(0.05)
            writer.write(chunked(b": ping\n\n"))
        writer.write(END)

    found = [event for piece in against(pings, use=heard) for event in piece.events]

    assert [event.comment for event in found] == [True] * 6 + [False]


def test_reads_the_silence_limit_again_while_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is long for a prompt and shorter between tokens: a stall is judged by the current limit."""
    monkeypatch.setattr("promptai.engine.connection._LOOK_S", 0.02)
    patience = [5.0]

    async def use(upstream: HttpUpstream, url: str) -> None:
        asyncio.get_running_loop().call_later(0.1, patience.__setitem__, 0, 0.1)
        async for _ in upstream.stream(url, CHAT, b"{}", silence_s=lambda: patience[0]):
            pass

    with pytest.raises(EngineDiedError, match=r"silent for 0.1 s in the middle"):
        against(silent_after(HELLO), use=use)


def test_headers_may_be_late_when_the_limit_has_grown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another request's long prompt arrived right after ours, and its batch is computed first."""
    monkeypatch.setattr("promptai.engine.connection._LOOK_S", 0.02)
    patience = [0.15]

    async def use(upstream: HttpUpstream, url: str) -> str:
        asyncio.get_running_loop().call_later(0.05, patience.__setitem__, 0, 5.0)
        return text([piece async for piece in upstream.stream(url, CHAT, b"{}", silence_s=lambda: patience[0])])

    async def late(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        writer.write(HELLO + END)

    assert against(late, use=use) != ""


def test_a_slow_readers_time_is_not_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptai.engine.connection._LOOK_S", 0.02)

    async def use(upstream: HttpUpstream, url: str) -> int:
        count = 0
        async for _ in upstream.stream(url, CHAT, b"{}", silence_s=lambda: 0.1):
            await asyncio.sleep(0.25)
            count += 1
        return count

    async def two(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        await asyncio.sleep(0.2)
        writer.write(END)

    assert against(two, use=use) == 2


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (OSError(111, "Connect call failed ('10.0.0.7', 8080)"), "Connection refused"),
        (
            OSError("Multiple exceptions: [Errno 101] Connect call failed ('fe80::1', 80), [Errno 111] Connect call"),
            "Network is unreachable, Connection refused",
        ),
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number"), "[SSL: WRONG_VERSION_NUMBER] wrong"),
        (OSError(), "it cannot be reached"),
    ],
    ids=["refused", "two-addresses", "no-such-name", "tls", "nothing"],
)
def test_the_reason_of_a_lost_connection_has_no_addresses(cause: OSError, words: str) -> None:
    key = ConnectionKey("pi-1", 80, is_ssl=False, ssl=True, proxy=None, proxy_auth=None, proxy_headers_hash=None)
    reason = _reason(aiohttp.ClientConnectorError(key, cause))

    assert reason.startswith(words)
    assert "10.0.0.7" not in reason
