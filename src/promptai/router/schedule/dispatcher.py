"""Give every request the best available slot, in a fair order, within a bounded queue.

An engine's own queue can neither be inspected nor bounded, and a request in it can no longer move to another board.
So requests queue here, and an engine never gets more requests than it has slots (a request for several answers counts
as one slot, although the engine may use more). Whenever something changes (a
request arrives or ends, a replica comes or goes, a second has passed) the dispatcher walks the queue in order and
gives each request the replica that is cheapest for it. If that replica has no free slot, the request keeps its place
and counts as a reservation there for all requests behind it. While no slot is free at all, placements stay as they
are for up to a second: weighing every replica for every request at every event left 50 boards idle while the
gateway computed.

``estimate`` and ``fair_queue`` decide; this module keeps the queue and acts. All of it runs in one event loop without
locks, and nothing awaits between a decision and its effect.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

from promptai.errors import NoCapacityError, SaturatedError
from promptai.fleet.replica import Replica, Snapshot, State
from promptai.router.estimate.breaker import BreakerState
from promptai.router.estimate.policy import Demand, PendingWork, Placement, Strategy, free_in_s
from promptai.router.estimate.prefix import chain
from promptai.router.schedule.fair_queue import FairQueue
from promptai.router.schedule.fleet_state import FleetState, can_serve, may_fit
from promptai.router.schedule.lease import SlotLease, SlotRequest

#: While no slot is free, only so many queued requests with a placement are considered: the others' turn is far off. A
#: free slot may belong to a replica that none of the first can use, so then all are considered.
_MAX_PLANNED = 64
_TICK_S = 1.0
_EMPTY_PROMPT = chain("")


class QueueLimits(NamedTuple):
    """
    Bounds of the queue.

    Attributes:
        queue: Queued requests per model, in addition to those that have a slot.
        outage_s: Longest time that an accepted request waits for a replica to come back.
    """

    queue: int = 64
    outage_s: float = 30.0


class QueueEntry:
    """
    A request in the queue.

    Attributes:
        queued_at: The loop's time at which it entered.
        placement: Where it would go, as of the last pass; ``None``: nowhere.
        no_replica_since: The loop's time since which no replica could serve the request, now or after recovering;
            ``None`` while one can. A ready replica resets it, a loading one does not.
        leased: Gets the lease, or the error that ends the wait.
    """

    def __init__(self, request: SlotRequest, now: float) -> None:
        self.request = request
        self.queued_at = now
        self.placement: Placement | None = None
        self.no_replica_since: float | None = None
        self.leased: asyncio.Future[SlotLease] = asyncio.get_running_loop().create_future()


class Dispatcher:
    """
    Queues of all models, and their slots.

    Args:
        fleet_state: State of the replicas.
        strategy: Chooses among replicas.
    """

    def __init__(self, fleet_state: FleetState, strategy: Strategy, limits: QueueLimits | None = None) -> None:
        self.fleet_state = fleet_state
        self.strategy = strategy
        self.limits = limits or QueueLimits()
        self._queues: dict[str, FairQueue[QueueEntry]] = {}
        self._dispatching: dict[str, bool] = {}  # model: dispatch again afterwards
        self._timer: asyncio.TimerHandle | None = None
        self._unsubscribe = fleet_state.fleet.subscribe(self._fleet_changed)

    def close(self) -> None:
        """Unsubscribe from the fleet."""
        self._unsubscribe()
        if self._timer is not None:
            self._timer.cancel()

    @contextlib.asynccontextmanager
    async def acquire(
        self, request: SlotRequest, *, on_queued: Callable[[QueueEntry], None] = lambda _: None
    ) -> AsyncGenerator[SlotLease, None]:
        """
        Wait for a slot and hold it inside the block.

        Args:
            on_queued: Called with the queue entry, whose ``position`` can then be requested.

        Raises:
            SaturatedError: The queue is full, or the request waited longer than ``max_wait_s``.
            NoCapacityError: No replica can serve the request.
        """
        entry = self._enqueue(request)
        on_queued(entry)
        try:
            if not entry.leased.done():
                async with asyncio.timeout(request.max_wait_s):
                    await entry.leased
            lease = entry.leased.result()
        except BaseException as error:
            self._leave(entry)
            if isinstance(error, TimeoutError):
                message = f"no slot for {request.model} became free within {request.max_wait_s:g} s"
                raise self._saturated(request.model, message) from None
            raise
        try:
            yield lease
        finally:
            self._release(lease)

    def queued(self, model: str) -> list[QueueEntry]:
        """Queued requests of a model in the order of service."""
        return self._queue(model).ordered(self._now())

    def position(self, entry: QueueEntry) -> int:
        """Number of requests ahead of this one; 0 also once it has a slot."""
        queue = self._queue(entry.request.model)
        return queue.position(entry, self._now()) if entry in queue else 0

    def preview(self, request: SlotRequest) -> Placement | None:
        """Return the placement of a request that would arrive now, behind all queued ones; takes no slot."""
        reserved: dict[str, list[PendingWork]] = {}
        for entry in self.queued(request.model):
            if entry.placement is not None:
                self._reserve(reserved, entry.request, entry.placement)
        return self._place(request, reserved)

    def next_slot_in_s(self, model: str) -> float:
        """Estimated seconds until the next queued request of a model gets a slot; at least 1."""
        request = SlotRequest(model=model, prompt=_EMPTY_PROMPT, prompt_tokens=1.0)
        times = [
            free_in_s(self.fleet_state.view(replica, request, {})) for replica in self.fleet_state.candidates(request)
        ]
        return max(1.0, math.ceil(min(times, default=5.0)))

    def no_capacity(self, model: str, request: SlotRequest | None = None) -> NoCapacityError:
        """Return the error for a model that no replica can serve now, with the reasons of up to four replicas."""
        now = self._now()
        replicas = self.fleet_state.fleet.snapshot.of(model)
        if not replicas:
            return NoCapacityError(f"no replica serves {model}", hint="see /api/fleet")
        able = [replica for replica in replicas if replica.usable and (request is None or can_serve(replica, request))]
        rests = [self.fleet_state.breaker(replica.id).rest_s(now) for replica in able]
        reasons = "; ".join(f"{replica.id}: {self._why_unavailable(replica, request)}" for replica in replicas[:4])
        return NoCapacityError(
            f"no replica of {model} can serve now ({reasons})",
            retry_after_s=max(1.0, min(rests, default=5.0)),
            hint="try again later; see /api/fleet",
        )

    # Entering and leaving the queue

    def _enqueue(self, request: SlotRequest) -> QueueEntry:
        now = self._now()
        queue = self._queue(request.model)
        entry = QueueEntry(request, now)
        if not request.resubmitted and not self.fleet_state.may_be_served(request):
            raise self.no_capacity(request.model, request)
        cost = request.prompt_tokens + request.answers * self.fleet_state.expected_answer_tokens(request)
        queue.push(entry, key=request.key, cost=cost, batch=request.batch, first=request.resubmitted, now=now)
        self._dispatch(request.model)
        if not request.resubmitted and not entry.leased.done() and len(queue) > self.limits.queue:
            self._shed(queue, entry)
        return entry

    def _shed(self, queue: FairQueue[QueueEntry], newcomer: QueueEntry) -> None:
        """
        Reject one request of a queue that is one over its bound.

        The newest request of the key with the most queued requests is rejected, so no key can fill the queue for the
        others. Batch requests are rejected before interactive ones, unless they have waited for so long that they
        count as interactive.
        """
        model, now = newcomer.request.model, self._now()
        entries = [entry for entry in queue.ordered(now) if not entry.request.resubmitted]
        batch = [entry for entry in entries if queue.yields(entry, now)]
        rejected = _one_too_many(batch or entries, newcomer)
        queue.remove(rejected)
        error = self._saturated(model, f"the queue for {model} is full ({self.limits.queue} requests)")
        if rejected is newcomer:
            raise error
        if not rejected.leased.done():
            rejected.leased.set_exception(error)

    def _leave(self, entry: QueueEntry) -> None:
        """Drop a request that ends in the queue; release the slot if it got one at the same moment."""
        self._queue(entry.request.model).remove(entry)
        leased = entry.leased
        if leased.done() and not leased.cancelled() and leased.exception() is None:
            self._release(leased.result())
        else:
            self._dispatch(entry.request.model)

    def _release(self, lease: SlotLease) -> None:
        self.fleet_state.close_lease(lease)
        # The charge covers prompt and answer; a resubmitted request was charged before and is not charged again.
        charged = max(0.0, lease.queue_cost - lease.request.prompt_tokens)
        generated = _generated_tokens(lease)
        queue = self._queue(lease.request.model)
        queue.settle(lease.request.key, 0.0 if generated is None else generated - charged)
        replica = self.fleet_state.fleet.snapshot.find(lease.replica.id)
        if replica is None or replica.state is not State.READY:
            self.fleet_state.release_drained()
        self._dispatch(lease.request.model)

    # Giving out slots

    def _dispatch(self, model: str, *, replace: bool = False) -> None:
        """Walk the queue of a model and give out free slots; ``replace``: every request gets a new placement."""
        if model in self._dispatching:  # waking a replica publishes a snapshot, which leads here again
            self._dispatching[model] = True
            return
        self._dispatching[model] = False
        try:
            self._give_out(model, replace=replace)
        finally:
            again = self._dispatching.pop(model)
        if again:
            self._dispatch(model, replace=True)

    def _give_out(self, model: str, *, replace: bool) -> None:
        queue = self._queue(model)
        if not len(queue):
            return
        now = self._now()
        reserved: dict[str, list[PendingWork]] = {}
        free = self.fleet_state.free_slots(model)
        planned = 0
        # A cancelled request stays in the queue until its task runs.
        for entry in (entry for entry in queue.ordered(now) if not entry.leased.done()):
            if planned >= _MAX_PLANNED and free <= 0:
                break
            if replace or free > 0 or entry.placement is None:
                entry.placement = self._place(entry.request, reserved)
            placement = entry.placement
            if placement is None:
                self._check_outage(queue, entry, now)
                continue
            planned += 1
            replica = placement.view.replica
            if replica.state is State.READY:  # not a loading one: a replica that failed to load may fail again
                entry.no_replica_since = None
            if placement.immediate:
                free -= 1
                lease = self.fleet_state.open_lease(entry.request, placement, since=entry.queued_at)
                lease.queue_cost = queue.take(entry)
                entry.leased.set_result(lease)
                self.strategy.placed(replica.id)
            else:
                self._reserve(reserved, entry.request, placement)
                if replica.state is State.COLD:
                    self.fleet_state.fleet.wake(replica.id)
        if len(queue):
            self._dispatch_at(now + _TICK_S)

    def _place(self, request: SlotRequest, reserved: dict[str, list[PendingWork]]) -> Placement | None:
        views = [self.fleet_state.view(replica, request, reserved) for replica in self.fleet_state.candidates(request)]
        demand = Demand(
            prompt_tokens=request.prompt_tokens,
            answer_tokens=self.fleet_state.expected_answer_tokens(request),
            conversation=request.prompt.head,
        )
        return self.strategy.choose(demand, views)

    def _reserve(self, reserved: dict[str, list[PendingWork]], request: SlotRequest, placement: Placement) -> None:
        """Count a queued request as pending work of its replica."""
        uncached = max(1.0, request.prompt_tokens - placement.view.cached_tokens)
        work = PendingWork(uncached, self.fleet_state.expected_answer_tokens(request))
        reserved.setdefault(placement.view.replica.id, []).append(work)

    def _check_outage(self, queue: FairQueue[QueueEntry], entry: QueueEntry, now: float) -> None:
        """Fail a request once no eligible replica has been available for ``outage_s``."""
        request = entry.request
        for pause_ends_at in request.avoid_until.values():
            self._dispatch_at(pause_ends_at)
        if self.fleet_state.may_be_served(request):
            entry.no_replica_since = None
            return
        if entry.no_replica_since is None:
            entry.no_replica_since = now
        if now - entry.no_replica_since >= self.limits.outage_s:
            queue.remove(entry)
            entry.leased.set_exception(self.no_capacity(request.model, request))

    # Events

    def _fleet_changed(self, _snapshot: Snapshot) -> None:
        self.fleet_state.sync_with_fleet()
        self.fleet_state.release_drained()
        for model in list(self._queues):
            self._dispatch(model, replace=True)
        served = self.fleet_state.fleet.snapshot.models
        for model in [model for model, queue in self._queues.items() if not len(queue) and model not in served]:
            del self._queues[model]

    def _dispatch_at(self, at: float) -> None:
        """Dispatch all queues at that time unless a timer is due earlier; does nothing for a time in the past."""
        if at <= self._now() or (self._timer is not None and self._timer.when() <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        for model in list(self._queues):
            self._dispatch(model, replace=True)

    def _why_unavailable(self, replica: Replica, request: SlotRequest | None) -> str:
        if request is not None and not may_fit(replica, request):
            return "context too small for this prompt"
        if request is not None and not can_serve(replica, request):
            return "cannot resume an answer"
        closed = self.fleet_state.breaker(replica.id).state(self._now()) is BreakerState.CLOSED
        return replica.reason or (replica.state.value if closed or not replica.usable else "failing")

    def _saturated(self, model: str, message: str) -> SaturatedError:
        return SaturatedError(message, retry_after_s=self.next_slot_in_s(model), hint="try again after Retry-After")

    def _queue(self, model: str) -> FairQueue[QueueEntry]:
        return self._queues.setdefault(model, FairQueue())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _one_too_many(entries: list[QueueEntry], newcomer: QueueEntry) -> QueueEntry:
    """Return the newest entry of the key with the most entries; on a tie with the newcomer's key, the newcomer."""
    by_key: dict[str, list[QueueEntry]] = {}
    for entry in entries:
        by_key.setdefault(entry.request.key, []).append(entry)
    most = max(by_key.values(), key=len)
    if newcomer in entries and len(by_key[newcomer.request.key]) == len(most):
        return newcomer
    return most[-1]


def _generated_tokens(lease: SlotLease) -> int | None:
    """Tokens of all answers: reported by the engine, else the chunks received; ``None`` if neither is known."""
    if lease.result is None:
        return lease.generated
    return lease.generated or None if lease.result.generated_tokens is None else lease.result.generated_tokens
