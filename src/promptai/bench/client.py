"""Play one turn against a server and account for it.

Knows two dialects: llama-server's, where the KV cache can be switched off and
the engine tells its own timings, and plain OpenAI, where only the standard
fields may be sent and what is not said stays ``None``. There a cold prompt begins
with a salt instead, so that no cache can know it: not from an earlier request, nor
from an earlier run, nor from another URL of the same server.

What counts as the first token is decided here: role-only, empty and reasoning
chunks do not. Several benchmarks got that wrong (guidellm #737, genai-bench
#81, vllm #15106) and published waiting times that nobody felt.
"""

import hashlib
import time
from contextlib import aclosing
from typing import Any

import msgspec

from promptai.bench.plan import Protocol
from promptai.bench.trace import Cache, Trace, TraceKey
from promptai.engine.client import EngineClient
from promptai.errors import EngineDiedError, EngineError, EngineRefusedError
from promptai.wire.llamaserver import Timings
from promptai.wire.openai import CompletionChunk, Message, Usage

CONTEXT_EXCEEDED = "ContextExceeded"


class LiveTurn(msgspec.Struct):
    """What a progress display may look at while a turn is being played."""

    key: TraceKey | None = None
    chunks: int = 0
    t_first: float | None = None


class PlayedTurn(msgspec.Struct, frozen=True):
    """One turn: its trace, the answer's text, and the error that ended it, if any."""

    trace: Trace
    text: str
    failure: EngineError | None = None


class TurnClient:
    """
    Plays turns on one server.

    Args:
        model: The name that requests carry.
        llama_server: Whether llama-server's own fields may be sent.
        origin: Monotonic second at which the run's clock is 0.
        nonce: Tells the salts of this client from those of every other.
    """

    def __init__(
        self,
        client: EngineClient,
        protocol: Protocol,
        *,
        model: str,
        llama_server: bool,
        origin: float,
        nonce: str = "",
    ) -> None:
        self._client = client
        self._protocol = protocol
        self._model = model
        self._llama_server = llama_server
        self._origin = origin
        self._nonce = nonce
        self._warm_ups = 0
        self.live = LiveTurn()

    def now(self) -> float:
        """Seconds on the run's clock."""
        return time.monotonic() - self._origin

    async def play(self, key: TraceKey, messages: list[Message], *, t_scheduled: float) -> PlayedTurn:
        """Ask for the answer to ``messages``; errors of the engine end up in the trace."""
        account = _Account(self.live)
        self.live.key, self.live.chunks, self.live.t_first = key, 0, None
        failure: EngineError | None = None
        t_sent = self.now()
        try:
            await self._collect(account, key, messages, max_tokens=self._protocol.max_tokens)
        except EngineError as error:
            failure = error
        trace = account.trace(key, t_scheduled=t_scheduled, t_sent=t_sent, t_end=self.now(), failure=failure)
        return PlayedTurn(trace, "".join(account.texts), failure)

    async def warm_up(self, messages: list[Message], cache: Cache, *, max_tokens: int) -> Trace:
        """Play something that is not counted; raises the engine's error when it fails."""
        account, key = _Account(LiveTurn()), TraceKey("warm-up", cache, 0, "warm-up", self._warm_ups)
        self._warm_ups += 1
        t_sent = self.now()
        await self._collect(account, key, messages, max_tokens=max_tokens)
        return account.trace(key, t_scheduled=t_sent, t_sent=t_sent, t_end=self.now(), failure=None)

    def unplayed(self, key: TraceKey, failure: EngineError, *, t_scheduled: float) -> PlayedTurn:
        """A turn that was not sent, because of what ``failure`` says."""
        now = self.now()
        trace = _Account(LiveTurn()).trace(key, t_scheduled=t_scheduled, t_sent=now, t_end=now, failure=failure)
        return PlayedTurn(trace, "", failure)

    async def _collect(self, account: "_Account", key: TraceKey, messages: list[Message], *, max_tokens: int) -> None:
        if key.cache == "cold" and not self._llama_server:
            messages = salted(messages, key, self._nonce)
        body = self.body(messages, key.cache, max_tokens=max_tokens)
        async with aclosing(self._client.stream_chat(body)) as arrivals:
            async for arrival in arrivals:
                account.chunk(arrival.t - self._origin, arrival.chunk)

    def body(self, messages: list[Message], cache: Cache, *, max_tokens: int) -> dict[str, Any]:
        """
        The request: greedy, with a fixed seed.

        ``temperature`` 0 alone leaves llama-server's other samplers in the chain, so the chain is named.
        """
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "seed": self._protocol.seed,
        }
        if self._llama_server:
            body |= {"top_k": 1, "samplers": ["top_k"], "cache_prompt": cache == "warm"}
            if self._protocol.ignore_eos:
                body["ignore_eos"] = True
            if self._protocol.one_at_a_time:
                # Of a server with several slots one is used, or "warm" would depend on which one it picks.
                body["id_slot"] = 0
        return body


def salted(messages: list[Message], key: TraceKey, nonce: str) -> list[Message]:
    """
    The same prompt behind eight hexadecimal digits that no other request begins with.

    Args:
        nonce: What a request for the same turn by another run, session or target does not have.
    """
    name = f"{nonce}/{key.repeat}/{key.conversation}/{key.turn}"
    salt = hashlib.sha256(name.encode()).hexdigest()[:8]
    return [Message(messages[0].role, f"[{salt}] {messages[0].content}"), *messages[1:]]


class _Account:
    """What has been seen of one answer so far."""

    def __init__(self, live: LiveTurn) -> None:
        self._live = live
        self.texts: list[str] = []
        self.chunks = 0
        self.t_first: float | None = None
        self.t_first_reasoning: float | None = None
        self.t_last: float | None = None
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None

    def chunk(self, t: float, chunk: CompletionChunk) -> None:
        """Take one chunk that arrived at ``t``."""
        if chunk.choices:
            choice = chunk.choices[0]
            delta = choice.delta
            if delta is not None and delta.content:
                self.content(t, delta.content)
            elif delta is not None and delta.thought and self.t_first_reasoning is None:
                self.t_first_reasoning = t
            if choice.finish_reason is not None:
                self.t_last, self.finish_reason = t, choice.finish_reason
        self.usage = chunk.usage or self.usage
        self.timings = chunk.timings or self.timings

    def content(self, t: float, text: str) -> None:
        if self.t_first is None:
            self.t_first = self._live.t_first = t
        self.chunks += 1
        self._live.chunks = self.chunks
        self.texts.append(text)

    def trace(
        self, key: TraceKey, *, t_scheduled: float, t_sent: float, t_end: float, failure: EngineError | None
    ) -> Trace:
        timings, usage = self.timings, self.usage
        cached = timings.cache_n if timings else (usage.cached_tokens if usage else None)
        return Trace(
            target=key.target,
            cache=key.cache,
            repeat=key.repeat,
            conversation=key.conversation,
            turn=key.turn,
            t_scheduled=t_scheduled,
            t_sent=t_sent,
            t_end=t_end,
            t_first=self.t_first,
            t_first_reasoning=self.t_first_reasoning,
            t_last=self.t_last,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=cached,
            generated_tokens=usage.completion_tokens if usage else None,
            chunks=self.chunks,
            prompt_n=timings.prompt_n if timings else None,
            prompt_ms=timings.prompt_ms if timings else None,
            predicted_n=timings.predicted_n if timings else None,
            predicted_ms=timings.predicted_ms if timings else None,
            finish_reason=self.finish_reason,
            error=None if failure is None else describe(failure),
            text_sha256=None if failure is not None else hashlib.sha256("".join(self.texts).encode()).hexdigest(),
        )


def describe(failure: EngineError) -> str:
    """``Kind: sentence``, as traces carry it."""
    if isinstance(failure, EngineRefusedError) and failure.kind == "exceed_context_size_error":
        return f"{CONTEXT_EXCEEDED}: {failure.message}"
    if isinstance(failure, EngineDiedError):
        return f"EngineDied: {failure.message}"
    return f"{type(failure).__name__.removesuffix('Error')}: {failure.message}"
