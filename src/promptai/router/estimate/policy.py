"""Choose the replica that costs a prompt the fewest seconds, even if the prompt has to wait for it.

On a board prefill is the scarce resource: a follow-up question of thirty tokens takes seconds where the KV cache
holds its conversation, and minutes elsewhere. But a replica with many cached conversations also attracts many
requests. Counting streams cannot weigh the two, so every term is estimated in seconds and the cheapest replica wins:

    wait for a slot + (queued prompt tokens + uncached prompt tokens of this request) / prefill rate
    + interference with the streams on the replica, and with conversations that return meanwhile
    + recomputing cached prompts that this one evicts

A replica without a free slot may still be the cheapest. The prompt then waits for it, even while another replica is
idle, as long as waiting costs less than computing the whole prompt again.

The caller filters (usable, breaker closed, not refused); this module scores and picks. Pure.
"""

import heapq
import math
from collections.abc import Sequence
from typing import Protocol

import msgspec

from promptai.fleet.replica import Replica, State
from promptai.router.estimate.prefix import rendezvous
from promptai.router.estimate.step_curve import StepCurve

#: Rates of a replica that has none yet: a 1.5 B model on a Pi 5. Only their ratio to other replicas matters.
ASSUMED_PREFILL_TPS, ASSUMED_STEP_S = 60.0, 0.1
#: Costs closer than this count as equal, and the conversation's hash decides: gateways need not agree on noise.
_TIE = 0.05
_TIE_S = 0.02
#: Weight of a second in which running streams stall during a prefill, relative to a second of TTFT. At 1 (idle
#: boards) and at 0.25 (saturated boards) p95 TTFT was up to 1.2 times as long (benchmarks/routing.py).
_STALL_WEIGHT = 0.5
#: Weight of a second by which one more stream slows the others. Nearly 0: a conversation that moves elsewhere slows
#: the streams there, now and on every later turn. At 0.5 one conversation in twelve left its cache for this term.
_SLOWDOWN_WEIGHT = 0.05


class PendingWork(msgspec.Struct, frozen=True):
    """
    Work that one request still causes on its replica, in tokens.

    Attributes:
        prefill: Prompt tokens to compute.
        decode: Expected tokens to generate.
    """

    prefill: float
    decode: float


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """
    One replica from the point of view of one prompt.

    Attributes:
        running: Requests in its slots.
        reserved: Queued requests that go there before this prompt, in queue order.
        prefill_tps: Prompt tokens a second.
        step_curve: Seconds per token by number of streams.
        slot: Slot for this prompt; ``None`` if no slot is free or the engine chooses.
        cached_tokens: Tokens of this prompt in the replica's cache.
        evicted_tokens: Tokens of other conversations that this prompt evicts, weighted by the probability of their
            return.
        expected_returns: Expected number of cached conversations that will continue, ``mean_gap_s`` from now on
            average.
        ready_in_s: Seconds until a cold or loading replica can start.
    """

    replica: Replica
    running: tuple[PendingWork, ...] = ()
    reserved: tuple[PendingWork, ...] = ()
    prefill_tps: float = ASSUMED_PREFILL_TPS
    step_curve: StepCurve = StepCurve.flat(ASSUMED_STEP_S)
    slot: int | None = None
    cached_tokens: float = 0.0
    evicted_tokens: float = 0.0
    expected_returns: float = 0.0
    mean_gap_s: float = 60.0
    ready_in_s: float = 0.0

    @property
    def has_free_slot(self) -> bool:
        """Whether a slot is free now."""
        return self.replica.state is State.READY and len(self.running) < self.replica.slots

    def step_s(self, streams: int) -> float:
        """Seconds per token while ``streams`` streams decode."""
        return self.step_curve.longest(streams)

    def duration_s(self, work: PendingWork) -> float:
        """Seconds that a request takes while all slots are busy."""
        return work.prefill / self.prefill_tps + work.decode * self.step_s(self.replica.slots)


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """
    A prompt that needs a replica.

    Attributes:
        prompt_tokens: Estimated length of the prompt.
        answer_tokens: Expected length of the answer.
        conversation: Identifies the conversation (``Chain.head``).
    """

    prompt_tokens: float
    answer_tokens: float
    conversation: int


class Estimate(msgspec.Struct, frozen=True):
    """
    Seconds that a prompt costs on one replica.

    Attributes:
        wait_s: Until the replica is loaded and has a free slot.
        prefill_s: From then to the first token.
        interference_s: Weighted delay of running streams and of conversations that return meanwhile.
        eviction_s: Expected recomputing of the cached prompts that this one evicts.
    """

    wait_s: float
    prefill_s: float
    interference_s: float
    eviction_s: float

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token."""
        return self.wait_s + self.prefill_s

    @property
    def cost_s(self) -> float:
        """Sum of all terms."""
        return self.ttft_s + self.interference_s + self.eviction_s


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """
    The replica chosen for a prompt.

    Attributes:
        immediate: A slot is free; otherwise the prompt waits for this replica.
        reason: One line for people and for the response headers.
    """

    view: ReplicaView
    immediate: bool
    estimate: Estimate
    reason: str


class Strategy(Protocol):
    """Chooses among replicas; ``name`` is its name in the settings."""

    name: str

    def choose(self, demand: Demand, views: Sequence[ReplicaView]) -> Placement | None:
        """Return the best replica for ``demand``, or ``None`` if none is usable. Changes no state."""

    def placed(self, replica_id: str) -> None:
        """Take note that a request was sent to the chosen replica."""


def free_in_s(view: ReplicaView) -> float:
    """Seconds until the replica has a slot for one more request, after the queued requests ahead of it."""
    if view.has_free_slot and len(view.running) + len(view.reserved) < view.replica.slots:
        return 0.0
    ends = [view.ready_in_s] * (view.replica.slots - len(view.running))
    backlog = 0.0
    for work in view.running:
        backlog += work.prefill  # an engine computes one prompt after another
        ends.append(view.ready_in_s + backlog / view.prefill_tps + work.decode * view.step_s(len(view.running)))
    heapq.heapify(ends)
    for work in view.reserved:
        heapq.heappush(ends, heapq.heappop(ends) + view.duration_s(work))
    return ends[0]


def estimate(demand: Demand, view: ReplicaView) -> Estimate:
    """Estimate the cost of ``demand`` on this replica."""
    wait = free_in_s(view)
    uncached = max(1.0, demand.prompt_tokens - view.cached_tokens)
    compute, step = uncached / view.prefill_tps, view.step_s(1)
    still_running: Sequence[PendingWork] = view.running
    if wait > 0:
        still_running = [work for work in view.running if work.prefill / view.prefill_tps + work.decode * step > wait]
    queued_prefill = stalled_s = shared_tokens = 0.0
    for work in still_running:  # one loop: a server with two hundred streams is estimated for each request
        queued_prefill += work.prefill
        seconds = work.decode * step
        stalled_s += min(compute, seconds)
        shared_tokens += min(demand.answer_tokens, work.decode)
    backlog = max(0.0, queued_prefill - wait * view.prefill_tps)
    # Running streams stall while this prompt is computed, and decode more slowly beside one more stream.
    streams = len(still_running)
    slowed_s = shared_tokens * (view.step_s(streams + 1) - view.step_s(streams))
    # A conversation that returns during the prefill waits for the rest of it: half of it on average.
    delayed_returns_s = view.expected_returns * (1.0 - math.exp(-compute / view.mean_gap_s)) * compute / 2
    interference = _STALL_WEIGHT * stalled_s + _SLOWDOWN_WEIGHT * slowed_s + delayed_returns_s
    return Estimate(wait, backlog / view.prefill_tps + compute, interference, view.evicted_tokens / view.prefill_tps)


class Affinity:
    """Lowest cost in seconds, caches included; near ties are broken by the conversation's hash."""

    name = "affinity"

    def choose(self, demand: Demand, views: Sequence[ReplicaView]) -> Placement | None:
        """Return the cheapest replica, which may have no free slot."""
        scored = [(estimate(demand, view), view) for view in views if view.replica.usable]
        if not scored:
            return None
        least = min(found.cost_s for found, _ in scored)
        near = {view.replica.id: (found, view) for found, view in scored if found.cost_s <= least * (1 + _TIE) + _TIE_S}
        found, view = near[rendezvous(demand.conversation, list(near))]
        immediate = found.wait_s == 0 and view.has_free_slot
        return Placement(view=view, immediate=immediate, estimate=found, reason=_reason(demand, view, found))

    def placed(self, replica_id: str) -> None:
        """Do nothing: the strategy has no state."""


class LeastBusy:
    """Fewest streams per slot, regardless of caches; the strategy of most proxies."""

    name = "least-busy"

    def choose(self, demand: Demand, views: Sequence[ReplicaView]) -> Placement | None:
        """Return the replica with the lowest load, with or without a free slot."""
        usable = [view for view in views if view.replica.usable]
        if not usable:
            return None
        by_id = {view.replica.id: view for view in usable}
        least = min(_occupancy(view) for view in usable)
        idlest = [replica_id for replica_id, view in by_id.items() if _occupancy(view) == least]
        view = by_id[rendezvous(demand.conversation, idlest)]
        return _placement(demand, view, f"least busy: {len(view.running)} of {view.replica.slots} slots")

    def placed(self, replica_id: str) -> None:
        """Do nothing: the strategy has no state."""


class RoundRobin:
    """The next replica in turn that has a free slot."""

    name = "round-robin"

    def __init__(self) -> None:
        self._last = ""

    def choose(self, demand: Demand, views: Sequence[ReplicaView]) -> Placement | None:
        """Return the next replica in the order of their ids."""
        usable = sorted((view for view in views if view.replica.usable), key=lambda view: view.replica.id)
        if not usable:
            return None
        after = [view for view in usable if view.replica.id > self._last]
        in_turn = after + [view for view in usable if view not in after]
        view = next((view for view in in_turn if view.has_free_slot), in_turn[0])
        return _placement(demand, view, "next in turn")

    def placed(self, replica_id: str) -> None:
        """Continue after this replica."""
        self._last = replica_id


STRATEGIES: dict[str, type[Affinity] | type[LeastBusy] | type[RoundRobin]] = {
    kind.name: kind for kind in (Affinity, LeastBusy, RoundRobin)
}


def _occupancy(view: ReplicaView) -> float:
    return (len(view.running) + len(view.reserved)) / view.replica.slots + view.ready_in_s


def _placement(demand: Demand, view: ReplicaView, reason: str) -> Placement:
    immediate = view.has_free_slot and not view.reserved
    return Placement(view=view, immediate=immediate, estimate=estimate(demand, view), reason=reason)


def _reason(demand: Demand, view: ReplicaView, found: Estimate) -> str:
    cached = (
        f"{view.cached_tokens:.0f} of {demand.prompt_tokens:.0f} prompt tokens cached"
        if view.cached_tokens
        else "prompt not cached"
    )
    wait = f", {found.wait_s:.1f} s of it in the queue" if found.wait_s else ""
    return f"lowest cost: first token in {found.ttft_s:.1f} s{wait}, {cached}"
