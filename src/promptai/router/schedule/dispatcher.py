"""Give every request a slot: the best one that it can have, in a fair order, within a bound.

Engines have queues of their own that nobody can look into, bound or leave; who is in one has
chosen its board for good. So requests queue here and an engine is never sent more than it has
slots. Whenever something changes (a request comes or ends, a replica comes or goes, a second
has passed) the queue is gone through in its order, and each request takes the replica that is
cheapest for it. If that one has no free slot the request keeps its place, and counts as a
reservation there for everybody behind it. As long as no slot is free at all, what was chosen is
kept for a second: to weigh every replica for everybody at every event made 50 boards stand still.

Decisions are in ``policy``, ``prefix``, ``fairqueue``, ``rates`` and ``breaker``; here is what
they are made of: who is where. All of it runs in one event loop, so nothing is locked, and
nothing between a decision and its effect awaits.
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
from promptai.router.schedule.fleet_state import FleetState, holds, suits
from promptai.router.schedule.lease import RouteRequest, SlotLease

#: As long as no slot is free, who waits behind so many that have a choice is not looked at: its turn is far off. A
#: free slot may be of a replica that all of those cannot use.
_LOOK = 64
_TICK_S = 1.0


class QueueLimits(NamedTuple):
    """
    How long and how many may wait.

    Attributes:
        queue: Requests a model that wait, beside those that have a slot.
        outage_s: The longest that an accepted request waits for a replica to come back.
    """

    queue: int = 64
    outage_s: float = 30.0


class QueueEntry:
    """
    A request in the queue.

    Attributes:
        choice: Where it would go, as of the last look; ``None``: nowhere.
        hopeless_since: From when on every look has found no replica that is ready and could take it, nor one that
            may come back and could; it begins when there is none at all, not even one to load. ``None``: it has not.
    """

    def __init__(self, request: RouteRequest, now: float) -> None:
        self.request = request
        self.since = now
        self.placement: Placement | None = None
        self.hopeless_since: float | None = None
        self.granted: asyncio.Future[SlotLease] = asyncio.get_running_loop().create_future()


class Dispatcher:
    """
    Who is where, and who is next.

    Args:
        accounts: What is known of the fleet.
        strategy: How replicas are chosen.
    """

    def __init__(self, fleet_state: FleetState, strategy: Strategy, limits: QueueLimits | None = None) -> None:
        self.fleet_state = fleet_state
        self.strategy = strategy
        self.limits = limits or QueueLimits()
        self._queues: dict[str, FairQueue[QueueEntry]] = {}
        self._pumping: dict[str, bool] = {}
        self._tick: asyncio.TimerHandle | None = None
        self._unsubscribe = fleet_state.fleet.subscribe(self._changed)

    def close(self) -> None:
        """Stop listening to the fleet."""
        self._unsubscribe()
        if self._tick is not None:
            self._tick.cancel()

    @contextlib.asynccontextmanager
    async def acquire(
        self, request: RouteRequest, *, entered: Callable[[QueueEntry], None] = lambda _: None
    ) -> AsyncGenerator[SlotLease, None]:
        """
        Wait for a slot; inside the block it is taken.

        Args:
            entered: Given the place in the queue, to ask about it with ``place``.

        Raises:
            SaturatedError: Too many wait already, or it waited too long.
            NoCapacityError: Nothing can serve it.
        """
        entry = self._enter(request)
        entered(entry)
        try:
            if not entry.granted.done():
                async with asyncio.timeout(request.wait_s):
                    await entry.granted
            granted = entry.granted.result()
        except BaseException as error:
            self._leave(entry)
            if isinstance(error, TimeoutError):
                raise self._saturated(
                    request.model, f"waited {request.wait_s:g} s for {request.model} and got no slot"
                ) from None
            raise
        try:
            yield granted
        finally:
            self._end(granted)

    def queued(self, model: str) -> list[QueueEntry]:
        """Who waits for a model, the next one first."""
        return self._queue(model).ordered(self._now())

    def position(self, entry: QueueEntry) -> int:
        """How many are before this one; 0 also for one that has its slot and has not been told yet."""
        queue = self._queue(entry.request.model)
        return queue.position(entry, self._now()) if entry in queue else 0

    def preview(self, request: RouteRequest) -> Placement | None:
        """Where this request would go if it came now, behind all that wait; nothing is taken."""
        reserved: dict[str, list[PendingWork]] = {}
        for entry in self.queued(request.model):
            if entry.placement is not None:
                reserved.setdefault(entry.placement.view.replica.id, []).append(
                    self._work_of(entry.request, entry.placement)
                )
        return self._place(request, reserved)

    def _leave(self, entry: QueueEntry) -> None:
        """Whoever leaves the queue in the very moment in which it is given a slot gives it back."""
        self._queue(entry.request.model).remove(entry)
        granted = entry.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self._end(granted.result())
        else:
            self._pump(entry.request.model)

    def _end(self, lease: SlotLease) -> None:
        self.fleet_state.end(lease)
        # Of a prompt that was charged before, nothing was charged again.
        charged = max(0.0, lease.charged - lease.request.tokens)
        generated = _generated(lease)
        self._queue(lease.request.model).settle(lease.request.key, 0.0 if generated is None else generated - charged)
        if self._known(lease.replica.id) is not State.READY:
            self.fleet_state.forget_idle()
        self._pump(lease.request.model)

    def _known(self, replica_id: str) -> State | None:
        replica = self.fleet_state.fleet.snapshot.find(replica_id)
        return replica.state if replica is not None else None

    def _changed(self, _snapshot: Snapshot) -> None:
        self.fleet_state.changed()
        self.fleet_state.forget_idle()
        for model in list(self._queues):
            self._pump(model, anew=True)
        served = self.fleet_state.fleet.snapshot.models
        for model in [model for model, queue in self._queues.items() if not len(queue) and model not in served]:
            del self._queues[model]

    def _enter(self, request: RouteRequest) -> QueueEntry:
        now = self._now()
        queue = self._queue(request.model)
        entry = QueueEntry(request, now)
        if not request.again and not self.fleet_state.hope(request):
            raise self.no_capacity(request.model, request)
        cost = request.tokens + request.answers * self.fleet_state.expected(request)
        queue.push(entry, key=request.key, cost=cost, batch=request.batch, first=request.again, now=now)
        self._pump(request.model)
        if not request.again and not entry.granted.done() and len(queue) > self.limits.queue:
            self._turn_away(queue, entry)
        return entry

    def _turn_away(self, queue: FairQueue[QueueEntry], entry: QueueEntry) -> None:
        """
        One too many waits: the newest of whoever has most in the queue goes, so that nobody fills it for all.

        Batch work goes before anybody who waits in person, as long as it lets them go before it in the queue.
        """
        model, now = entry.request.model, self._now()
        waiting = [one for one in queue.ordered(now) if not one.request.again]
        patient = [one for one in waiting if queue.patient(one, now)]
        goes = _one_too_many(patient or waiting, entry)
        queue.remove(goes)
        refusal = self._saturated(model, f"{self.limits.queue} requests wait for {model} already")
        if goes is entry:
            raise refusal
        if not goes.granted.done():
            goes.granted.set_exception(refusal)

    def _pump(self, model: str, *, anew: bool = False) -> None:
        """Go through the queue of a model and give out what can be given; ``anew``: everybody chooses again."""
        if model in self._pumping:  # waking a replica publishes it, and that leads here again
            self._pumping[model] = True
            return
        self._pumping[model] = False
        try:
            self._give_out(model, anew=anew)
        finally:
            again = self._pumping.pop(model)
        if again:
            self._pump(model, anew=True)

    def _give_out(self, model: str, *, anew: bool) -> None:
        queue = self._queue(model)
        if not len(queue):
            return
        now = self._now()
        reserved: dict[str, list[PendingWork]] = {}
        free = self.fleet_state.free(model)
        planned = 0
        # Who was cancelled is there until it has been told so.
        for entry in (one for one in queue.ordered(now) if not one.granted.done()):
            if planned >= _LOOK and free <= 0:
                break
            if anew or free > 0 or entry.placement is None:
                entry.placement = self._place(entry.request, reserved)
            placement = entry.placement
            if placement is None:
                self._mind_outage(queue, entry, now)
                continue
            planned += 1
            replica = placement.view.replica
            if replica.state is State.READY:  # one that has failed to load and is loaded again may fail again
                entry.hopeless_since = None
            if placement.immediate:
                free -= 1
                lease = self.fleet_state.start(entry.request, placement, since=entry.since)
                lease.charged = queue.take(entry)
                entry.granted.set_result(lease)
                self.strategy.placed(replica.id)
            else:
                reserved.setdefault(replica.id, []).append(self._work_of(entry.request, placement))
                if replica.state is State.COLD:
                    self.fleet_state.fleet.wake(replica.id)
        if len(queue):
            self._look_again(now + _TICK_S)

    def _place(self, request: RouteRequest, reserved: dict[str, list[PendingWork]]) -> Placement | None:
        loads = [self.fleet_state.view(replica, request, reserved) for replica in self.fleet_state.candidates(request)]
        ask = Demand(
            prompt_tokens=request.tokens,
            answer_tokens=self.fleet_state.expected(request),
            conversation=request.prompt.head,
        )
        return self.strategy.choose(ask, loads)

    def _mind_outage(self, queue: FairQueue[QueueEntry], entry: QueueEntry, now: float) -> None:
        """Nobody who has no choice waits for ever for replicas that do not come back, or longer than their pauses."""
        request = entry.request
        for at in request.refused.values():
            self._look_again(at)
        if self.fleet_state.hope(request):
            entry.hopeless_since = None
            return
        if entry.hopeless_since is None:
            entry.hopeless_since = now
        if now - entry.hopeless_since >= self.limits.outage_s:
            queue.remove(entry)
            entry.granted.set_exception(self.no_capacity(request.model, request))

    def _look_again(self, at: float) -> None:
        """Go through all queues at that time, if not before; a time that is over says nothing."""
        if at <= self._now() or (self._tick is not None and self._tick.when() <= at):
            return
        if self._tick is not None:
            self._tick.cancel()
        self._tick = asyncio.get_running_loop().call_at(at, self._ticked)

    def _ticked(self) -> None:
        self._tick = None
        for model in list(self._queues):
            self._pump(model, anew=True)

    def no_capacity(self, model: str, request: RouteRequest | None = None) -> NoCapacityError:
        """That no replica of a model can serve, and why; ``request``: what it is that they cannot serve."""
        now = self._now()
        replicas = self.fleet_state.fleet.snapshot.of(model)
        if not replicas:
            return NoCapacityError(f"no replica serves {model}", hint="see /api/fleet")
        able = [r for r in replicas if r.usable and (request is None or suits(r, request))]
        rests = [self.fleet_state.breaker(r.id).rest_s(now) for r in able]
        why = "; ".join(f"{r.id}: {self._why_not(r, request)}" for r in replicas[:4])
        return NoCapacityError(
            f"no replica of {model} can serve now ({why})",
            retry_after_s=max(1.0, min(rests, default=5.0)),
            hint="try again later; see /api/fleet",
        )

    def _why_not(self, replica: Replica, request: RouteRequest | None) -> str:
        if request is not None and not holds(replica, request):
            return "too small for this prompt"
        if request is not None and not suits(replica, request):
            return "cannot go on with an answer"
        closed = self.fleet_state.breaker(replica.id).state(self._now()) is BreakerState.CLOSED
        return replica.reason or (replica.state.value if closed or not replica.usable else "failing")

    def _saturated(self, model: str, message: str) -> SaturatedError:
        return SaturatedError(message, retry_after_s=self.next_slot_in_s(model), hint="try again after Retry-After")

    def next_slot_in_s(self, model: str) -> float:
        """Seconds until the next request of a model's queue gets a slot, as it looks."""
        request = RouteRequest(model=model, prompt=_NOTHING, tokens=1.0)
        times = [
            free_in_s(self.fleet_state.view(replica, request, {})) for replica in self.fleet_state.candidates(request)
        ]
        return max(1.0, math.ceil(min(times, default=5.0)))

    def _work_of(self, request: RouteRequest, placement: Placement) -> PendingWork:
        return PendingWork(max(1.0, request.tokens - placement.view.cached_tokens), self.fleet_state.expected(request))

    def _queue(self, model: str) -> FairQueue[QueueEntry]:
        return self._queues.setdefault(model, FairQueue())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _one_too_many(waiting: list[QueueEntry], newcomer: QueueEntry) -> QueueEntry:
    """The newest of the key with most of those who wait; the newcomer, if it is among them and no key has more."""
    by_key: dict[str, list[QueueEntry]] = {}
    for one in waiting:
        by_key.setdefault(one.request.key, []).append(one)
    most = max(by_key.values(), key=len)
    if newcomer in waiting and len(by_key[newcomer.request.key]) == len(most):
        return newcomer
    return most[-1]


def _generated(lease: SlotLease) -> int | None:
    """Tokens of all answers: as the engine says, else the pieces that came; ``None``: answered in one piece, untold."""
    if lease.outcome is None:
        return lease.generated
    return lease.generated or None if lease.outcome.generated is None else lease.outcome.generated


_NOTHING = chain("")
