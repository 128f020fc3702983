"""What the gateway knows of each replica: who is in its slots, what its caches hold, how it has fared.

Everything here is learned from what the gateway sent and what came back. What an engine says of
its own load is seconds old, and a decision made on it sends the next ten requests to the same
board; so nothing is scraped.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from promptai.fleet.replica import Replica, Snapshot, State
from promptai.router.estimate.breaker import Breaker, BreakerState
from promptai.router.estimate.cache_index import CacheIndex, Capacity, SlotChoice
from promptai.router.estimate.policy import ASSUMED_PREFILL_TPS, ASSUMED_STEP_S, PendingWork, Placement, ReplicaView
from promptai.router.estimate.prefix import Chain
from promptai.router.estimate.rates import RateBook
from promptai.router.estimate.step_curve import StepCurve
from promptai.router.schedule.lease import RouteRequest, SlotLease

#: Loading takes so long where nobody knows: a 1.5 B model from an SD card.
_LOAD_S = 30.0
#: For patience with a replica that nobody knows anything of: an 8 B model on a Pi 4.
_SLOWEST_PREFILL_TPS, _SLOWEST_STEP_S = 2.0, 2.0
#: llama-server's own default of 8 GiB is as good as all; what is missing there all the same, ``trust`` notices.
_MUCH_TOKENS = 1_000_000
_ASSUMED_STEPS = StepCurve.flat(ASSUMED_STEP_S)
_CLOSED = Breaker()
_RUNNING = {State.READY, State.DRAINING}


class Fleet(Protocol):
    """What of the registry is needed here."""

    @property
    def snapshot(self) -> Snapshot:
        """All replicas now."""

    def subscribe(self, callback: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call back after every change; returns what ends that."""

    def wake(self, replica_id: str) -> None:
        """A cold replica is wanted."""

    def touch(self, replica_id: str) -> None:
        """A replica is used."""

    def forget(self, replica_id: str) -> None:
        """A replica that drains has nothing left to do."""


class FleetState:
    """
    The gateway's account of its fleet.

    Attributes:
        book: What has been learned of rates.
        index: What the caches hold.
        breakers: Of replicas that have failed lately.
    """

    def __init__(self, fleet: Fleet, book: RateBook) -> None:
        self.fleet = fleet
        self.book = book
        self.index = CacheIndex()
        self.breakers: dict[str, Breaker] = {}
        self._leases: dict[str, list[SlotLease]] = {}
        self._prefilling: dict[str, list[SlotLease]] = {}
        self._streams: dict[str, _Integral] = {}
        self._steps: dict[str, tuple[Replica, StepCurve | None]] = {}
        self._known = fleet.snapshot

    def running(self, replica_id: str) -> int:
        """Requests that a replica is working on."""
        return len(self._leases.get(replica_id, ()))

    def free(self, model: str) -> int:
        """Slots of a model that are free, on whichever replica."""
        now = self.now()
        return sum(
            max(0, replica.slots - self.running(replica.id))
            for replica in self.fleet.snapshot.of(model)
            if replica.state is State.READY and self.breaker(replica.id).allows(now)
        )

    def leases(self, replica_id: str) -> tuple[SlotLease, ...]:
        """Who is in a replica's slots."""
        return tuple(self._leases.get(replica_id, ()))

    def failed(self, lease: SlotLease, *, weight: int = 1) -> None:
        """A replica has failed a request; ``weight`` 3 takes it out at once."""
        lease.failed = True
        before = self.breaker(lease.replica.id)
        self.breakers[lease.replica.id] = before.failed(self.now(), weight=weight, sent_at=lease.started)

    def token(self, lease: SlotLease, now: float) -> None:
        """Some of an answer has come."""
        if lease.first_at is None:
            integral = self._integral(lease.replica.id)
            integral.add(1, now)
            lease.streams_before = integral.at(now)
            self._read(lease)
            if self.breaker(lease.replica.id).state(now) is BreakerState.TRIAL:
                self.breakers.pop(lease.replica.id)  # it works; nobody need wait until this answer has ended
        lease.token(now)

    def candidates(self, request: RouteRequest) -> list[Replica]:
        """Replicas that a request may be planned for now."""
        able = self._able(request)
        # Who has failed it is only asked again when nobody else is left, and not at once.
        others = [replica for replica in able if replica.id not in request.refused]
        return others or [replica for replica in able if request.refused[replica.id] <= self.now()]

    def _able(self, request: RouteRequest) -> list[Replica]:
        """Replicas that could take a request, whether or not it pauses."""
        now = self.now()
        able = [
            replica
            for replica in self.fleet.snapshot.of(request.model)
            if replica.usable and self.breaker(replica.id).allows(now) and suits(replica, request)
        ]
        # Its length is an estimate: who holds only what it has at least is asked when nobody else is there.
        return [replica for replica in able if _likely_holds(replica, request)] or able

    def hope(self, request: RouteRequest) -> bool:
        """Whether some replica can take this request: now, once it has paused, or when one is back."""
        return bool(self._able(request)) or self.comes_back(request)

    def can_go_on(self, model: str) -> bool:
        """Whether an answer that was begun elsewhere could be continued by a replica of a model, now or later."""
        return any(replica.dialect == "llama-server" for replica in self.fleet.snapshot.of(model))

    def comes_back(self, request: RouteRequest) -> bool:
        """
        Whether a replica that suits a request may soon take requests again.

        One that drains makes room, and will be cold then, and can be woken; one on trial shows what it is worth.
        """
        now = self.now()
        return any(
            (replica.state is State.DRAINING and not replica.leaving)
            or (replica.usable and self.breaker(replica.id).state(now) is BreakerState.TRIAL)
            for replica in self.fleet.snapshot.of(request.model)
            if suits(replica, request)
        )

    def forget_idle(self) -> None:
        """Replicas that are being removed go as soon as they have answered."""
        for replica in self.fleet.snapshot.replicas:
            if replica.state is State.DRAINING and not self.running(replica.id):
                self.fleet.forget(replica.id)

    def view(
        self, replica: Replica, request: RouteRequest, reserved: Mapping[str, Sequence[PendingWork]]
    ) -> ReplicaView:
        """A replica as this request sees it; ``reserved``: who waits for which replica before it."""
        now = self.now()
        leases = self._leases.get(replica.id, [])
        prefill = self.book.prefill_tps(replica) or ASSUMED_PREFILL_TPS
        busy = {lease.slot for lease in leases}
        found = self.index.best_slot(replica.id, self._room(replica), request.prompt, busy=busy, now=now)
        per_char = request.tokens / max(1, request.prompt.chars)
        trust = self.book.trust(replica.id)
        return ReplicaView(
            replica=replica,
            running=tuple([g.decodes if g.first_at is not None else g.work(now, prefill) for g in leases]),
            reserved=tuple(reserved.get(replica.id, ())),
            prefill_tps=prefill,
            step_curve=self._steps_of(replica) or _ASSUMED_STEPS,
            slot=found.slot,
            cached_tokens=trust * self._cached_chars(replica, found, request) * per_char,
            evicted_tokens=trust * found.evicted_chars * per_char,
            expected_returns=trust
            * self.index.expected_returns(replica.id, busy=busy, current=_prompts(request, leases), now=now),
            mean_gap_s=self.index.reuse.mean_gap_s,
            ready_in_s=_ready_in_s(replica),
        )

    def _cached_chars(self, replica: Replica, found: SlotChoice, request: RouteRequest) -> int:
        """What is in a slot that is taken will be there once it is free."""
        if found.slot is not None:
            return found.cached_chars
        going = [request.prompt.shared(lease.request.prompt) for lease in self._leases.get(replica.id, ())]
        return max(found.cached_chars, *going, 0)

    def start(self, request: RouteRequest, placement: Placement, *, since: float) -> SlotLease:
        """A request takes the slot that was chosen for it; ``since``: when it came."""
        now = self.now()
        replica = placement.view.replica
        self.index.reuse.asked(request.prompt, now)
        lease = SlotLease(
            request,
            replica,
            slot=placement.view.slot or 0,
            cached=min(placement.view.cached_tokens, max(0.0, request.tokens - 1)),
            expected=self.expected(request),
            estimate=placement.estimate,
            reason=placement.reason,
            queued_s=now - since,
            now=now,
        )
        beside = self._leases.setdefault(replica.id, [])
        lease.alone = not beside
        for other in beside:
            other.alone = False
        beside.append(lease)
        self._prefilling.setdefault(replica.id, []).append(lease)
        self.fleet.touch(replica.id)
        breaker = self.breaker(replica.id)
        if breaker.state(now) is BreakerState.TRIAL:
            self.breakers[replica.id] = breaker.took_trial(now)
        return lease

    def end(self, lease: SlotLease) -> None:
        """A request gives its slot back; its ``outcome`` is learned from."""
        now = self.now()
        leases = self._leases.get(lease.replica.id, [])
        leases.remove(lease)
        self.fleet.touch(lease.replica.id)
        if not leases:
            del self._leases[lease.replica.id]
        if lease.first_at is None:
            self._read(lease)
        integral = self._integral(lease.replica.id)
        if lease.first_at is not None:
            integral.add(-1, now)
        self._learn(lease, integral.at(now), now)
        if not leases and self.fleet.snapshot.find(lease.replica.id) is None:
            self._forget(lease.replica.id)

    def _learn(self, lease: SlotLease, integral: float, now: float) -> None:
        outcome, name = lease.outcome, lease.replica.id
        if outcome is None:
            if lease.first_at is not None and not lease.failed:  # its client left: the prompt is in the cache
                self.index.store(name, self._room(lease.replica), lease.slot, lease.request.prompt, now)
            else:
                self.index.drop(name, lease.slot)
            if name in self.breakers and not lease.failed:
                self.breakers[name] = self.breakers[name].released_trial(sent_at=lease.started)
            return
        self.breakers.pop(name, None)
        if lease.request.answers > 1:  # one slot is in our account, and whichever they took are in use
            self.index.drop(name, lease.slot)
        if outcome.answer is not None:
            self.index.store(name, self._room(lease.replica), lease.slot, outcome.answer, now)
            self.index.reuse.answered(outcome.answer, now)
        if outcome.timings is None:
            return
        span = now - lease.first_at if lease.first_at is not None else 0.0
        self.book.observe(
            name,
            model=lease.request.model,
            timings=outcome.timings,
            predicted_cached=round(lease.cached),
            mean_streams=(integral - lease.streams_before) / span if span > 0 else 1.0,
            alone=lease.alone,
            prompt_chars=lease.request.prompt.chars if outcome.counted else 0,
            capped=outcome.capped,
        )
        self._steps.pop(name, None)

    def _read(self, lease: SlotLease) -> None:
        """Its prompt holds nobody up any more."""
        beside = self._prefilling[lease.replica.id]
        beside.remove(lease)
        if not beside:
            del self._prefilling[lease.replica.id]

    def _steps_of(self, replica: Replica) -> StepCurve | None:
        """How long a token takes there, if known; every request asks, and only an answer changes it."""
        known = self._steps.get(replica.id)
        if known is None or known[0] is not replica:
            known = self._steps[replica.id] = (replica, self.book.decode_steps(replica))
        return known[1]

    def silence_s(self, lease: SlotLease, floor_s: float) -> float:
        """
        The longest that its replica may be silent before that is a failure.

        Whatever is computed there is waited for, four times as long as it should take: boards throttle, and
        a prompt of somebody else holds up every stream.
        """
        replica = lease.replica
        steps = self._steps_of(replica)
        limit = floor_s + 20.0 * (steps.longest(replica.slots) if steps is not None else _SLOWEST_STEP_S)
        reading = self._prefilling.get(replica.id)
        if reading:
            prefill, now = self.book.prefill_tps(replica) or _SLOWEST_PREFILL_TPS, self.now()
            limit += 4.0 * sum(one.prefill_left(now, 0.0) for one in reading) / prefill
        return limit

    def changed(self) -> None:
        """The fleet has another snapshot: what is gone, or came back as another process, holds no cache."""
        before = self._known
        self._known = self.fleet.snapshot
        for old in before.replicas:
            new = self._known.find(old.id)
            if new is None:
                self._forget(old.id)
            elif (old.state in _RUNNING and new.state not in _RUNNING) or (old.model and new.model != old.model):
                self.index.drop(old.id)
            elif new.state is State.READY and old.state is not State.READY:
                # It answers again: whoever knows that need not wait until its rest is over.
                self.breakers.pop(old.id, None)

    def _forget(self, replica_id: str) -> None:
        """A replica has left: in a cluster names come and go. What still runs there keeps its account until it ends."""
        self.index.drop(replica_id)
        self._steps.pop(replica_id, None)
        if replica_id not in self._leases:
            self.breakers.pop(replica_id, None)
            self._streams.pop(replica_id, None)

    def expected(self, request: RouteRequest) -> float:
        """Tokens that a request's answer will have, as answers of its model usually do."""
        usual = self.book.answer_tokens(request.model)
        return usual if request.limit is None else min(usual, float(max(1, request.limit)))

    def _room(self, replica: Replica) -> Capacity:
        tokens = _MUCH_TOKENS if replica.host_cache_tokens is None else replica.host_cache_tokens
        return Capacity(replica.slots, tokens * self.book.chars_per_token(replica.model))

    def breaker(self, replica_id: str) -> Breaker:
        """How a replica has fared lately."""
        return self.breakers.get(replica_id, _CLOSED)

    def _integral(self, replica_id: str) -> "_Integral":
        return self._streams.setdefault(replica_id, _Integral())

    def now(self) -> float:
        """The loop's time."""
        return asyncio.get_running_loop().time()


class _Integral:
    """Streams over time, so that their mean over any span is known at its end."""

    def __init__(self) -> None:
        self._streams = 0
        self._sum = 0.0
        self._since = 0.0

    def add(self, streams: int, now: float) -> None:
        """So many more from now on."""
        self._sum, self._since = self.at(now), now
        self._streams += streams

    def at(self, now: float) -> float:
        """Stream seconds until now."""
        return self._sum + self._streams * (now - self._since)


def holds(replica: Replica, request: RouteRequest) -> bool:
    """Whether a replica's context may hold a request's prompt, which is estimated; the engine counts."""
    return replica.context is None or request.fewest < replica.context


def suits(replica: Replica, request: RouteRequest) -> bool:
    """Whether a replica could serve a request if it is well: by its context and its dialect."""
    return holds(replica, request) and (replica.dialect == "llama-server" or not request.goes_on)


def _prompts(request: RouteRequest, leases: Iterable[SlotLease]) -> Iterator[Chain]:
    yield request.prompt
    for lease in leases:
        yield lease.request.prompt


def _likely_holds(replica: Replica, request: RouteRequest) -> bool:
    return replica.context is None or (request.longest or request.tokens) < replica.context


def _ready_in_s(replica: Replica) -> float:
    if replica.state is State.READY:
        return 0.0
    whole = _LOAD_S if replica.load_s is None else replica.load_s
    return whole * (1.0 - (replica.progress or 0.0))
