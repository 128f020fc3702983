"""Two simulated engines in this process, on virtual time, and helpers that send requests to them."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec

from promptai.engine.simulation import SimulationConfig
from promptai.engine.simulator import Fault, Simulator
from promptai.engine.upstream import Piece, Upstream
from promptai.wire.sse import SseEvent
from support_clock import run_virtually
from support_simulated_upstream import SimulatedUpstream

#: 100 prompt tokens a second, then a token each tenth of a second.
CONFIG = SimulationConfig(prefill_tps=100.0, decode_tps=10.0, slots=2, batch=40)
CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/completion"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is cell 12 up?"}]
A, B = "http://a:1", "http://b:2"

Use = Callable[[SimulatedUpstream], Awaitable[Any]]


def against(use: Use, *, config: SimulationConfig = CONFIG, fault: Fault | None = None) -> Any:
    """Run against two such engines, of which the first has the fault."""

    async def play() -> Any:
        engines = {A: Simulator(config, fault=fault), B: Simulator(config)}
        async with SimulatedUpstream(engines) as upstream:
            return await use(upstream)

    return run_virtually(play())


def ends(path: str) -> Callable[[SseEvent], bool]:
    """Return the function that recognises the last event of that path."""
    if path == NATIVE:
        return lambda event: '"stop":true' in event.data
    return lambda event: event.data == "[DONE]"


async def listen(upstream: Upstream, path: str = CHAT, url: str = A, **body: Any) -> list[Piece]:
    """Stream one answer to its end."""
    return [piece async for piece in open_stream(upstream, path, url, **body)]


def open_stream(upstream: Upstream, path: str = CHAT, url: str = A, **body: Any) -> AsyncGenerator[Piece, None]:
    """Open a stream that the caller may close early."""
    data = msgspec.json.encode({"stream": True} | ({"messages": TALK} if path == CHAT else {}) | body)
    return upstream.stream(url, path, data, silence_s=lambda: 5.0, ends=ends(path))


async def listen_into(found: list[Piece], stream: AsyncGenerator[Piece, None]) -> None:
    """Stream into ``found``, which keeps what arrived before a failure."""
    async for piece in stream:
        found.append(piece)  # noqa: PERF401  a comprehension would lose all of it


async def ask(upstream: Upstream, path: str = CHAT, url: str = A, **body: Any) -> Any:
    """Request one answer in one piece."""
    reply = await upstream.post(url, path, msgspec.json.encode(body), limit_s=1e6)
    assert reply.status == 200, reply.body
    return msgspec.json.decode(reply.body)


def chunks(pieces: list[Piece]) -> list[Any]:
    """Return the bodies of the events, without the final marker."""
    events = [event for piece in pieces for event in piece.events]
    return [msgspec.json.decode(event.data) for event in events if event.data != "[DONE]"]


def text(pieces: list[Piece]) -> str:
    """Return the text of a stream, in any of the three formats."""
    choices = [choice for chunk in chunks(pieces) for choice in chunk.get("choices", [{"text": chunk.get("content")}])]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


async def ids(upstream: Upstream, url: str = A) -> list[int]:
    """Return the prompt of ``TALK`` as token ids."""
    prompt = (await ask(upstream, "/apply-template", url, messages=TALK))["prompt"]
    tokens: list[int] = (await ask(upstream, "/tokenize", url, content=prompt, add_special=True))["tokens"]
    return tokens
