import asyncio
import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import msgspec
import pytest

from promptai.engine.client import Arrival, EngineClient
from promptai.engine.simulated import Fault, Sent, SimulatedEngine
from promptai.engine.simulation import SimulationConfig, render
from promptai.errors import EngineDiedError, EngineError, EngineProtocolError, EngineRefusedError
from promptai.wire.llamaserver import Slot
from promptai.wire.openai import Message, Usage
from support_engine import CHAT, chat, text_of, until

FAST = SimulationConfig(prefill_tps=1e6, decode_tps=1e5)
#: Ten milliseconds a token: a long answer outlasts every test.
SLOW = SimulationConfig(prefill_tps=1e6, decode_tps=100.0)
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is cell 12 up?"}]

Use = Callable[[SimulatedEngine, EngineClient], Awaitable[Any]]


def against(config: SimulationConfig, use: Use, *, fault: Fault | None = None, silence_s: float = 5.0) -> Any:
    """Run ``play`` with a client of a simulated engine."""

    async def play() -> Any:
        engine = SimulatedEngine(config, fault=fault)
        async with asyncio.timeout(20), engine, EngineClient(engine.base_url, silence_s=silence_s) as client:
            return await use(engine, client)

    return asyncio.run(play())


async def talk(client: EngineClient, tokens: int = 5, **fields: Any) -> list[Arrival]:
    """Stream one answer of that many tokens."""
    return await chat(client, {"messages": TALK, "max_tokens": tokens, **fields})


async def listen_into(found: list[Arrival], client: EngineClient) -> None:
    """Stream one answer into ``found``, which keeps what arrived before a failure."""
    async for arrival in client.stream_chat(CHAT | {"max_tokens": 10}):
        found.append(arrival)  # noqa: PERF401  a comprehension would lose all of it


async def idle(client: EngineClient) -> bool:
    """Whether no slot is busy."""
    return not any(slot.is_processing for slot in await client.slots())


@pytest.mark.parametrize(
    ("fault", "kind", "word"),
    [
        (Fault(kind="refuse"), EngineRefusedError, "HTTP 503: refused"),
        (Fault(kind="stall", after_tokens=3), EngineDiedError, "silent"),
        (Fault(kind="cut", after_tokens=3), EngineDiedError, "broke off in the middle"),
        (Fault(kind="malformed", after_tokens=3), EngineProtocolError, "malformed chunk"),
        (Fault(kind="error", after_tokens=3), EngineRefusedError, "broke off with an error: failed"),
    ],
    ids=["refuse", "stall", "cut", "malformed", "error"],
)
def test_each_fault_looks_like_the_real_one(fault: Fault, kind: type[EngineError], word: str) -> None:
    """After exactly the configured number of tokens."""

    async def listen(_engine: SimulatedEngine, client: EngineClient) -> list[Arrival]:
        found: list[Arrival] = []
        with pytest.raises(kind, match=word):
            await listen_into(found, client)
        return found

    found = against(FAST, listen, fault=fault, silence_s=0.2)

    assert fault.after_tokens == sum(bool(text_of([arrival])) for arrival in found)


@pytest.mark.real
def test_the_fault_die_ends_the_process() -> None:
    """Its client reports the lost connection, and the port is closed."""
    command = [sys.executable, "-m", "promptai", "engine", "simulate", "--fault", "die", "--after-tokens", "2"]
    with subprocess.Popen([*command, "--time-scale", "1000"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+:\d+", process.stdout.readline())
        assert found is not None

        async def play() -> None:
            async with EngineClient(found[0]) as client:
                assert await client.healthy()
                with pytest.raises(EngineDiedError, match="broke off in the middle"):
                    await talk(client)

        asyncio.run(play())
        assert process.wait(timeout=20) == 9


def test_survives_a_stall_shorter_than_the_limit() -> None:
    """The answer is complete."""

    async def listen(_engine: SimulatedEngine, client: EngineClient) -> tuple[str, float]:
        found = await talk(client)
        texts = [arrival for arrival in found if text_of([arrival])]
        return text_of(found), texts[2].t - texts[1].t

    whole, _ = against(FAST, listen)
    stalled, gap_s = against(FAST, listen, fault=Fault(kind="stall", after_tokens=2, stall_s=0.1))

    assert whole == stalled
    assert gap_s >= 0.1


def test_a_fault_affects_the_configured_requests() -> None:
    """The first is served, the next two fail, then the engine works again."""

    async def outcomes(_engine: SimulatedEngine, client: EngineClient) -> list[bool]:
        found = []
        for _ in range(5):
            try:
                found.append(bool(await talk(client)))
            except EngineRefusedError:
                found.append(False)
        return found

    assert against(FAST, outcomes, fault=Fault(kind="refuse", skip=1, times=2)) == [True, False, False, True, True]


def test_sets_and_clears_a_fault_over_http() -> None:
    """An unknown one is refused, and changes nothing."""

    async def play(engine: SimulatedEngine, client: EngineClient) -> list[bool | None]:
        found: list[bool | None] = []
        async with aiohttp.ClientSession() as session:
            for body in ({"kind": "refuse"}, {"kind": "flood"}, None):
                async with session.post(f"{engine.base_url}/simulated/fault", json=body) as response:
                    found.append(response.status == 200)
                try:
                    found.append(bool(await talk(client)))
                except EngineRefusedError:
                    found.append(False)
        return found

    assert against(FAST, play) == [True, False, False, False, True, True]


@pytest.mark.parametrize("words", [16, 40], ids=["exactly-full", "far-too-many"])
def test_refuses_a_prompt_that_does_not_fit(words: int) -> None:
    """With the numbers, like llama-server: an answer needs at least one token, and nothing is truncated."""
    counts = rf"request \({words + 4} tokens\) exceeds the available context size \(20 tokens\)"

    async def play(_engine: SimulatedEngine, client: EngineClient) -> str | None:
        with pytest.raises(EngineRefusedError, match=counts) as caught:
            await chat(client, {"messages": [{"role": "user", "content": "x " * words}]})
        return caught.value.kind

    assert against(msgspec.structs.replace(FAST, context=20), play) == "exceed_context_size_error"


def test_an_answer_ends_with_the_context() -> None:
    """With the finish reason of a limit; down to a single token."""

    async def play(_engine: SimulatedEngine, client: EngineClient) -> tuple[Usage | None, list[str]]:
        found = await talk(client, tokens=1000)
        return found[-1].chunk.usage, found[-2].chunk.finish_reasons

    for context in (14, 40):
        usage, reason = against(msgspec.structs.replace(FAST, context=context), play)
        assert context == usage.prompt_tokens + usage.completion_tokens
        assert reason == ["length"]
    assert against(msgspec.structs.replace(FAST, context=usage.prompt_tokens + 1), play)[0].completion_tokens == 1


def test_refuses_requests_while_loading() -> None:
    """And is ready afterwards, not before its time."""
    config = msgspec.structs.replace(FAST, load_s=0.2)

    async def play(_engine: SimulatedEngine, client: EngineClient) -> tuple[bool, float]:
        started = time.monotonic()
        before = await client.healthy()
        for ask in (talk(client), client.props(), client.complete({"prompt": "x"})):
            with pytest.raises(EngineRefusedError, match="HTTP 503: Loading model"):
                await ask
        await until(client.healthy)
        ready_s = time.monotonic() - started
        await talk(client)
        return before, ready_s

    before, ready_s = against(config, play)

    assert not before
    assert ready_s > 0.15


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", b"{nope"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": 5}]}'),
        ("/v1/chat/completions", b'{"messages": "x"}'),
        ("/completion", b'{"prompt": [1.5]}'),
        ("/tokenize", b"{}"),
        ("/tokenize", b'{"content": "\xff"}'),
    ],
    ids=["no-json", "number", "text", "fraction", "empty", "not-utf-8"],
)
def test_refuses_malformed_requests_like_llama_server(path: str, body: bytes) -> None:
    """400, with the error type that clients check."""

    async def play(engine: SimulatedEngine, _client: EngineClient) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session, session.post(engine.base_url + path, data=body) as response:
            return response.status, await response.json()

    status, answer = against(FAST, play)

    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


def test_two_engines_cannot_share_a_port() -> None:
    """The second one reports it and leaves nothing behind."""

    async def play(engine: SimulatedEngine, client: EngineClient) -> bool:
        port = int(engine.base_url.rpartition(":")[2])
        with pytest.raises(OSError, match="address already in use"):
            await SimulatedEngine(FAST, port=port).__aenter__()
        return await client.healthy()

    assert against(FAST, play)


def test_a_disconnected_client_frees_its_slot() -> None:
    """One whose answer is streaming, and one that waits behind it."""

    async def play(engine: SimulatedEngine, client: EngineClient) -> list[int]:
        async def arrived() -> bool:
            return len(engine.sent) == 2

        stream = client.stream_chat({**CHAT, "max_tokens": 8000})
        await anext(stream)
        waiting = asyncio.create_task(chat(client))
        await until(arrived)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await stream.aclose()
        await until(lambda: idle(client))
        await talk(client, tokens=2)
        return [len(sent.t_chunks) for sent in engine.sent]

    first, waited, last = against(SLOW, play)

    assert first < 8000
    assert (waited, last) == (0, 2)


def test_slots_and_metrics_show_running_and_waiting_requests() -> None:
    """Two slots, three long answers: one waits, and none after the clients have disconnected."""

    async def play(_engine: SimulatedEngine, client: EngineClient) -> str:
        async def waits() -> bool:
            return "requests_deferred 1" in await client.metrics()

        asking = [asyncio.create_task(talk(client, tokens=5000)) for _ in range(3)]
        await until(waits)
        assert [slot.is_processing for slot in await client.slots()] == [True, True]
        assert "llamacpp:requests_processing 2\n" in await client.metrics()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await until(lambda: idle(client))
        return await client.metrics()

    metrics = against(msgspec.structs.replace(SLOW, slots=2), play)

    assert metrics.startswith("llamacpp:requests_processing 0\nllamacpp:requests_deferred 0\n")


def test_props_slots_and_token_counts_agree() -> None:
    """The template's text, its tokens, the usage, the timings and the chunks."""
    config = msgspec.structs.replace(FAST, slots=3, context=500, model="simulated-1b", answer_tokens=30)

    async def play(engine: SimulatedEngine, client: EngineClient) -> None:
        props = await client.props()
        assert (
            props.total_slots,
            props.default_generation_settings.n_ctx,
            props.model_alias,
            props.build_info,
        ) == (3, 500, "simulated-1b", "simulated")
        assert await client.models() == ["simulated-1b"]
        assert [Slot(number, n_ctx=500) for number in range(3)] == await client.slots()

        found = await talk(client, tokens=100)
        usage, timings = found[-1].chunk.usage, found[-1].chunk.timings
        assert usage is not None
        assert timings is not None
        async with aiohttp.ClientSession() as session:
            url = f"{engine.base_url}/apply-template"
            async with session.post(url, json={"messages": TALK}) as response:
                prompt = (await response.json())["prompt"]
        assert render([Message("system", "Be brief."), Message("user", "Is cell 12 up?")]) == prompt
        assert len(await client.tokenize(prompt)) == usage.prompt_tokens == timings.prompt_n
        pieces = [text_of([arrival]) for arrival in found if text_of([arrival])]
        assert len(pieces) == usage.completion_tokens == timings.predicted_n
        assert len(await client.tokenize("".join(pieces))) == len(pieces)
        assert found[-2].chunk.finish_reasons == ["stop"]

    against(config, play)


@pytest.mark.parametrize("cache", [False, True], ids=["off", "on"])
def test_uses_and_reports_the_cache(cache: bool) -> None:  # noqa: FBT001  a table
    """In usage, in timings and in the engine's record."""

    async def play(engine: SimulatedEngine, client: EngineClient) -> tuple[int, int]:
        await talk(client, cache_prompt=cache)
        last = (await talk(client, cache_prompt=cache))[-1].chunk
        assert last.usage is not None
        assert last.usage.prompt_tokens_details is not None
        assert last.timings is not None
        cached = last.usage.prompt_tokens_details.cached_tokens
        assert cached == last.timings.cache_n == engine.sent[1].cached_tokens
        assert last.usage.prompt_tokens == cached + last.timings.prompt_n
        return cached, last.usage.prompt_tokens

    cached, prompt = against(FAST, play)

    assert (prompt - 1 if cache else 0) == cached


def test_every_api_returns_the_same_text() -> None:
    """Streamed, not streamed, and as a plain completion."""

    async def play(engine: SimulatedEngine, client: EngineClient) -> set[str]:
        streamed = text_of(await talk(client, tokens=12))
        async with aiohttp.ClientSession() as session:
            body = {"messages": TALK, "max_tokens": 12}
            async with session.post(f"{engine.base_url}/v1/chat/completions", json=body) as response:
                at_once = (await response.json())["choices"][0]["message"]["content"]
        prompt = render([Message("system", "Be brief."), Message("user", "Is cell 12 up?")])
        plain = await client.complete({"prompt": prompt, "n_predict": 12})
        ids = await client.complete({"prompt": await client.tokenize(prompt), "n_predict": 12})
        return {streamed, at_once, plain.content, ids.content}

    assert len(against(FAST, play)) == 1


def test_concurrent_streams_are_not_mixed_up() -> None:
    """Each gets the text that it would get alone."""

    async def play(_engine: SimulatedEngine, client: EngineClient) -> tuple[list[str], list[str]]:
        bodies = [
            {"messages": [{"role": "user", "content": f"mast {number}"}], "max_tokens": 20} for number in range(6)
        ]
        together = await asyncio.gather(*(chat(client, body) for body in bodies))
        alone = [await chat(client, body) for body in bodies]
        return [text_of(found) for found in together], [text_of(found) for found in alone]

    together, alone = against(msgspec.structs.replace(FAST, slots=3), play)

    assert alone == together
    assert len(set(alone)) == 6


def test_records_real_times_never_earlier_than_configured() -> None:
    """20 prompt tokens at 200 per second, then one token each 20 ms; a busy machine may be later, never earlier."""
    config = SimulationConfig(prefill_tps=100.0, decode_tps=25.0, time_scale=2.0)

    async def play(engine: SimulatedEngine, client: EngineClient) -> tuple[float, list[Arrival], Sent, float]:
        t_sent = time.monotonic()
        found = await talk(client, tokens=4)
        async with aiohttp.ClientSession() as session, session.get(f"{engine.base_url}/simulated/sent") as response:
            [note] = msgspec.json.decode(await response.read(), type=list[Sent])
        return t_sent, found, note, time.monotonic()

    t_sent, found, note, t_end = against(config, play)
    first_s = note.prompt_tokens / 200

    assert t_sent <= note.t_received <= note.t_chunks[0]
    assert note.t_chunks == sorted(note.t_chunks)
    assert 4 == len(note.t_chunks) == len([arrival for arrival in found if text_of([arrival])])
    assert note.t_chunks[-1] <= t_end
    for number, t_chunk in enumerate(note.t_chunks):
        assert t_chunk - note.t_received >= first_s + number * 0.02 - 1e-4
