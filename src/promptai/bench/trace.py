"""One request as recorded: raw timestamps and counts, and the definitions of everything derived.

Every rate that PromptAI prints is computed from these lines, so users can recompute it, and each
definition exists once: the names below are the metric names of the whole project. A value that a
server does not report is ``None``; a ratio with a missing part is ``None``; nothing becomes 0.
"""

from typing import Literal

import msgspec

Cache = Literal["cold", "warm"]


class TraceKey(msgspec.Struct, frozen=True):
    """Identifies a request within a run; a resumed run plays only keys without an answer."""

    target: str
    cache: Cache
    repeat: int
    conversation: str
    turn: int


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """
    One request.

    All ``t_*`` are seconds on the run's clock: monotonic, 0 at the start of the
    run, and continued (never overlapping) when a run is resumed.

    Attributes:
        target: Name of the target.
        cache: ``cold``: the KV cache was off; ``warm``: it could contain earlier turns.
        repeat: Pass over the workload, from 0.
        turn: User turn of the conversation, from 0.
        prompt_tokens: Tokens of the prompt, cached or not.
        cached_tokens: Prompt tokens reused from the server's cache.
        generated_tokens: Tokens of the answer, by the server's count.
        chunks: Streamed chunks that contained text.
        t_scheduled: Time at which the request was due.
        t_sent: Time at which it was handed to the socket.
        t_first: Arrival of the first *content* chunk; role-only, empty and reasoning chunks do not count.
        t_first_reasoning: Arrival of the first reasoning chunk; ``None``: the model sent none.
        t_last: Arrival of the end of generation (the chunk with the finish reason).
        prompt_n, prompt_ms, predicted_n, predicted_ms: The engine's own ``timings``.
        finish_reason: ``stop`` or ``length``.
        error: The error as ``Kind: sentence``; ``None``: answered.
        text_sha256: Hash of the answer's UTF-8 bytes: equal hashes are byte-identical answers.
    """

    target: str
    cache: Cache
    repeat: int
    conversation: str
    turn: int
    t_scheduled: float
    t_sent: float
    t_end: float
    t_first: float | None = None
    t_first_reasoning: float | None = None
    t_last: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    generated_tokens: int | None = None
    chunks: int = 0
    prompt_n: int | None = None
    prompt_ms: float | None = None
    predicted_n: int | None = None
    predicted_ms: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    text_sha256: str | None = None

    @property
    def key(self) -> TraceKey:
        """Identifies this request within its run."""
        return TraceKey(self.target, self.cache, self.repeat, self.conversation, self.turn)

    @property
    def ttft_s(self) -> float | None:
        """Seconds until the first content token arrived: the wait of a user."""
        return None if self.t_first is None else self.t_first - self.t_sent

    @property
    def latency_s(self) -> float | None:
        """Seconds until the answer was complete."""
        return None if self.t_last is None else self.t_last - self.t_sent

    @property
    def decode_s(self) -> float | None:
        """Seconds from the first token of any kind to the end of generation, on the client's clock."""
        starts = [t for t in (self.t_first, self.t_first_reasoning) if t is not None]
        return None if self.t_last is None or not starts else self.t_last - min(starts)

    @property
    def decode_steps(self) -> int | None:
        """Tokens after the first: (generated - 1), the steps within ``decode_s``."""
        if self.generated_tokens is None or self.generated_tokens < 2:
            return None
        return self.generated_tokens - 1

    @property
    def decode_tps(self) -> float | None:
        """(generated - 1) / (t_last - t_first), in tokens/s."""
        return _rate(self.decode_steps, self.decode_s)

    @property
    def uncached_tokens(self) -> int | None:
        """Prompt tokens computed: the engine's count, else prompt minus cached."""
        if self.prompt_n is not None:
            return self.prompt_n
        if self.prompt_tokens is None or self.cached_tokens is None:
            return None
        return self.prompt_tokens - self.cached_tokens

    @property
    def prompt_s(self) -> float | None:
        """Seconds of prefill on the engine's clock."""
        return None if self.prompt_ms is None else self.prompt_ms / 1000

    @property
    def prefill_tps(self) -> float | None:
        """Uncached prompt tokens / seconds of prefill, both the engine's."""
        return _rate(self.uncached_tokens, self.prompt_s)

    @property
    def all_tokens(self) -> int | None:
        """Tokens of prompt and answer, including cached ones."""
        if self.prompt_tokens is None or self.generated_tokens is None:
            return None
        return self.prompt_tokens + self.generated_tokens

    @property
    def total_tps(self) -> float | None:
        """(prompt + generated) / (t_last - t_sent)."""
        return _rate(self.all_tokens, self.latency_s)


def _rate(count: int | None, seconds: float | None) -> float | None:
    if count is None or seconds is None or seconds <= 0:
        return None
    return count / seconds
