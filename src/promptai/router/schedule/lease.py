"""A slot lease: one request in one slot, from the moment it gets the slot until it gives it back.

Engines report their load seconds late, if at all. The gateway sends every request and sees every token, so it keeps
its own account; a lease is one entry in it.
"""

import msgspec

from promptai.fleet.replica import Replica
from promptai.router.estimate.policy import Estimate, PendingWork
from promptai.router.estimate.prefix import Chain
from promptai.wire.llamaserver import Timings

_MAX_CHARS_PER_TOKEN = 7.0


class SlotRequest(msgspec.Struct, frozen=True, kw_only=True):
    """
    A request as the dispatcher sees it.

    Attributes:
        model: A model of the fleet.
        prompt: The prompt as a chain of prefixes.
        prompt_tokens: Estimated tokens of the prompt, or of all its prompts together.
        max_tokens: Limit of one answer; ``None``: unlimited.
        answers: Number of answers requested.
        key: Id of the API key whose fair share it uses.
        batch: It may wait behind all interactive requests.
        max_wait_s: Longest time in the queue.
        longest_prompt_tokens: Tokens of the longest of several prompts; ``None`` with a single prompt.
        avoid_until: Replicas that failed this request, and the loop's time until which they are avoided.
        resubmitted: It was accepted before, so the queue's bound does not apply.
        resuming: Part of its answer has been sent; only llama-server can continue it.
    """

    model: str
    prompt: Chain
    prompt_tokens: float
    max_tokens: int | None = None
    answers: int = 1
    key: str = "local"
    batch: bool = False
    max_wait_s: float = 600.0
    longest_prompt_tokens: float | None = None
    avoid_until: dict[str, float] = {}
    resubmitted: bool = False
    resuming: bool = False

    @property
    def min_prompt_tokens(self) -> float:
        """Lower bound for the prompt's tokens, at 7 characters each: prose has four or five, hardly any text six."""
        return self.prompt.chars / _MAX_CHARS_PER_TOKEN


class LeaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """
    The outcome of a request on its replica.

    Attributes:
        conversation: Prompt and answer as the next turn repeats them, now in the slot's cache; ``None``: unknown.
        timings: As the engine reported them; ``None`` if it did not.
        generated_tokens: Tokens of all answers; ``None`` if the engine does not report them.
        capped: A limit ended the answer, not the model.
        prompt_comparable: The engine counted the same text as the gateway: one text prompt without media, answered
            from its beginning.
    """

    conversation: Chain | None = None
    timings: Timings | None = None
    generated_tokens: int | None = None
    capped: bool = False
    prompt_comparable: bool = True


class SlotLease:
    """
    A slot held by one request; opened and closed by the dispatcher.

    Attributes:
        slot: The slot in the gateway's account; the engine may use another.
        cached_tokens: Tokens of the prompt expected in the slot's cache.
        reason: Why this replica was chosen.
        queued_s: Time in the queue.
        started_at: The loop's time at which the request got the slot.
        first_token_at: The loop's time of the first token; ``None`` before it.
        generated: Chunks with text so far, at most one per token.
        pending_decode: Decoding that the request still causes.
        expected_answer_tokens: Estimated length of the answer.
        queue_cost: Tokens counted against the key's fair share when the request got the slot.
        alone: No other request ran on the replica during this lease.
        failed: The replica failed the request.
        result: Set before the lease ends; ``None``: the request failed or its client disconnected.
        stream_seconds_before: Stream seconds of the replica when the first token came.
    """

    def __init__(
        self,
        request: SlotRequest,
        replica: Replica,
        *,
        slot: int,
        cached_tokens: float,
        expected_answer_tokens: float,
        estimate: Estimate,
        reason: str,
        queued_s: float,
        now: float,
    ) -> None:
        self.request = request
        self.replica = replica
        self.slot = slot
        self.cached_tokens = cached_tokens
        self.estimate = estimate
        self.reason = reason
        self.queued_s = queued_s
        self.started_at = now
        self.first_token_at: float | None = None
        self.generated = 0
        self.alone = True
        self.failed = False
        self.result: LeaseResult | None = None
        self.stream_seconds_before = 0.0
        self.expected_answer_tokens = expected_answer_tokens
        self.queue_cost = 0.0
        self._uncomputed = max(1.0, request.prompt_tokens - cached_tokens)
        self._to_compute = self._uncomputed
        self._uncomputed_at = now
        self.pending_decode = PendingWork(0.0, self._answer_tokens_left())

    def record_progress(self, processed: int, cached: int, total: int, now: float) -> None:
        """Record the engine's prefill progress in tokens; ``processed`` and ``total`` include the cached ones."""
        self._uncomputed, self._uncomputed_at = float(max(0, total - processed)), now
        self._to_compute = float(max(1, total - cached))

    def record_token(self, now: float) -> None:
        """Record a chunk of the answer."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.generated += 1
        # Computed once per token, not for all streams of a replica whenever a request needs a slot.
        self.pending_decode = PendingWork(0.0, self._answer_tokens_left())

    def prefill_tokens_left(self, now: float, prefill_tps: float) -> float:
        """Estimated tokens of the prompt still to compute."""
        if self.first_token_at is not None:
            return 0.0
        return max(0.0, self._uncomputed - (now - self._uncomputed_at) * prefill_tps)

    def prefill_share(self, now: float, prefill_tps: float) -> float:
        """Share of the prefill that is done, 0 to 1."""
        return 1.0 - min(1.0, self.prefill_tokens_left(now, prefill_tps) / self._to_compute)

    def pending_work(self, now: float, prefill_tps: float) -> PendingWork:
        """Prefill and decoding still to do; the rest of an answer does not depend on its length so far."""
        return PendingWork(self.prefill_tokens_left(now, prefill_tps), self.pending_decode.decode)

    def _answer_tokens_left(self) -> float:
        limit, expected = self.request.max_tokens, self.expected_answer_tokens
        return expected if limit is None else min(expected, max(1.0, limit - self.generated))
