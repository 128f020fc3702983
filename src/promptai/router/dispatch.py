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
from promptai.fleet.replica import Snapshot, State
from promptai.router.accounts import Accounts
from promptai.router.fairqueue import FairQueue
from promptai.router.grant import Grant, Job
from promptai.router.policy import Ask, Choice, Strategy, Work, free_in_s
from promptai.router.prefix import chain

#: Who waits behind so many others is not looked at: none of them would get a slot either.
_LOOK = 64
_TICK_S = 1.0


class Limits(NamedTuple):
    """
    How long and how many may wait.

    Attributes:
        queue: Requests a model that wait, beside those that have a slot.
        outage_s: The longest that an accepted request waits for a replica to come back.
    """

    queue: int = 64
    outage_s: float = 30.0


class Waiter:
    """
    A request in the queue.

    Attributes:
        choice: Where it would go, as of the last look; ``None``: nowhere.
    """

    def __init__(self, job: Job, now: float) -> None:
        self.job = job
        self.since = now
        self.choice: Choice | None = None
        self.granted: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()


class Dispatcher:
    """
    Who is where, and who is next.

    Args:
        accounts: What is known of the fleet.
        strategy: How replicas are chosen.
    """

    def __init__(self, accounts: Accounts, strategy: Strategy, limits: Limits | None = None) -> None:
        self.accounts = accounts
        self.strategy = strategy
        self.limits = limits or Limits()
        self._queues: dict[str, FairQueue[Waiter]] = {}
        self._dead_since: dict[str, float] = {}
        self._pumping: dict[str, bool] = {}
        self._tick: asyncio.TimerHandle | None = None
        self._unsubscribe = accounts.fleet.subscribe(self._changed)

    def close(self) -> None:
        """Stop listening to the fleet."""
        self._unsubscribe()
        if self._tick is not None:
            self._tick.cancel()

    @contextlib.asynccontextmanager
    async def grant(
        self, job: Job, *, entered: Callable[[Waiter], None] = lambda _: None
    ) -> AsyncGenerator[Grant, None]:
        """
        Wait for a slot; inside the block it is taken.

        Args:
            entered: Given the place in the queue, to ask about it with ``place``.

        Raises:
            SaturatedError: Too many wait already, or it waited too long.
            NoCapacityError: Nothing can serve this model.
        """
        waiter = self._enter(job)
        entered(waiter)
        try:
            if not waiter.granted.done():
                async with asyncio.timeout(job.wait_s):
                    await waiter.granted
            granted = waiter.granted.result()
        except BaseException as error:
            self._leave(waiter)
            if isinstance(error, TimeoutError):
                raise self._saturated(job.model, f"waited {job.wait_s:g} s for {job.model} and got no slot") from None
            raise
        try:
            yield granted
        finally:
            self._end(granted)

    def waiting(self, model: str) -> list[Waiter]:
        """Who waits for a model, the next one first."""
        return self._queue(model).ordered(self._now())

    def place(self, waiter: Waiter) -> int:
        """How many are before this one; 0 also for one that has its slot and has not been told yet."""
        queue = self._queue(waiter.job.model)
        return queue.position(waiter, self._now()) if waiter in queue else 0

    def preview(self, job: Job) -> Choice | None:
        """Where this request would go if it came now, behind all that wait; nothing is taken."""
        reserved: dict[str, list[Work]] = {}
        for waiter in self.waiting(job.model):
            if waiter.choice is not None:
                reserved.setdefault(waiter.choice.load.replica.id, []).append(self._work_of(waiter.job, waiter.choice))
        return self._choose(job, reserved)

    def _leave(self, waiter: Waiter) -> None:
        """Whoever leaves the queue in the very moment in which it is given a slot gives it back."""
        self._queue(waiter.job.model).remove(waiter)
        granted = waiter.granted
        if granted.done() and not granted.cancelled() and granted.exception() is None:
            self._end(granted.result())
        else:
            self._pump(waiter.job.model)

    def _end(self, grant: Grant) -> None:
        self.accounts.end(grant)
        timings = grant.outcome.timings if grant.outcome is not None else None
        generated = timings.predicted_n if timings is not None else grant.generated
        charged = 0.0 if grant.job.again else grant.expected  # who is sent again is not charged when it is given a slot
        self._queue(grant.job.model).settle(grant.job.key, generated - charged)
        if self._known(grant.replica.id) is not State.READY:
            self.accounts.forget_idle()
        self._pump(grant.job.model)

    def _known(self, replica_id: str) -> State | None:
        replica = self.accounts.fleet.snapshot.find(replica_id)
        return replica.state if replica is not None else None

    def _changed(self, _snapshot: Snapshot) -> None:
        self.accounts.changed()
        self.accounts.forget_idle()
        for model in list(self._queues):
            self._pump(model, anew=True)
        served = self.accounts.fleet.snapshot.models
        for model in [model for model, queue in self._queues.items() if not len(queue) and model not in served]:
            del self._queues[model]

    def _enter(self, job: Job) -> Waiter:
        now = self._now()
        queue = self._queue(job.model)
        waiter = Waiter(job, now)
        if not job.again and not self.accounts.candidates(job) and not self.accounts.comes_back(job.model):
            raise self.no_capacity(job.model)
        cost = job.tokens + self.accounts.expected(job)
        queue.push(waiter, key=job.key, cost=cost, batch=job.batch, first=job.again, now=now)
        self._pump(job.model)
        if not job.again and not waiter.granted.done() and len(queue) > self.limits.queue:
            self._turn_away(queue, waiter)
        return waiter

    def _turn_away(self, queue: FairQueue[Waiter], waiter: Waiter) -> None:
        """One too many waits: the newest of whoever has most in the queue goes, so that nobody fills it for all."""
        model = waiter.job.model
        by_key: dict[str, list[Waiter]] = {}
        for one in queue.ordered(self._now()):
            if not one.job.again:
                by_key.setdefault(one.job.key, []).append(one)
        most = max(by_key.values(), key=len)
        goes = most[-1] if len(most) > len(by_key[waiter.job.key]) else waiter
        queue.remove(goes)
        refusal = self._saturated(model, f"{self.limits.queue} requests wait for {model} already")
        if goes is waiter:
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
            self._dead_since.pop(model, None)
            return
        now = self._now()
        reserved: dict[str, list[Work]] = {}
        free = self.accounts.free(model)
        for waiter in queue.ordered(now)[:_LOOK]:
            if waiter.granted.done():  # cancelled, and not yet told so
                continue
            if anew or free or waiter.choice is None:
                waiter.choice = self._choose(waiter.job, reserved)
            choice = waiter.choice
            if choice is None:
                self._look_again(waiter.job.rests_until)
                continue
            replica = choice.load.replica
            if choice.now:
                free -= 1
                queue.take(waiter)
                waiter.granted.set_result(self.accounts.start(waiter.job, choice, since=waiter.since))
                self.strategy.took(replica.id)
            else:
                reserved.setdefault(replica.id, []).append(self._work_of(waiter.job, choice))
                if replica.state is State.COLD:
                    self.accounts.fleet.wake(replica.id)
        self._mind_outage(model, now)
        if len(queue):
            self._look_again(now + _TICK_S)

    def _choose(self, job: Job, reserved: dict[str, list[Work]]) -> Choice | None:
        loads = [self.accounts.load(replica, job, reserved) for replica in self.accounts.candidates(job)]
        ask = Ask(tokens=job.tokens, expected=self.accounts.expected(job), head=job.prompt.head)
        return self.strategy.choose(ask, loads)

    def _mind_outage(self, model: str, now: float) -> None:
        """Nobody waits for ever for replicas that do not come back."""
        queue = self._queue(model)
        hope = any(waiter.choice is not None for waiter in queue.ordered(now)[:_LOOK]) if len(queue) else True
        if hope or self.accounts.comes_back(model):
            self._dead_since.pop(model, None)
            return
        since = self._dead_since.setdefault(model, now)
        if now - since >= self.limits.outage_s:
            for waiter in queue.ordered(now):
                queue.remove(waiter)
                if not waiter.granted.done():
                    waiter.granted.set_exception(self.no_capacity(model))
            self._dead_since.pop(model, None)

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

    def no_capacity(self, model: str) -> NoCapacityError:
        """That no replica of a model can serve, and why."""
        now = self._now()
        replicas = self.accounts.fleet.snapshot.of(model)
        if not replicas:
            return NoCapacityError(f"no replica serves {model}", hint="see /api/fleet")
        rests = [self.accounts.breaker(r.id).rest_s(now) for r in replicas if r.usable]
        why = "; ".join(f"{r.id}: {r.reason or ('failing' if r.usable else r.state.value)}" for r in replicas[:4])
        return NoCapacityError(
            f"no replica of {model} can serve now ({why})",
            retry_after_s=max(1.0, min(rests, default=5.0)),
            hint="try again later; see /api/fleet",
        )

    def _saturated(self, model: str, message: str) -> SaturatedError:
        return SaturatedError(message, retry_after_s=self.moves_in_s(model), hint="try again after Retry-After")

    def moves_in_s(self, model: str) -> float:
        """Seconds until the next request of a model's queue gets a slot, as it looks."""
        job = Job(model=model, prompt=_NOTHING, tokens=1.0)
        times = [free_in_s(self.accounts.load(replica, job, {})) for replica in self.accounts.candidates(job)]
        return max(1.0, math.ceil(min(times, default=5.0)))

    def _work_of(self, job: Job, choice: Choice) -> Work:
        return Work(max(1.0, job.tokens - choice.load.cached), self.accounts.expected(job))

    def _queue(self, model: str) -> FairQueue[Waiter]:
        return self._queues.setdefault(model, FairQueue())

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


_NOTHING = chain("")
