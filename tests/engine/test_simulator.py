"""The simulated engine in this process: its faults and its timing."""

import asyncio
import contextlib
from typing import Any

import msgspec
import pytest

from promptai.engine.simulator import Fault
from promptai.engine.upstream import Piece
from promptai.errors import EngineDiedError, EngineError, EngineProtocolError, EngineRefusedError
from support_simulated_upstream import SimulatedUpstream
from support_simulator import (
    CHAT,
    CONFIG,
    NATIVE,
    TALK,
    TEXT,
    A,
    B,
    against,
    ask,
    listen,
    listen_into,
    open_stream,
    text,
)


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE])
@pytest.mark.parametrize(
    ("fault", "kind", "word"),
    [
        (Fault(kind="refuse"), EngineRefusedError, "HTTP 503: refused"),
        (Fault(kind="stall", after_tokens=2), EngineDiedError, "silent"),
        (Fault(kind="cut", after_tokens=2), EngineDiedError, "broke off"),
        (Fault(kind="die", after_tokens=2), EngineDiedError, "broke off"),
    ],
    ids=["refuse", "stall", "cut", "die"],
)
def test_each_fault_affects_each_kind_of_stream(path: str, fault: Fault, kind: type[EngineError], word: str) -> None:
    """After exactly the configured tokens; the body of a refusal is complete."""

    async def play(upstream: SimulatedUpstream) -> tuple[list[Piece], bool]:
        found: list[Piece] = []
        body = {} if path == CHAT else {"prompt": "is it up?"}
        with pytest.raises(kind, match=word) as caught:
            await listen_into(found, open_stream(upstream, path, **body))
        if isinstance(caught.value, EngineRefusedError):
            assert b'"type":"unavailable_error"' in caught.value.body
        return found, upstream.engines[A].running

    found, running = against(play, fault=fault)

    assert fault.after_tokens == len(text(found).split())
    assert running == (fault.kind != "die")


@pytest.mark.parametrize(
    ("kind", "last"),
    [("malformed", '{"choices": [{"delta"'), ("error", '"message":"failed, as configured"')],
)
def test_passes_on_errors_inside_a_stream(kind: Any, last: str) -> None:
    """The reader decides what they mean."""
    pieces = against(lambda upstream: listen(upstream, max_tokens=3), fault=Fault(kind=kind, after_tokens=1))

    assert any(last in event.data for piece in pieces for event in piece.events)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("error", 500), ("malformed", 200), ("refuse", 503), ("cut", "broke off"), ("die", "broke off")],
)
def test_whole_responses_have_the_same_faults(kind: Any, found: int | str) -> None:
    """As far as they apply."""

    async def play(upstream: SimulatedUpstream) -> int:
        return (await upstream.post(A, CHAT, msgspec.json.encode({"messages": TALK}), limit_s=1e6)).status

    fault = Fault(kind=kind, after_tokens=1)
    if isinstance(found, int):
        assert against(play, fault=fault) == found
    else:
        with pytest.raises(EngineDiedError, match=found):
            against(play, fault=fault)


@pytest.mark.parametrize("way", ["stream", "ask", "get"])
@pytest.mark.parametrize("url", ["http://nowhere:9", A], ids=["unknown", "killed"])
def test_refuses_connections_without_an_engine(url: str, way: str) -> None:
    """At an unknown URL, and at one whose engine was killed."""

    async def play(upstream: SimulatedUpstream) -> None:
        upstream.kill(A)
        if way == "stream":
            await listen(upstream, url=url)
        elif way == "ask":
            await ask(upstream, url=url, messages=TALK)
        else:
            await upstream.get(url, "/health", limit_s=1.0)

    with pytest.raises(EngineDiedError, match=f"no connection to {url}"):
        against(play)


def test_killing_breaks_off_every_request() -> None:
    """Streams, a whole response, a queued and a stalled one; other engines continue."""

    async def play(upstream: SimulatedUpstream) -> list[Any]:
        asked = [
            asyncio.create_task(listen(upstream, max_tokens=2, stream_options={})),
            asyncio.create_task(listen(upstream, max_tokens=1000)),
            asyncio.create_task(ask(upstream, messages=TALK)),
            asyncio.create_task(listen(upstream, max_tokens=1000)),
            asyncio.create_task(listen(upstream, url=B, max_tokens=50)),
        ]
        await asyncio.sleep(3.0)
        upstream.kill(A)
        return await asyncio.gather(*asked, return_exceptions=True)

    fault = Fault(kind="stall", after_tokens=1, times=1, stall_s=1000.0)
    stalled, *broken, well = against(play, fault=fault)

    assert [EngineDiedError] * 4 == [type(stalled), *map(type, broken)]
    assert len(text(well).split()) == 50


def test_a_revived_engine_loads_again_with_empty_slots() -> None:
    """At the same URL."""
    config = msgspec.structs.replace(CONFIG, load_s=10.0)

    async def cached(upstream: SimulatedUpstream) -> int:
        answer = await ask(upstream, messages=TALK, max_tokens=1)
        return int(answer["timings"]["cache_n"])

    async def play(upstream: SimulatedUpstream) -> list[int]:
        await asyncio.sleep(10.0)
        found = [await cached(upstream), await cached(upstream)]
        upstream.kill(A)
        upstream.revive(A)
        found.append((await upstream.get(A, "/health", limit_s=1.0)).status)
        await asyncio.sleep(10.0)
        found.append((await upstream.get(A, "/health", limit_s=1.0)).status)
        return [*found, await cached(upstream)]

    first, second, loading, ready, revived = against(play, config=config)

    assert first == revived == 0 < second
    assert (loading, ready) == (503, 200)


def test_distinguishes_whole_responses_from_streams() -> None:
    """One was not requested as a stream; another is a refusal of a prompt that is too long."""

    async def too_long(upstream: SimulatedUpstream) -> None:
        await listen(upstream, NATIVE, prompt=[1] * 9000)

    async def at_once(upstream: SimulatedUpstream) -> None:
        await listen(upstream, max_tokens=1, stream=False)

    with pytest.raises(EngineRefusedError) as caught:
        against(too_long)
    assert (caught.value.status, caught.value.kind) == (400, "exceed_context_size_error")
    assert msgspec.json.decode(caught.value.body)["error"]["n_prompt_tokens"] == 9000
    with pytest.raises(EngineProtocolError, match="a stream was requested"):
        against(at_once)


@pytest.mark.parametrize("limit_s", [0.1, 2.0])
def test_a_timeout_frees_the_slot(limit_s: float) -> None:
    """In prefill and in decode."""

    async def play(upstream: SimulatedUpstream) -> bool:
        with pytest.raises(EngineDiedError, match="silent"):
            await upstream.post(A, CHAT, msgspec.json.encode({"messages": TALK}), limit_s=limit_s)
        return upstream.engines[A].scheduler.idle

    assert against(play)


def test_closing_a_stream_frees_its_slot_at_once() -> None:
    """In the middle of prefill, and of an answer."""

    async def play(upstream: SimulatedUpstream) -> list[bool]:
        found = []
        for pieces in (1, 5):
            stream = open_stream(upstream, return_progress=True)
            async with contextlib.aclosing(stream):
                for _ in range(pieces):
                    await anext(stream)
            found.append(upstream.engines[A].scheduler.idle)
        return found

    assert against(play) == [True, True]


def test_an_hour_of_a_board_passes_at_once() -> None:
    """3,600 tokens at one per second, on virtual time."""
    config = msgspec.structs.replace(CONFIG, decode_tps=1.0)

    async def play(upstream: SimulatedUpstream) -> float:
        await ask(upstream, NATIVE, prompt=[1], n_predict=3_600)
        return asyncio.get_running_loop().time()

    assert against(play, config=config) == pytest.approx(3600.0, rel=1e-3)
