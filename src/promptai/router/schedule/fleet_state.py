"""The gateway's own account of the fleet: slots in use, contents of caches, learned rates, recent failures.

Everything is derived from the requests that the gateway sends and the answers it receives. Load figures scraped from
an engine are seconds old, and decisions based on them send the next ten requests to the same board. So nothing is
scraped; the load that other gateways put on an engine stays invisible.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from promptai.fleet.replica import Replica, Snapshot, State
from promptai.router.estimate.breaker import Breaker, BreakerState
from promptai.router.estimate.cache_index import CacheIndex, Capacity, SlotChoice
from promptai.router.estimate.policy import (
    ASSUMED_PREFILL_TPS,
    ASSUMED_STEP_S,
    PendingWork,
    Placement,
    ReplicaView,
)
from promptai.router.estimate.prefix import Chain
from promptai.router.estimate.rates import RateBook
from promptai.router.estimate.step_curve import StepCurve
from promptai.router.schedule.lease import SlotLease, SlotRequest

#: Assumed time to load a model of unknown size: 1.5 B parameters from an SD card.
_LOAD_S = 30.0
#: Rates for the silence limit of a replica without known rates: an 8 B model on a Pi 4.
_SLOWEST_PREFILL_TPS, _SLOWEST_STEP_S = 2.0, 2.0
#: Prompt cache of an engine that does not report its size: llama-server's default of 8 GiB is as good as unlimited,
#: and ``RateBook.trust`` corrects for what is missing.
_UNLIMITED_TOKENS = 1_000_000
_ASSUMED_CURVE = StepCurve.flat(ASSUMED_STEP_S)
_CLOSED = Breaker()
_RUNNING = {State.READY, State.DRAINING}


class Fleet(Protocol):
    """The part of ``fleet.registry.Registry`` that the router uses."""

    @property
    def snapshot(self) -> Snapshot:
        """All replicas now."""

    def subscribe(self, callback: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call ``callback`` after every change; the returned function unsubscribes it."""

    def wake(self, replica_id: str) -> None:
        """Request that a cold replica is loaded."""

    def touch(self, replica_id: str) -> None:
        """Record that a replica is in use."""

    def forget(self, replica_id: str) -> None:
        """Report that a draining replica has finished its last request."""


class FleetState:
    """
    State of all replicas, as far as the gateway knows it.

    Attributes:
        fleet: Source of the current snapshot.
        book: Learned rates.
        index: Contents of the caches.
        breakers: Breakers of replicas with recent failures.
    """

    def __init__(self, fleet: Fleet, book: RateBook) -> None:
        self.fleet = fleet
        self.book = book
        self.index = CacheIndex()
        self.breakers: dict[str, Breaker] = {}
        self._leases: dict[str, list[SlotLease]] = {}
        self._prefilling: dict[str, list[SlotLease]] = {}
        self._streams: dict[str, _StreamIntegral] = {}
        self._curves: dict[str, tuple[Replica, StepCurve | None]] = {}
        self._last_snapshot = fleet.snapshot

    def running(self, replica_id: str) -> int:
        """Number of requests in a replica's slots."""
        return len(self._leases.get(replica_id, ()))

    def free_slots(self, model: str) -> int:
        """Number of free slots of a model on all its healthy replicas."""
        now = self.now()
        return sum(
            max(0, replica.slots - self.running(replica.id))
            for replica in self.fleet.snapshot.of(model)
            if replica.state is State.READY and self.breaker(replica.id).allows(now)
        )

    def leases(self, replica_id: str) -> tuple[SlotLease, ...]:
        """Leases of a replica's slots."""
        return tuple(self._leases.get(replica_id, ()))

    def breaker(self, replica_id: str) -> Breaker:
        """Breaker of a replica."""
        return self.breakers.get(replica_id, _CLOSED)

    def now(self) -> float:
        """Return the event loop's time."""
        return asyncio.get_running_loop().time()

    # Candidates

    def candidates(self, request: SlotRequest) -> list[Replica]:
        """Replicas that may serve a request now."""
        able = self._able(request)
        # Replicas that failed the request come last, and only after their pause.
        untried = [replica for replica in able if replica.id not in request.avoid_until]
        return untried or [replica for replica in able if request.avoid_until[replica.id] <= self.now()]

    def may_be_served(self, request: SlotRequest) -> bool:
        """Whether a replica can serve a request now, after its pause, or after it recovers."""
        return bool(self._able(request)) or self._may_recover(request)

    def can_resume(self, model: str) -> bool:
        """Whether a replica of the model could continue an answer begun elsewhere, now or later."""
        return any(replica.dialect == "llama-server" for replica in self.fleet.snapshot.of(model))

    def _able(self, request: SlotRequest) -> list[Replica]:
        """Healthy replicas that suit a request, pausing or not."""
        now = self.now()
        able = [
            replica
            for replica in self.fleet.snapshot.of(request.model)
            if replica.usable and self.breaker(replica.id).allows(now) and can_serve(replica, request)
        ]
        # The prompt's length is an estimate, so a replica that may be too small is used when no other is left.
        return [replica for replica in able if _likely_fits(replica, request)] or able

    def _may_recover(self, request: SlotRequest) -> bool:
        """Whether a suitable replica may come back: a draining one turns cold and can be woken; a trial may succeed."""
        now = self.now()
        return any(
            (replica.state is State.DRAINING and not replica.leaving)
            or (replica.usable and self.breaker(replica.id).state(now) is BreakerState.TRIAL)
            for replica in self.fleet.snapshot.of(request.model)
            if can_serve(replica, request)
        )

    # Estimates

    def view(
        self, replica: Replica, request: SlotRequest, reserved: Mapping[str, Sequence[PendingWork]]
    ) -> ReplicaView:
        """Return a replica as ``request`` sees it; ``reserved``: earlier queued requests by replica."""
        now = self.now()
        leases = self._leases.get(replica.id, [])
        prefill = self.book.prefill_tps(replica) or ASSUMED_PREFILL_TPS
        busy = {lease.slot for lease in leases}
        found = self.index.best_slot(replica.id, self._capacity(replica), request.prompt, busy=busy, now=now)
        per_char = request.prompt_tokens / max(1, request.prompt.chars)
        trust = self.book.trust(replica.id)
        prompts = _prompts(request, leases)
        return ReplicaView(
            replica=replica,
            running=tuple(
                [
                    lease.pending_decode if lease.first_token_at is not None else lease.pending_work(now, prefill)
                    for lease in leases
                ]
            ),
            reserved=tuple(reserved.get(replica.id, ())),
            prefill_tps=prefill,
            step_curve=self._curve(replica) or _ASSUMED_CURVE,
            slot=found.slot,
            cached_tokens=trust * self._cached_chars(replica, found, request) * per_char,
            evicted_tokens=trust * found.evicted_chars * per_char,
            expected_returns=trust * self.index.expected_returns(replica.id, busy=busy, current=prompts, now=now),
            mean_gap_s=self.index.reuse.mean_gap_s,
            ready_in_s=_ready_in_s(replica),
        )

    def expected_answer_tokens(self, request: SlotRequest) -> float:
        """Expected length of one answer: the model's mean, within the request's limit."""
        mean = self.book.answer_tokens(request.model)
        return mean if request.max_tokens is None else min(mean, float(max(1, request.max_tokens)))

    def silence_limit_s(self, lease: SlotLease, floor_s: float) -> float:
        """
        Longest silence of a replica that its pending work can explain; a longer one counts as a failure.

        Allows four times the estimated prefill of all prompts there: boards throttle, and the prefill of one request
        stalls the streams of all others.
        """
        replica = lease.replica
        curve = self._curve(replica)
        limit = floor_s + 20.0 * (curve.longest(replica.slots) if curve is not None else _SLOWEST_STEP_S)
        prefilling = self._prefilling.get(replica.id)
        if prefilling:
            prefill, now = self.book.prefill_tps(replica) or _SLOWEST_PREFILL_TPS, self.now()
            limit += 4.0 * sum(other.prefill_tokens_left(now, 0.0) for other in prefilling) / prefill
        return limit

    def _cached_chars(self, replica: Replica, found: SlotChoice, request: SlotRequest) -> int:
        """Characters cached once a slot is free: without a free slot, prompts that are being answered count, too."""
        if found.slot is not None:
            return found.cached_chars
        shared = [request.prompt.shared(lease.request.prompt) for lease in self._leases.get(replica.id, ())]
        return max(found.cached_chars, *shared, 0)

    def _curve(self, replica: Replica) -> StepCurve | None:
        """Return the step curve, cached between answers because every request needs it; ``None`` if unknown."""
        known = self._curves.get(replica.id)
        if known is None or known[0] is not replica:
            known = self._curves[replica.id] = (replica, self.book.decode_steps(replica))
        return known[1]

    def _capacity(self, replica: Replica) -> Capacity:
        tokens = _UNLIMITED_TOKENS if replica.host_cache_tokens is None else replica.host_cache_tokens
        return Capacity(replica.slots, tokens * self.book.chars_per_token(replica.model))

    # Life of a lease

    def open_lease(self, request: SlotRequest, placement: Placement, *, since: float) -> SlotLease:
        """Give a request the slot of its placement; ``since``: when it entered the queue."""
        now = self.now()
        replica = placement.view.replica
        self.index.reuse.asked(request.prompt, now)
        lease = SlotLease(
            request,
            replica,
            slot=placement.view.slot or 0,
            cached_tokens=min(placement.view.cached_tokens, max(0.0, request.prompt_tokens - 1)),
            expected_answer_tokens=self.expected_answer_tokens(request),
            estimate=placement.estimate,
            reason=placement.reason,
            queued_s=now - since,
            now=now,
        )
        others = self._leases.setdefault(replica.id, [])
        lease.alone = not others
        for other in others:
            other.alone = False
        others.append(lease)
        self._prefilling.setdefault(replica.id, []).append(lease)
        self.fleet.touch(replica.id)
        breaker = self.breaker(replica.id)
        if breaker.state(now) is BreakerState.TRIAL:
            self.breakers[replica.id] = breaker.took_trial(now)
        return lease

    def record_token(self, lease: SlotLease, now: float) -> None:
        """Record a chunk of an answer."""
        if lease.first_token_at is None:
            integral = self._integral(lease.replica.id)
            integral.add(1, now)
            lease.stream_seconds_before = integral.at(now)
            self._end_prefill(lease)
            if self.breaker(lease.replica.id).state(now) is BreakerState.TRIAL:
                self.breakers.pop(lease.replica.id)  # the trial succeeded; no need to wait for the answer's end
        lease.record_token(now)

    def record_failure(self, lease: SlotLease, *, weight: int = 1) -> None:
        """Record that a replica failed a request; a weight of ``FAILURE_LIMIT`` opens its breaker."""
        lease.failed = True
        before = self.breaker(lease.replica.id)
        self.breakers[lease.replica.id] = before.failed(self.now(), weight=weight, sent_at=lease.started_at)

    def close_lease(self, lease: SlotLease) -> None:
        """Take the slot back and learn from the lease's ``result``."""
        now, replica_id = self.now(), lease.replica.id
        leases = self._leases.get(replica_id, [])
        leases.remove(lease)
        self.fleet.touch(replica_id)
        if not leases:
            del self._leases[replica_id]
        integral = self._integral(replica_id)
        if lease.first_token_at is None:
            self._end_prefill(lease)
        else:
            integral.add(-1, now)
        self._learn(lease, integral.at(now), now)
        if not leases and self.fleet.snapshot.find(replica_id) is None:
            self._forget(replica_id)

    def _learn(self, lease: SlotLease, stream_seconds: float, now: float) -> None:
        result, replica_id = lease.result, lease.replica.id
        if result is None:
            self._learn_unfinished(lease, now)
            return
        self.breakers.pop(replica_id, None)
        if lease.request.answers > 1:  # the account has one slot, the engine used several unknown ones
            self.index.drop(replica_id, lease.slot)
        if result.conversation is not None:
            self.index.store(replica_id, self._capacity(lease.replica), lease.slot, result.conversation, now)
            self.index.reuse.answered(result.conversation, now)
        if result.timings is None:
            return
        span = now - lease.first_token_at if lease.first_token_at is not None else 0.0
        self.book.observe(
            replica_id,
            model=lease.request.model,
            timings=result.timings,
            predicted_cached=round(lease.cached_tokens),
            mean_streams=(stream_seconds - lease.stream_seconds_before) / span if span > 0 else 1.0,
            alone=lease.alone,
            prompt_chars=lease.request.prompt.chars if result.prompt_comparable else 0,
            capped=result.capped,
        )
        self._curves.pop(replica_id, None)

    def _learn_unfinished(self, lease: SlotLease, now: float) -> None:
        replica_id = lease.replica.id
        if lease.first_token_at is not None and not lease.failed:  # the client disconnected: the prompt is cached
            self.index.store(replica_id, self._capacity(lease.replica), lease.slot, lease.request.prompt, now)
        else:
            self.index.drop(replica_id, lease.slot)
        if replica_id in self.breakers and not lease.failed:
            self.breakers[replica_id] = self.breakers[replica_id].released_trial(sent_at=lease.started_at)

    def _end_prefill(self, lease: SlotLease) -> None:
        prefilling = self._prefilling[lease.replica.id]
        prefilling.remove(lease)
        if not prefilling:
            del self._prefilling[lease.replica.id]

    def _integral(self, replica_id: str) -> "_StreamIntegral":
        return self._streams.setdefault(replica_id, _StreamIntegral())

    # Changes of the fleet

    def sync_with_fleet(self) -> None:
        """Apply a new snapshot: a replica that is gone, or came back as another process, has empty caches."""
        before = self._last_snapshot
        self._last_snapshot = self.fleet.snapshot
        for old in before.replicas:
            new = self._last_snapshot.find(old.id)
            if new is None:
                self._forget(old.id)
            elif (old.state in _RUNNING and new.state not in _RUNNING) or (old.model and new.model != old.model):
                self.index.drop(old.id)
            elif new.state is State.READY and old.state is not State.READY:
                self.breakers.pop(old.id, None)  # it answers again, so its cooldown need not end first

    def release_drained(self) -> None:
        """Release draining replicas that have no requests left."""
        for replica in self.fleet.snapshot.replicas:
            if replica.state is State.DRAINING and not self.running(replica.id):
                self.fleet.forget(replica.id)

    def _forget(self, replica_id: str) -> None:
        """Drop the state of a removed replica, since in a cluster names come and go; running requests keep theirs."""
        self.index.drop(replica_id)
        self._curves.pop(replica_id, None)
        if replica_id not in self._leases:
            self.breakers.pop(replica_id, None)
            self._streams.pop(replica_id, None)


class _StreamIntegral:
    """Number of streams integrated over time, which gives their mean over any span."""

    def __init__(self) -> None:
        self._streams = 0
        self._sum = 0.0
        self._since = 0.0

    def add(self, streams: int, now: float) -> None:
        """Change the number of streams from ``now`` on."""
        self._sum, self._since = self.at(now), now
        self._streams += streams

    def at(self, now: float) -> float:
        """Stream seconds until ``now``."""
        return self._sum + self._streams * (now - self._since)


def may_fit(replica: Replica, request: SlotRequest) -> bool:
    """Whether a replica's context may hold a request's prompt, by the lower bound of its tokens."""
    return replica.context is None or request.min_prompt_tokens < replica.context


def can_serve(replica: Replica, request: SlotRequest) -> bool:
    """Whether a healthy replica could serve a request, by its context and dialect."""
    return may_fit(replica, request) and (replica.dialect == "llama-server" or not request.resuming)


def _likely_fits(replica: Replica, request: SlotRequest) -> bool:
    return replica.context is None or (request.longest_prompt_tokens or request.prompt_tokens) < replica.context


def _prompts(request: SlotRequest, leases: Iterable[SlotLease]) -> Iterator[Chain]:
    yield request.prompt
    for lease in leases:
        yield lease.request.prompt


def _ready_in_s(replica: Replica) -> float:
    if replica.state is State.READY:
        return 0.0
    load_s = _LOAD_S if replica.load_s is None else replica.load_s
    return load_s * (1.0 - (replica.progress or 0.0))
