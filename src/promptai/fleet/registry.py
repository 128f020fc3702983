"""Merge the replicas of all sources into one immutable snapshot of the fleet.

Each source (a list of boards, the engines of this machine, later a cluster) knows some replicas and learns of
changes at its own pace, while the router needs a view that does not change as it reads it. So sources publish,
and the registry makes a snapshot of their latest publications:

    source ──publish──▶ feed ─┐
    source ──publish──▶ feed ─┼─▶ snapshot, version + 1 ──▶ subscribers
    source ──publish──▶ feed ─┘   (only when something differs)

When a source fails, its replicas are down and the source restarts after a backoff; other sources are not
affected. After a reload of the settings, unchanged sources keep running and removed ones drain. When a source
replaces another of the same name, no model is missing in between. If two replicas share an id, the first is
kept, because requests, caches and breakers are booked under that id.

Everything runs on one event loop. Subscribers are called synchronously and must not block.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import msgspec

from promptai.fleet.replica import Replica, Snapshot, State
from promptai.fleet.source import Source

_LOG = logging.getLogger("promptai.fleet")
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 1.0, 60.0
#: Time that a removed replica has to finish its answers.
DRAIN_S = 600.0
_RESTARTING, _REMOVED = "restarting with changed settings", "removed from the settings"


class _Drain(NamedTuple):
    """How a removed source drains; the fields are the arguments of ``_Feed.drain``."""

    leaving: bool
    placeholders: bool
    returning: Container[str] | None
    still_serving: Container[str]


class Registry:
    """
    The fleet as a whole.

    Args:
        sources: In the order in which their replicas are listed; the first of each name is used.
        drain_s: Time after which the replicas of a removed source disappear, even if they are still answering.
        busy: Requests in flight on a replica, as counted by the router.

    Attributes:
        problems: Problems of the configuration, one line each.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        drain_s: float = DRAIN_S,
        busy: Callable[[str], int] = lambda _replica_id: 1,
    ) -> None:
        self.problems: tuple[str, ...] = ()
        self._drain_s = drain_s
        self._busy = busy
        self._snapshot = Snapshot()
        self._subscribers: list[Callable[[Snapshot], None]] = []
        self._feeds: list[_Feed] = []
        self._leaving: list[_Feed] = []
        self._repeated: tuple[str, ...] = ()
        self._group: asyncio.TaskGroup | None = None
        self.replace(sources)

    @property
    def snapshot(self) -> Snapshot:
        """The current snapshot."""
        return self._snapshot

    def subscribe(self, callback: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call ``callback`` at every change; returns the function that ends the subscription."""
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(callback)

        return unsubscribe

    def wake(self, replica_id: str) -> None:
        """Start loading a cold replica; ignores unknown replicas and those being removed."""
        for feed in self._feeds:
            if any(replica.id == replica_id for replica in feed.replicas):
                feed.source.wake(replica_id)
                return

    def touch(self, replica_id: str) -> None:
        """Record that a replica is in use, for sources that stop idle engines."""
        for feed in self._feeds:
            if any(replica.id == replica_id for replica in feed.replicas):
                feed.source.touch(replica_id)
                return

    def replace(self, sources: Sequence[Source]) -> None:
        """
        Replace the sources.

        A source with unchanged name and configuration keeps running. The replicas of a removed source drain until
        each is forgotten; a successor of the same name takes them over with its first publication. Where the
        successor then publishes a replica as loading, perhaps only because it has not probed it yet, the
        predecessor's replica with the same URL stays in use.

        An ``exclusive`` source starts after its predecessor has ended. Until its first publication, all replicas of
        the predecessor are listed as draining, even idle ones, so that requests wait for the successor. Replicas
        that the successor will not have are listed as leaving, and no request waits for them. Models that only the
        successor has are missing until then.
        """
        names = [source.name for source in sources]
        self._repeated = tuple(dict.fromkeys(name for name in names if names.count(name) > 1))
        known = {feed.source.name: feed for feed in self._feeds}
        feeds: dict[str, _Feed] = {}
        for source in sources:
            old = known.get(source.name)
            same = old is not None and old.source.configuration == source.configuration
            feeds.setdefault(source.name, old if old is not None and same else _Feed(source, self._rebuild))
        removed = [feed for feed in self._feeds if feed not in feeds.values()]
        self._feeds = list(feeds.values())
        if self._group is not None:
            self._leaving += removed
            self._start_new(self._group)
            for feed in removed:
                self._group.create_task(self._retire(feed))
        self._rebuild()

    def forget(self, replica_id: str) -> None:
        """Drop a removed replica that has no requests left."""
        for feed in self._leaving:
            feed.forget(replica_id)
        self._rebuild()

    async def run(self) -> None:
        """Run all sources until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._start_new(group)
                await asyncio.get_running_loop().create_future()
        finally:
            self._group = None
            self._leaving = []

    def _start_new(self, group: asyncio.TaskGroup) -> None:
        for feed in self._feeds:
            if feed.task is None or feed.task.done():
                predecessors = [
                    old.task
                    for old in self._leaving
                    if feed.source.exclusive and old.source.name == feed.source.name and old.task is not None
                ]
                feed.task = group.create_task(feed.run(predecessors))

    async def _retire(self, feed: "_Feed") -> None:
        """End a removed source once it is idle, or after ``drain_s``."""
        try:
            async with asyncio.timeout(self._drain_s):
                await feed.done.wait()
        except TimeoutError:
            self._log_cut_off(feed)
        if feed.task is not None:
            feed.task.cancel()
            await asyncio.wait([feed.task])
        feed.ended = True
        self._rebuild()

    def _log_cut_off(self, feed: "_Feed") -> None:
        """Log the answers that end with a source; only an exclusive source owns engines that end with it."""
        if feed.source.exclusive:
            cut = sum(self._busy(replica.id) for replica in feed.unfinished)
            _LOG.warning(
                "source %s ended after %g s of draining; answers cut off: %d",
                feed.source.name,
                self._drain_s,
                cut,
            )

    def _rebuild(self) -> None:
        """Make a snapshot of the latest publications; notify the subscribers if it differs."""
        merged: dict[str, Replica] = {}
        origin: dict[str, str] = {}
        problems = [f"source {name} is configured more than once; only the first is used" for name in self._repeated]
        for feed in self._feeds:
            for replica in feed.replicas:
                if replica.id in merged:
                    kept = origin[replica.id]
                    problems.append(
                        f"replica {replica.id} of {feed.source.name} is ignored: {kept} has a replica with the same id"
                    )
                else:
                    merged[replica.id], origin[replica.id] = replica, feed.source.name
        self._merge_leaving(merged)
        self.problems = tuple(problems)
        replicas = tuple(merged.values())
        if replicas != self._snapshot.replicas:
            self._snapshot = Snapshot(self._snapshot.version + 1, replicas)
            self._notify()

    def _merge_leaving(self, merged: dict[str, Replica]) -> None:
        """Add the replicas that removed sources still have, depending on the successor of each."""
        successors = {feed.source.name: feed for feed in self._feeds}
        staying = []
        for feed in self._leaving:
            after = successors.get(feed.source.name)
            awaited = after if after is not None and after.source.exclusive and not after.has_published else None
            if feed.ended and awaited is None:
                continue
            staying.append(feed)
            if awaited is not None:
                feed.drain(taken_over=(), placeholders=True, returning=awaited.source.replica_ids)
            elif after is None:
                feed.drain(taken_over=merged, leaving=True)
            elif after.has_published:
                unsure = {replica.url for replica in after.replicas if replica.state is State.LOADING}
                still_serving = {
                    replica.id: replica
                    for replica in feed.still_serving(unsure)
                    if replica.id not in merged or merged[replica.id] in after.replicas
                }
                merged.update(still_serving)
                feed.drain(taken_over=merged.keys() - still_serving.keys(), still_serving=still_serving, leaving=True)
            for replica in feed.replicas:
                merged.setdefault(replica.id, replica)
        self._leaving = staying

    def _notify(self) -> None:
        for callback in tuple(self._subscribers):
            try:
                callback(self._snapshot)
            except Exception:  # noqa: BLE001  a failing subscriber must not end the source that just published
                _LOG.exception("a fleet subscriber failed")


class _Feed:
    """
    A running source and its latest publication.

    Attributes:
        replicas: The replicas as listed in the fleet.
        has_published: It has published at least once.
        done: It was removed, and its replicas are idle.
        ended: It was removed and has stopped.
    """

    def __init__(self, source: Source, changed: Callable[[], None]) -> None:
        self.source = source
        self.replicas: tuple[Replica, ...] = ()
        self.has_published = False
        self.task: asyncio.Task[None] | None = None
        self.done = asyncio.Event()
        self.ended = False
        self._changed = changed
        self._published: tuple[Replica, ...] = ()
        self._drain: _Drain | None = None
        self._released: set[str] = set()

    async def run(self, predecessors: Sequence[asyncio.Task[None]]) -> None:
        """Run the source once the tasks ``predecessors`` have ended; restart it whenever it fails."""
        if predecessors:
            await asyncio.wait(predecessors)
        loop, backoff_s = asyncio.get_running_loop(), _FIRST_BACKOFF_S
        while True:
            began = loop.time()
            try:
                await self.source.run(self._publish)
                reason = "it ended unexpectedly"
            except Exception as error:  # noqa: BLE001  a failing source must not end the others
                reason = _one_line(error)
                _LOG.debug("source %s", self.source.name, exc_info=True)
            if loop.time() - began > _LONGEST_BACKOFF_S:
                backoff_s = _FIRST_BACKOFF_S
            _LOG.error("source %s failed: %s; restarting in %.0f s", self.source.name, reason, backoff_s)
            self._publish(
                [
                    msgspec.structs.replace(replica, state=State.DOWN, reason=f"its source failed: {reason}")
                    for replica in self._published
                ]
            )
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def drain(
        self,
        *,
        taken_over: Container[str],
        leaving: bool = False,
        placeholders: bool = False,
        returning: Container[str] | None = None,
        still_serving: Container[str] = (),
    ) -> None:
        """
        List only the replicas that may still be answering, as draining.

        Args:
            taken_over: Ids of replicas that another source publishes now; never listed.
            leaving: The replicas will not be back: no source lists them any more.
            placeholders: List idle replicas too, until the successor publishes.
            returning: Ids of the placeholders that the successor will have; ``None``: unknown, assume all.
            still_serving: Ids of replicas to list unchanged.
        """
        self._drain = _Drain(leaving, placeholders, returning, still_serving)
        self._released |= {replica.id for replica in self._published if replica.id in taken_over}
        self._filter()

    def still_serving(self, urls: Container[str]) -> list[Replica]:
        """Usable replicas at these URLs that no other source has taken over."""
        return [one for one in self._published if one.url in urls and one.usable and one.id not in self._released]

    @property
    def unfinished(self) -> list[Replica]:
        """Replicas that may still be answering."""
        return [replica for replica in self._published if self._may_be_busy(replica)]

    def _may_be_busy(self, replica: Replica) -> bool:
        return replica.state in {State.READY, State.DRAINING} and replica.id not in self._released

    def forget(self, replica_id: str) -> None:
        """Drop a draining replica."""
        if self._drain is not None and replica_id not in self._drain.still_serving:
            self._released.add(replica_id)

    def _publish(self, replicas: Sequence[Replica]) -> None:
        self.has_published = True
        self._published = tuple(replicas)
        self._filter()
        self._changed()

    def _filter(self) -> None:
        drain = self._drain
        if drain is None:
            self.replicas = self._published
            return
        busy = [
            replica for replica in self._published if replica.id in drain.still_serving or self._may_be_busy(replica)
        ]
        if not busy:
            self.done.set()
        self.replicas = tuple(
            replica if replica.id in drain.still_serving else _draining(replica, drain)
            for replica in (self._published if drain.placeholders else busy)
        )


def _draining(replica: Replica, drain: _Drain) -> Replica:
    returns = drain.placeholders and (drain.returning is None or replica.id in drain.returning)
    return msgspec.structs.replace(
        replica,
        state=State.DRAINING,
        reason=_RESTARTING if returns else _REMOVED,
        leaving=drain.leaving or (drain.placeholders and not returns),
    )


def _one_line(error: BaseException) -> str:
    """Describe the first error inside the exception groups that tasks add."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
