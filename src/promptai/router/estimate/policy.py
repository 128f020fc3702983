"""Which replica a prompt goes to, and whether it waits for it.

On a board the scarce thing is prefill: a follow-up of thirty tokens is answered in seconds
where the conversation's cache lies, and in minutes anywhere else. But a replica that holds many
caches is also where everybody wants to go. So nothing is counted here and everything is
estimated in seconds, and the cheapest replica wins:

    wait for a slot + prompt tokens that are computed before ours, and ours / prefill rate
    + what ours costs the streams that run there, and whoever comes back there meanwhile
    + what it overwrites, if that comes back

A replica whose slots are all taken may still be the cheapest: then the prompt waits for it
although another one is idle, as long as waiting costs less than computing it all again.

Filter (usable, not refused, breaker closed) is the caller's; here are Scorer and Picker. Pure.
"""

import heapq
import math
from collections.abc import Sequence
from typing import Protocol

import msgspec

from promptai.fleet.replica import Replica, State
from promptai.router.estimate.prefix import rendezvous
from promptai.router.estimate.step_curve import StepCurve

#: Rates of a replica that nobody knows anything of: a 1.5 B model on a Pi 5. Only their ratio to others matters.
ASSUMED_PREFILL_TPS, ASSUMED_STEP_S = 60.0, 0.1
#: Estimates closer than this are equal, and the conversation's hash decides: gateways need not agree on noise.
_TIE = 0.05
_TIE_S = 0.02
#: A second that streams stand still because a prompt is computed weighs half of one that somebody waits for a first
#: token. With 1 (idle boards) and with 0.25 (saturated ones) p95 was up to 1.2 times as long (benchmarks/routing.py).
_STALL = 0.5
#: A second by which streams are slower beside one more weighs next to nothing: whoever goes elsewhere slows those who
#: are there, now and with every later question. With 0.5, one conversation in twelve left its cache for the sake of it.
_SLOWER = 0.05


class PendingWork(msgspec.Struct, frozen=True):
    """
    What one request still makes its replica do, in tokens.

    Attributes:
        prefill: Prompt tokens to compute.
        decode: Tokens that are expected to be generated.
    """

    prefill: float
    decode: float


class ReplicaView(msgspec.Struct, frozen=True, kw_only=True):
    """
    One replica as one prompt sees it.

    Attributes:
        running: Requests in its slots.
        reserved: Requests that wait for it, in their order, before this prompt.
        prefill_tps: Prompt tokens a second.
        steps: Seconds a token by number of streams.
        slot: The slot that the prompt would get; ``None`` where none is free or the replica chooses itself.
        cached: Tokens of the prompt that are in its cache.
        lost: Tokens of others' caches that would be missed.
        awaited: Conversations in its caches that will go on, as it looks; ``gap_s`` from now on average.
        ready_in_s: Seconds until it can begin: it is cold, or loads.
    """

    replica: Replica
    running: tuple[PendingWork, ...] = ()
    reserved: tuple[PendingWork, ...] = ()
    prefill_tps: float = ASSUMED_PREFILL_TPS
    step_curve: StepCurve = StepCurve.flat(ASSUMED_STEP_S)
    slot: int | None = None
    cached_tokens: float = 0.0
    evicted: float = 0.0
    expected_returns: float = 0.0
    mean_gap_s: float = 60.0
    ready_in_s: float = 0.0

    @property
    def free(self) -> bool:
        """Whether a slot is free right now."""
        return self.replica.state is State.READY and len(self.running) < self.replica.slots

    def step(self, streams: int) -> float:
        """Seconds a token when so many streams decode."""
        return self.step_curve.longest(streams)

    def duration_s(self, work: PendingWork) -> float:
        """Seconds that a request takes among as many as there are slots."""
        return work.prefill / self.prefill_tps + work.decode * self.step(self.replica.slots)


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """
    A prompt that wants a replica.

    Attributes:
        tokens: Of its prompt.
        expected: Tokens that will be generated.
        head: What stands for its conversation (``Chain.head``).
    """

    tokens: float
    expected: float
    head: int


class Estimate(msgspec.Struct, frozen=True):
    """
    Seconds that a prompt costs on one replica.

    Attributes:
        wait_s: Until a slot is free, and the replica loaded.
        prefill_s: From then until its first token.
        harm_s: What others lose by it: the streams that run there, by weight, and who comes back meanwhile.
        lost_s: What will be computed again because its cache was overwritten.
    """

    wait_s: float
    prefill_s: float
    interference_s: float
    eviction_s: float

    @property
    def ttft_s(self) -> float:
        """Seconds to its first token."""
        return self.wait_s + self.prefill_s

    @property
    def cost_s(self) -> float:
        """All of it."""
        return self.ttft_s + self.interference_s + self.eviction_s


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """
    Where a prompt goes.

    Attributes:
        now: It has a slot; otherwise it waits for this replica.
        reason: One line, for people and for the answer's headers.
    """

    view: ReplicaView
    now: bool
    estimate: Estimate
    reason: str


class Strategy(Protocol):
    """Chooses among replicas; ``name`` is what settings call it."""

    name: str

    def choose(self, demand: Demand, views: Sequence[ReplicaView]) -> Placement | None:
        """The replica for ``demand``; ``None`` where there is none that it could even wait for. Changes nothing."""

    def took(self, replica_id: str) -> None:
        """A choice was carried out."""


def free_in_s(view: ReplicaView) -> float:
    """Seconds until a slot of this replica is free for one more, those that wait before it included."""
    if view.free and len(view.running) + len(view.reserved) < view.replica.slots:
        return 0.0
    ends = [view.ready_in_s] * (view.replica.slots - len(view.running))
    backlog = 0.0
    for work in view.running:
        backlog += work.prefill  # prompts are computed one after another
        ends.append(view.ready_in_s + backlog / view.prefill_tps + work.decode * view.step(len(view.running)))
    heapq.heapify(ends)
    for work in view.reserved:
        heapq.heappush(ends, heapq.heappop(ends) + view.duration_s(work))
    return ends[0]


def estimate(demand: Demand, view: ReplicaView) -> Estimate:
    """What ``demand`` costs on this replica."""
    wait = free_in_s(view)
    uncached = max(1.0, demand.tokens - view.cached_tokens)
    compute, step = uncached / view.prefill_tps, view.step(1)
    still: Sequence[PendingWork] = view.running
    if wait > 0:
        still = [work for work in still if work.prefill / view.prefill_tps + work.decode * step > wait]
    before = stall = beside = 0.0
    for work in still:  # written out: a server that has two hundred streams is asked about each of them
        before += work.prefill
        seconds = work.decode * step
        stall += min(compute, seconds)
        beside += min(demand.expected, work.decode)
    backlog = max(0.0, before - wait * view.prefill_tps)
    # Who decodes there stands still while our prompt is computed, and is slower beside one more stream.
    crowd = beside * (view.step(len(still) + 1) - view.step(len(still)))
    # Who comes back while it is computed waits for the rest of it; on average that is half.
    late = view.expected_returns * (1.0 - math.exp(-compute / view.mean_gap_s)) * compute / 2
    harm = _STALL * stall + _SLOWER * crowd + late
    return Estimate(wait, backlog / view.prefill_tps + compute, harm, view.evicted / view.prefill_tps)


class Affinity:
    """The least seconds, caches included; equal ones by the conversation's hash."""

    name = "affinity"

    def choose(self, demand: Demand, views: Sequence[ReplicaView]) -> Placement | None:
        """The cheapest replica; it may be one that has no slot right now."""
        scored = [(estimate(demand, view), view) for view in views if view.replica.usable]
        if not scored:
            return None
        least = min(found.cost_s for found, _ in scored)
        near = {view.replica.id: (found, view) for found, view in scored if found.cost_s <= least * (1 + _TIE) + _TIE_S}
        found, view = near[rendezvous(demand.head, list(near))]
        return Placement(
            view=view, now=found.wait_s == 0 and view.free, estimate=found, reason=_why(demand, view, found)
        )

    def took(self, replica_id: str) -> None:
        """Nothing to remember."""


class LeastBusy:
    """The fewest streams for its slots, whatever the caches hold; as most proxies do it."""

    name = "least-busy"

    def choose(self, demand: Demand, views: Sequence[ReplicaView]) -> Placement | None:
        """The idlest replica with a free slot; the idlest of all where none has one."""
        usable = [view for view in views if view.replica.usable]
        if not usable:
            return None
        ids = {view.replica.id: view for view in usable}
        least = min(_busy(view) for view in usable)
        view = ids[rendezvous(demand.head, [name for name, view in ids.items() if _busy(view) == least])]
        return _taken(demand, view, f"least busy: {len(view.running)} of {view.replica.slots} slots")

    def took(self, replica_id: str) -> None:
        """Nothing to remember."""


class RoundRobin:
    """One after another, whoever is next and has a free slot."""

    name = "round-robin"

    def __init__(self) -> None:
        self._last = ""

    def choose(self, demand: Demand, views: Sequence[ReplicaView]) -> Placement | None:
        """The next replica in the order of their ids."""
        usable = sorted((view for view in views if view.replica.usable), key=lambda view: view.replica.id)
        if not usable:
            return None
        after = [view for view in usable if view.replica.id > self._last]
        order = after + [view for view in usable if view not in after]
        view = next((view for view in order if view.free), order[0])
        return _taken(demand, view, "next in turn")

    def took(self, replica_id: str) -> None:
        """Go on behind it."""
        self._last = replica_id


STRATEGIES: dict[str, type[Affinity] | type[LeastBusy] | type[RoundRobin]] = {
    kind.name: kind for kind in (Affinity, LeastBusy, RoundRobin)
}


def _busy(view: ReplicaView) -> float:
    return (len(view.running) + len(view.reserved)) / view.replica.slots + view.ready_in_s


def _taken(demand: Demand, view: ReplicaView, reason: str) -> Placement:
    return Placement(view=view, now=view.free and not view.reserved, estimate=estimate(demand, view), reason=reason)


def _why(demand: Demand, view: ReplicaView, found: Estimate) -> str:
    known = (
        f"{view.cached_tokens:.0f} of {demand.tokens:.0f} prompt tokens cached"
        if view.cached_tokens
        else "nothing of it cached"
    )
    waits = f", waits {found.wait_s:.1f} s" if found.wait_s else ""
    return f"least seconds: first token in {found.ttft_s:.1f} s{waits}, {known}"
