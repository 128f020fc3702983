"""Routed requests on virtual time: simulated engines that fail on command, and the answers that clients receive."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import msgspec

from promptai.engine.simulation import SimulationConfig
from promptai.engine.simulator import Fault
from promptai.engine.upstream import Piece, Reply, Upstream, broken_off, is_done
from promptai.errors import PromptAIError
from promptai.gateway.admission import AdmissionRules, AdmittedRequest
from promptai.gateway.auth import Caller
from promptai.router.failover.request import RoutedRequest
from promptai.wire.sse import SseEvent
from support_clock import run_virtually
from support_serve import World

#: A tenth of a second a token; prompts take hardly any time.
PACE = SimulationConfig(prefill_tps=1000.0, decode_tps=10.0, slots=2, model="yi")
ASKED = [{"role": "user", "content": "Is cell 12 up?"}]
TOKENS = 20
#: Longer than any request may take: four times a silence of 5 s and an outage of 30 s.
FOR_EVER_S = 3600.0
RULES = AdmissionRules(stall_s=5.0)


class Received(msgspec.Struct, kw_only=True):
    """
    The answer that a client received.

    Attributes:
        error: The error that ended the answer early.
        took_s: Duration in seconds.
    """

    routed: RoutedRequest
    chunks: list[dict[str, Any]] = []
    error: PromptAIError | None = None
    took_s: float = 0.0

    @property
    def choices(self) -> list[dict[str, Any]]:
        """The choices of all chunks."""
        return [choice for chunk in self.chunks for choice in chunk["choices"]]

    @property
    def text(self) -> str:
        """The text of all chunks."""
        return "".join((c.get("delta") or {}).get("content") or c.get("text") or "" for c in self.choices)

    @property
    def ends(self) -> list[str]:
        """Every finish reason."""
        return [choice["finish_reason"] for choice in self.choices if choice["finish_reason"]]

    @property
    def usage(self) -> list[tuple[int, int]]:
        """Every report of usage: tokens of the prompt and of the answer."""
        found = [chunk["usage"] for chunk in self.chunks if chunk.get("usage")]
        return [(usage["prompt_tokens"], usage["completion_tokens"]) for usage in found]


class CutUpstream:
    """
    An upstream whose first stream breaks off before the first event that satisfies ``before``.

    Attributes:
        streams: Paths of all requests for a stream.
        lumped: Deliver the events up to the break in one piece, as a busy gateway does.
        rewrite: Changes the data of each event.
    """

    def __init__(self, inner: Upstream, before: Callable[[str], bool], *, lumped: bool = False) -> None:
        self.streams: list[str] = []
        self.lumped = lumped
        self.rewrite: Callable[[str], str] = lambda data: data
        self._inner = inner
        self._before = before
        self._cut = False

    async def get(self, url: str, path: str, *, limit_s: float) -> Reply:
        """See ``Upstream``."""
        return await self._inner.get(url, path, limit_s=limit_s)

    async def post(self, url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
        """See ``Upstream``."""
        return await self._inner.post(url, path, body, limit_s=limit_s)

    async def stream(
        self,
        url: str,
        path: str,
        body: bytes,
        *,
        silence_s: Callable[[], float],
        ends: Callable[[SseEvent], bool] = is_done,
    ) -> AsyncGenerator[Piece, None]:
        """See ``Upstream``."""
        self.streams.append(path)
        lump: list[SseEvent] = []
        stream = self._inner.stream(url, path, body, silence_s=silence_s, ends=ends)
        async with contextlib.aclosing(stream) as pieces:
            async for piece in pieces:
                for event in piece.events:
                    if not self._cut and self._before(event.data):
                        self._cut = True
                        if not self.lumped:
                            raise broken_off(url)
                        yield Piece(piece.t, [*lump, msgspec.structs.replace(event, data="{")])
                        return
                    rewritten = msgspec.structs.replace(event, data=self.rewrite(event.data))
                    if self.lumped and not self._cut:
                        lump.append(rewritten)
                    else:
                        yield Piece(piece.t, [rewritten])


def world(*names: str, config: SimulationConfig = PACE, **fields: Any) -> World:
    """A world of equal boards."""
    return World(dict.fromkeys(names or ("one", "two"), config), **{"rules": RULES, **fields})


def accept(world: World, body: Mapping[str, Any], path: str = "/v1/chat/completions") -> AdmittedRequest:
    """Admit a request."""
    return world.admission.admit(path, {"model": "yi", "stream": True, **body}, {}, Caller(key_id="local"))


def chat(**fields: Any) -> dict[str, Any]:
    """The body of a chat."""
    return {"messages": ASKED, "max_tokens": TOKENS, "stream_options": {"include_usage": True}, **fields}


def first(world: World, admitted: AdmittedRequest) -> str:
    """The board that the router tries first."""
    choice = world.dispatcher.preview(admitted.routed.slot_request)
    assert choice is not None
    return choice.view.replica.id


def arm(world: World, name: str, kind: str, after: int, *, times: int | None = 1) -> None:
    """Make a board fail after some tokens."""
    fault = {"kind": kind, "after_tokens": after, "times": times, "stall_s": FOR_EVER_S}
    world.engines[f"sim://{name}"].fault = msgspec.convert(fault, Fault)


async def receive(admitted: AdmittedRequest, on_chunk: Callable[[int], None] = lambda _: None) -> Received:
    """Read an answer to its end or its error; ``on_chunk`` receives the number of chunks so far."""
    loop = asyncio.get_running_loop()
    received, start = Received(routed=admitted.routed), loop.time()
    try:
        async with asyncio.timeout(FOR_EVER_S), contextlib.aclosing(admitted.routed.events()) as events:
            async for some in events:
                received.chunks += [msgspec.json.decode(data, type=dict[str, Any]) for data in some]
                on_chunk(len(received.chunks))
    except PromptAIError as error:
        received.error = error
    received.took_s = loop.time() - start
    return received


def undisturbed(
    body: Mapping[str, Any], path: str = "/v1/chat/completions", config: SimulationConfig = PACE
) -> Received:
    """The answer to a request when nothing fails."""

    async def play() -> Received:
        async with world(config=config).running() as running:
            return await receive(accept(running, body, path))

    return run_virtually(play())


def failing(kind: str, after: int, body: Mapping[str, Any], path: str = "/v1/chat/completions") -> Received:
    """The answer to a request whose first board fails after ``after`` tokens."""

    async def play() -> Received:
        async with world().running() as running:
            admitted = accept(running, body, path)
            arm(running, first(running, admitted), kind, after)
            return await receive(admitted)

    return run_virtually(play())


def cut_off(
    before: Callable[[str], bool],
    body: Mapping[str, Any],
    path: str = "/v1/chat/completions",
    *,
    lumped: bool = False,
    rewrite: Callable[[str], str] = lambda data: data,
) -> tuple[Received, list[str]]:
    """The answer to a request whose first stream breaks off there, and the paths that were requested."""

    async def play() -> tuple[Received, list[str]]:
        async with world().running() as running:
            cut = CutUpstream(running.upstream, before, lumped=lumped)
            cut.rewrite = rewrite
            running.admission.upstream = cut
            return await receive(accept(running, body, path)), cut.streams

    return run_virtually(play())


def assert_one_answer(usual: Received, received: Received) -> None:
    """Assert that the client cannot distinguish the answer from an undisturbed one."""
    assert received.error is None
    assert usual.text == received.text
    assert usual.ends == received.ends
    assert usual.usage == received.usage
    assert len({chunk["id"] for chunk in received.chunks}) == 1
    assert len([c for c in received.choices if (c.get("delta") or {}).get("role")]) == 1
