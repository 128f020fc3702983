"""Play one turn on a server and record its timestamps and counts.

Two dialects: llama-server's, in which requests can disable the KV cache and the engine reports
its own timings; and plain OpenAI, which allows the standard fields only and leaves unreported
values ``None``. There a cold prompt begins with a salt instead, so no cache can contain it: not
from an earlier request or run, nor through another URL of the same server.

This module defines the first token: role-only, empty and reasoning chunks do not count. Several
benchmarks got that wrong (guidellm #737, genai-bench #81, vllm #15106) and published waiting
times that no user experienced.
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
    """The state of the turn in progress, for a progress display."""

    key: TraceKey | None = None
    chunks: int = 0
    t_first: float | None = None


class PlayedTurn(msgspec.Struct, frozen=True):
    """A finished turn: its trace, the text of the answer, and the error that ended it, if any."""

    trace: Trace
    text: str
    failure: EngineError | None = None


class TurnClient:
    """
    Plays turns on one server.

    Args:
        model: Model name in requests.
        llama_server: Whether the server accepts llama-server's own fields.
        origin: Value of ``time.monotonic()`` at which the run's clock is 0.
        nonce: Makes the salts of this client differ from those of all others.
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
        """Request the answer to ``messages``; an engine's error goes into the trace."""
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
        """Play a turn outside the run; raises ``EngineError`` if it fails."""
        account, key = _Account(LiveTurn()), TraceKey("warm-up", cache, 0, "warm-up", self._warm_ups)
        self._warm_ups += 1
        t_sent = self.now()
        await self._collect(account, key, messages, max_tokens=max_tokens)
        return account.trace(key, t_scheduled=t_sent, t_sent=t_sent, t_end=self.now(), failure=None)

    def unplayed(self, key: TraceKey, failure: EngineError, *, t_scheduled: float) -> PlayedTurn:
        """Return the trace of a turn that was never sent because of ``failure``."""
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
        Return the request body: greedy decoding with a fixed seed.

        With ``temperature`` 0 alone llama-server still runs its other samplers, so the body names the chain.
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
                # One slot of a server with several: otherwise "warm" depends on the slot that it picks.
                body["id_slot"] = 0
        return body


def salted(messages: list[Message], key: TraceKey, nonce: str) -> list[Message]:
    """
    Prefix a prompt with eight hexadecimal digits that no other request begins with.

    Args:
        nonce: Differs between runs, sessions and targets.
    """
    name = f"{nonce}/{key.repeat}/{key.conversation}/{key.turn}"
    salt = hashlib.sha256(name.encode()).hexdigest()[:8]
    return [Message(messages[0].role, f"[{salt}] {messages[0].content}"), *messages[1:]]


class _Account:
    """The chunks of one answer so far."""

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
        """Record a chunk that arrived at ``t`` on the run's clock."""
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
    """Return ``Kind: sentence``, the form in traces."""
    if isinstance(failure, EngineRefusedError) and failure.kind == "exceed_context_size_error":
        return f"{CONTEXT_EXCEEDED}: {failure.message}"
    if isinstance(failure, EngineDiedError):
        return f"EngineDied: {failure.message}"
    return f"{type(failure).__name__.removesuffix('Error')}: {failure.message}"
