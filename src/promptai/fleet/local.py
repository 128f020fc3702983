"""The engines of this machine: started on request, stopped when their memory is needed.

More models are wanted than fit into memory. Starting a process for each request loads the same model
five times; evicting by count or by age stops an engine in the middle of an answer. Here every model has
one replica and one life cycle:

    COLD ──wake──▶ (queue) ──▶ LOADING ──▶ READY ──evicted, idle too long──▶ STOPPING ──▶ COLD
      ▲                           │          │
      └─ backoff over ─── DOWN ◀──┴──fails───┘ dies

A load that has room starts at once. Loads that need the memory of other engines queue, first come, first
served; a later load may overtake the first only if it leaves the memory that the first is waiting for.
``fleet.placement`` decides evictions, and each is published in the same step, without an ``await`` in
between: no request can be routed to an engine that was just found idle. A newly loaded engine counts as busy
until its first use, for a few seconds at most; otherwise the next load in the queue would evict it before the
requests that waited for it arrive.

A load continues when the request that caused it is cancelled.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Container, Sequence
from enum import Enum
from pathlib import Path
from typing import Protocol

import msgspec

from promptai.errors import PromptAIError
from promptai.fleet import placement
from promptai.fleet.local_engine import LocalEngine
from promptai.fleet.replica import Rates, Replica, State

_LOG = logging.getLogger("promptai.fleet")
_POLL_S, _DEATH_POLL_S, _PROGRESS_S = 0.25, 0.2, 0.5
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 5.0, 120.0
#: An engine that dies sooner than this was never stable: the next start waits longer.
_STABLE_S = 60.0
#: How long a new engine is kept for the requests that waited for it.
_KEEP_FOR_WAITERS_S = 5.0


class LocalModel(msgspec.Struct, frozen=True, kw_only=True):
    """
    One model that this machine can serve.

    Attributes:
        needed_bytes: Memory of its engine: weights, KV cache, buffers, prompt cache.
        context: Context of one slot in tokens.
        cache_ram_mib: Size of the engine's prompt cache; it holds ``host_cache_tokens`` tokens.
        load_s: Expected load time, replaced by the measured one; ``None``: unknown.
        pinned: Always loaded: started first, never evicted, never expired.
        ttl_s: Idle time after which its engine stops; ``None``: unlimited.
        preload: Started with the gateway if it fits without evicting another model.
    """

    name: str
    path: Path
    needed_bytes: int
    slots: int = 1
    context: int | None = None
    cache_ram_mib: int = 0
    host_cache_tokens: int = 0
    rates: Rates = Rates()
    load_s: float | None = None
    capability: float | None = None
    accuracy: float | None = None
    pinned: bool = False
    ttl_s: float | None = None
    preload: bool = False

    @property
    def cache_bytes(self) -> int:
        """Size of the engine's prompt cache in bytes."""
        return self.cache_ram_mib * 1024**2


class Launcher(Protocol):
    """Creates engines; ``fleet.launcher`` implements it."""

    def start(self, model: LocalModel) -> LocalEngine:
        """Return an engine that starts when its ``async with`` block is entered."""


class _Phase(Enum):
    COLD = State.COLD
    LOADING = State.LOADING
    READY = State.READY
    STOPPING = State.DRAINING
    BACKOFF = State.DOWN


class _Entry:
    """One model and its place in the life cycle."""

    def __init__(self, model: LocalModel, replica_id: str) -> None:
        self.model = model
        self.id = replica_id
        self.load_s = model.load_s
        self.failures = 0
        self.restart()

    def restart(self) -> None:
        """Reset to the state before its first start."""
        self.phase = _Phase.COLD
        self.reason = self.never_fits = self.url = ""
        self.engine: LocalEngine | None = None
        self.task: asyncio.Task[None] | None = None
        self.stop = asyncio.Event()
        self.demanded = False
        self.automatic = self.model.preload or self.model.pinned
        self.progress: float | None = None
        self.measured_at = self.used_at = self.ready_at = self.retry_at = 0.0
        self.used = False
        self.waiting_since: float | None = None

    def replica(self, *, draining: bool) -> Replica:
        """Return the replica to publish."""
        model, state, reason = self.model, self.phase.value, self.reason
        if self.phase is _Phase.COLD and self.never_fits:
            state, reason = State.DOWN, self.never_fits
        if self.phase is _Phase.READY and draining:
            state, reason = State.DRAINING, "makes room for another model"
        return Replica(
            id=self.id,
            url=self.url,
            model=model.name,
            slots=model.slots,
            context=model.context,
            host_cache_tokens=model.host_cache_tokens,
            state=state,
            reason=reason,
            rates=model.rates,
            progress=self.progress,
            load_s=self.load_s,
            capability=model.capability,
            accuracy=model.accuracy,
        )

    @property
    def ended(self) -> bool:
        """Whether its last engine is gone."""
        return self.task is None or self.task.done()

    def measure(self, now: float) -> None:
        """Update the load progress: it never falls when pages are dropped, and excludes the empty prompt cache."""
        if self.engine is None or now - self.measured_at < _PROGRESS_S:
            return
        self.measured_at = now
        resident = self.engine.resident_bytes()
        loaded = max(1, self.model.needed_bytes - self.model.cache_bytes)
        if resident is not None and self.model.needed_bytes > 0:
            self.progress = max(round(min(0.99, resident / loaded), 2), self.progress or 0.0)


class LocalSource:
    """
    Publishes one replica per model, and starts and stops their engines.

    Args:
        budget_bytes: Memory that all engines of this machine may take together now, running ones included.
        busy: Requests in flight on a replica, as counted by the router.
        patience_s: After waiting this long for busy engines, a load drains the engines that it replaces. Without
            this, models with steady traffic would keep all others out for ever.
    """

    def __init__(
        self,
        models: Sequence[LocalModel],
        launcher: Launcher,
        budget_bytes: Callable[[], int],
        busy: Callable[[str], int],
        *,
        name: str = "local",
        patience_s: float = 60.0,
    ) -> None:
        self.name = name
        self.configuration: object = (tuple(models), patience_s)
        self.exclusive = True
        self._launcher = launcher
        self._budget_bytes = budget_bytes
        self._busy = busy
        self._patience_s = patience_s
        self._entries = {f"{name}/{model.name}": _Entry(model, f"{name}/{model.name}") for model in models}
        self.replica_ids: Container[str] | None = frozenset(self._entries)
        self._queue: list[_Entry] = []
        self._draining: frozenset[str] = frozenset()
        self._changed = asyncio.Event()
        self._publish_to: Callable[[Sequence[Replica]], None] | None = None

    async def run(self, publish: Callable[[Sequence[Replica]], None]) -> None:
        """Load pinned and preloaded models, then requested ones; on cancellation every engine ends."""
        self._publish_to = publish
        for entry in self._entries.values():
            entry.restart()
            entry.demanded = entry in self._queue
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._changed.clear()
                    self._step(group)
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_POLL_S):
                            await self._changed.wait()
        finally:
            self._publish_to = None

    def wake(self, replica_id: str) -> None:
        """Load a cold replica; repeated calls load it once."""
        entry = self._entries.get(replica_id)
        if entry is not None and entry.phase in {_Phase.COLD, _Phase.STOPPING} and not entry.never_fits:
            entry.demanded = True
            if entry not in self._queue:
                self._queue.append(entry)
                self._changed.set()

    def touch(self, replica_id: str) -> None:
        """Record that a replica was used just now."""
        entry = self._entries.get(replica_id)
        if entry is not None:
            entry.used_at, entry.used = asyncio.get_running_loop().time(), True

    def _step(self, group: asyncio.TaskGroup) -> None:
        """Take all decisions from the current counts and publish them before another task runs."""
        now, budget = asyncio.get_running_loop().time(), self._budget_bytes()
        for entry in self._entries.values():
            if entry.phase is _Phase.READY and self._busy(entry.id):
                entry.used_at, entry.used = now, True
            elif entry.phase is _Phase.LOADING:
                entry.measure(now)
            elif entry.phase is _Phase.BACKOFF and now >= entry.retry_at and entry.ended:
                entry.phase = _Phase.COLD
                entry.automatic = entry.model.preload or entry.model.pinned
        running = self._running(now)
        for entry in self._entries.values():
            others = [engine for engine in running if engine.id != entry.id]
            model = entry.model
            entry.never_fits = placement.why_never_fits(
                model.needed_bytes, others, budget, cache_bytes=model.cache_bytes
            )
        for replica_id in placement.expired(running, now):
            self._stop(self._entries[replica_id], "idle for longer than its ttl_s")
        self._enqueue_automatic()
        self._start_queued(now, budget, group)
        self._publish()

    def _running(self, now: float) -> list[placement.LoadedEngine]:
        """Engines that hold memory and are not being stopped."""
        return [
            placement.LoadedEngine(
                id=entry.id,
                model=entry.model.name,
                needed_bytes=entry.model.needed_bytes,
                cache_bytes=entry.model.cache_bytes,
                busy=entry.phase is _Phase.LOADING
                or self._busy(entry.id) > 0
                or (not entry.used and now < entry.ready_at + _KEEP_FOR_WAITERS_S),
                pinned=entry.model.pinned,
                idle_since=entry.used_at,
                load_s=entry.load_s,
                ttl_s=entry.model.ttl_s,
            )
            for entry in self._entries.values()
            if entry.phase in {_Phase.LOADING, _Phase.READY}
        ]

    def _enqueue_automatic(self) -> None:
        """Put pinned models, then preloaded ones, at the head of the queue."""
        wanted = [
            entry
            for entry in self._entries.values()
            if entry.automatic and entry.phase is _Phase.COLD and not entry.never_fits and entry not in self._queue
        ]
        self._queue[:0] = sorted(wanted, key=lambda entry: not entry.model.pinned)

    def _start_queued(self, now: float, budget: int, group: asyncio.TaskGroup) -> None:
        """Start the queued loads that can start, in order."""
        draining, self._draining = self._draining, frozenset()
        while self._queue:
            entry = self._queue[0]
            eviction = placement.plan_eviction(entry.model.needed_bytes, self._running(now), budget, draining)
            if entry.phase is _Phase.STOPPING:
                self._start_overtaking(eviction.must_stop, now, budget, group)
                return
            automatic_only = not (entry.demanded or entry.model.pinned)
            if eviction.fits and not (eviction.evict and automatic_only):
                for replica_id in eviction.evict:
                    self._stop(self._entries[replica_id], f"makes room for {entry.model.name}")
                self._load(entry, group)
            elif eviction.waits_for and not automatic_only:
                entry.reason = eviction.reason
                entry.waiting_since = now if entry.waiting_since is None else entry.waiting_since
                if now - entry.waiting_since >= self._patience_s:
                    self._draining = frozenset(eviction.must_stop)
                self._start_overtaking(eviction.must_stop, now, budget, group)
                return
            else:
                entry.reason = "not preloaded: no room now" if automatic_only else ""
            self._leave_queue(entry)

    def _start_overtaking(self, stopping: Collection[str], now: float, budget: int, group: asyncio.TaskGroup) -> None:
        """Start loads that have room behind the first, which waits until the engines ``stopping`` are gone."""
        first = self._queue[0].model.needed_bytes
        for entry in self._queue[1:]:
            needed = entry.model.needed_bytes
            if entry.phase is _Phase.COLD and placement.may_overtake(
                needed, first, stopping, self._running(now), budget
            ):
                self._load(entry, group)
                self._leave_queue(entry)

    def _leave_queue(self, entry: _Entry) -> None:
        """Remove a model that loads or has no room; a pinned one is queued again as soon as it has room."""
        self._queue.remove(entry)
        entry.demanded, entry.automatic = False, entry.model.pinned and entry.phase is _Phase.COLD
        entry.waiting_since = None

    def _load(self, entry: _Entry, group: asyncio.TaskGroup) -> None:
        # A hanging engine is in backoff while it is being ended, and holds its memory until then.
        ending = [
            other.task
            for other in self._entries.values()
            if other.phase in {_Phase.STOPPING, _Phase.BACKOFF} and other.task is not None and not other.ended
        ]
        entry.phase, entry.reason, entry.progress, entry.used = _Phase.LOADING, "", None, False
        entry.stop.clear()
        entry.task = group.create_task(self._run_engine(entry, ending))

    def _stop(self, entry: _Entry, reason: str) -> None:
        entry.phase, entry.reason = _Phase.STOPPING, reason
        entry.stop.set()

    async def _run_engine(self, entry: _Entry, ending: Sequence[asyncio.Task[None]]) -> None:
        """Run one engine from start to end, once the tasks ``ending`` have released their memory."""
        try:
            if ending:
                await asyncio.wait(ending)
            began = asyncio.get_running_loop().time()
            entry.engine = self._launcher.start(entry.model)
            async with entry.engine as engine:
                self._ready(entry, engine, began)
                await self._until_end(entry, engine)
            entry.phase, entry.reason, entry.failures = _Phase.COLD, "", 0
        except (PromptAIError, OSError) as error:
            self._failed(entry, error)
        finally:
            entry.engine, entry.url, entry.progress = None, "", None
            self._changed.set()

    def _ready(self, entry: _Entry, engine: LocalEngine, began: float) -> None:
        now = asyncio.get_running_loop().time()
        entry.phase, entry.url, entry.progress = _Phase.READY, engine.base_url, None
        entry.load_s = now - began
        entry.ready_at = entry.used_at = now
        self._changed.set()
        self._publish()

    async def _until_end(self, entry: _Entry, engine: LocalEngine) -> None:
        """
        Wait until the engine is to be stopped.

        Raises:
            EngineDiedError: The engine exited or hangs.
        """
        while not entry.stop.is_set():
            death = await engine.death()
            if death is not None and not entry.stop.is_set():  # otherwise it is being ended already
                self._failed(entry, death)
                self._publish()
                raise death
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DEATH_POLL_S):
                    await entry.stop.wait()

    def _failed(self, entry: _Entry, error: Exception) -> None:
        """Back off: not at all after the first death of a stable engine, otherwise twice as long as last time."""
        if entry.phase is _Phase.BACKOFF:
            return
        now = asyncio.get_running_loop().time()
        died = entry.phase is _Phase.READY
        entry.failures = 1 if died and now - entry.ready_at >= _STABLE_S else entry.failures + 1
        doublings = entry.failures - (2 if died else 1)
        backoff_s = 0.0 if doublings < 0 else min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2.0 ** min(doublings, 10))
        entry.phase, entry.retry_at = _Phase.BACKOFF, now + backoff_s
        entry.reason, entry.url = _one_line(error), ""
        _LOG.warning("%s: %s", entry.id, entry.reason)

    def _publish(self) -> None:
        if self._publish_to is not None:
            self._publish_to([entry.replica(draining=entry.id in self._draining) for entry in self._entries.values()])


def _one_line(error: Exception) -> str:
    """Return the message in one line; without the paths of system errors, because clients read it."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())
