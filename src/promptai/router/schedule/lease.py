"""One request in one slot: what it was given, and how far it has come.

Engines tell their load seconds late, if at all. The gateway knows better what it sent where,
and every token passes through it; so it keeps the account itself, and this is one line of it.
"""

import msgspec

from promptai.fleet.replica import Replica
from promptai.router.estimate.policy import Estimate, PendingWork
from promptai.router.estimate.prefix import Chain
from promptai.wire.llamaserver import Timings

_MOST_CHARS_PER_TOKEN = 7.0


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """
    A request, as far as giving it a replica needs it.

    Attributes:
        model: A model of the fleet.
        prompt: Its prompt, as a chain; ``tokens`` of it, as estimated.
        limit: Most tokens of its answer; ``None``: until it ends.
        answers: How many it asks for, each as long as one.
        key: Whose fair share it takes.
        batch: It may wait behind everybody who waits in person.
        wait_s: The longest that it may be queued.
        longest: Tokens of the longest of its prompts, where it has several; ``None``: of its only one.
        refused: Replicas that failed it already, and until when they are not asked again (the loop's time).
        again: It was accepted before: the queue's bound does not count for it.
        goes_on: A part of its answer has been sent, and only a llama-server can go on from there.
    """

    model: str
    prompt: Chain
    tokens: float
    limit: int | None = None
    answers: int = 1
    key: str = "local"
    batch: bool = False
    wait_s: float = 600.0
    longest: float | None = None
    refused: dict[str, float] = {}
    again: bool = False
    goes_on: bool = False

    @property
    def fewest(self) -> float:
        """Tokens that its prompt surely has; prose has four or five characters a token, and hardly any text has six."""
        return self.prompt.chars / _MOST_CHARS_PER_TOKEN


class LeaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """
    How a request ended on its replica.

    Attributes:
        answer: What its slot's cache holds now: prompt and answer as the next turn will begin; ``None``: unknown.
        timings: The engine's account; ``None`` where it gave none.
        generated: Tokens of all answers; ``None``: the engine does not tell.
        capped: It generated as much as it was allowed to.
        counted: The prompt that the engine counted is the text that was counted here: no pictures, no answer begun.
    """

    answer: Chain | None = None
    timings: Timings | None = None
    generated: int | None = None
    capped: bool = False
    counted: bool = True


class SlotLease:
    """
    A slot for one request; made and ended by ``router.schedule.dispatcher``.

    Attributes:
        slot: The slot that it has in our account.
        cached: Tokens of the prompt that should be in its cache.
        reason: Why this replica.
        queued_s: How long it waited.
        started: The loop's time at which it got the slot.
        first_at: When its first token came; ``None`` before that.
        decodes: What it will still make its replica do once its prompt is computed.
        expected: Tokens that its answer was expected to have.
        charged: Tokens that its key was charged when it got the slot.
        alone: No other request was on its replica at any time; ``broken``: its replica failed it.
        outcome: Set before it is given back; ``None``: it failed or was left.
    """

    def __init__(
        self,
        request: RouteRequest,
        replica: Replica,
        *,
        slot: int,
        cached: float,
        expected: float,
        estimate: Estimate,
        reason: str,
        queued_s: float,
        now: float,
    ) -> None:
        self.request = request
        self.replica = replica
        self.slot = slot
        self.cached = cached
        self.estimate = estimate
        self.reason = reason
        self.queued_s = queued_s
        self.started = now
        self.first_at: float | None = None
        self.generated = 0
        self.alone = True
        self.failed = False
        self.outcome: LeaseResult | None = None
        self.streams_before = 0.0
        self.expected = expected
        self.charged = 0.0
        self._left = max(1.0, request.tokens - cached)
        self._total = self._left
        self._left_at = now
        self.decodes = PendingWork(0.0, self._answer_left())

    def progress(self, processed: int, cached: int, total: int, now: float) -> None:
        """The engine has told how far its prompt is: tokens, those from the cache included."""
        self._left, self._left_at = float(max(0, total - processed)), now
        self._total = float(max(1, total - cached))

    def token(self, now: float) -> None:
        """Some of its answer has come."""
        if self.first_at is None:
            self.first_at = now
        self.generated += 1
        # Worked out here, once a token, and not for all streams of a replica whenever somebody asks for a slot.
        self.decodes = PendingWork(0.0, self._answer_left())

    def prefill_left(self, now: float, prefill_tps: float) -> float:
        """Tokens of the prompt that are still to be computed, as it looks."""
        if self.first_at is not None:
            return 0.0
        return max(0.0, self._left - (now - self._left_at) * prefill_tps)

    def prefill_share(self, now: float, prefill_tps: float) -> float:
        """How much of the prompt's computing is done, 0 to 1."""
        return 1.0 - min(1.0, self.prefill_left(now, prefill_tps) / self._total)

    def work(self, now: float, prefill_tps: float) -> PendingWork:
        """What it will still make its replica do; how long an answer goes on does not depend on how long it has."""
        return PendingWork(self.prefill_left(now, prefill_tps), self.decodes.decode)

    def _answer_left(self) -> float:
        limit = self.request.limit
        return self.expected if limit is None else min(self.expected, max(1.0, limit - self.generated))
