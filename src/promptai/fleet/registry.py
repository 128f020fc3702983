"""All replicas in one place, whoever knows of them.

A list of boards, the engines of this machine and, later, a cluster each know some replicas and
learn of changes at their own pace. The router wants one thing that does not change while it
reads it. So sources publish, and the registry makes a snapshot of what they published last:

    source ──publish──▶ feed ─┐
    source ──publish──▶ feed ─┼─▶ snapshot, version + 1 ──▶ subscribers
    source ──publish──▶ feed ─┘   (only when something differs)

A source that fails takes nothing with it: its replicas are down, and it is started again after
a rest. When settings are read again, what has not changed goes on undisturbed, and what was
removed first finishes what it has. Where another source of its name follows, no model is missing
in between. Of two replicas with one id the first is kept, because
requests, caches and breakers are booked under that id.

Everything happens on one event loop. Subscribers are called at once and must not wait.
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
#: The longest answer that a removed replica is given time for.
DRAIN_S = 600.0
_RESTARTING, _REMOVED = "settings were changed; it is started again", "was removed from the settings"


class _Drain(NamedTuple):
    """How a removed source drains; see ``_Feed.drain``."""

    leaving: bool
    placeholders: bool
    returning: Container[str] | None
    still_serving: Container[str]


class Registry:
    """
    The fleet as a whole.

    Args:
        sources: In the order in which their replicas are listed; of one name only the first counts.
        drain_s: After this long the replicas of a removed source are gone, whatever they still do.
        busy: How many requests are in flight on a replica that has not been forgotten; the router's own count.

    Attributes:
        problems: What is wrong with the fleet's configuration, one line each.
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
        """The fleet as it is now."""
        return self._snapshot

    def subscribe(self, callback: Callable[[Snapshot], None]) -> Callable[[], None]:
        """Call ``callback`` at every change, until what this returns is called."""
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._subscribers.remove(callback)

        return unsubscribe

    def wake(self, replica_id: str) -> None:
        """A cold replica is wanted; nothing happens for one that is not known or is being removed."""
        for feed in self._feeds:
            if any(replica.id == replica_id for replica in feed.replicas):
                feed.source.wake(replica_id)
                return

    def touch(self, replica_id: str) -> None:
        """A replica is being used: what is ended because nobody needs it looks at that."""
        for feed in self._feeds:
            if any(replica.id == replica_id for replica in feed.replicas):
                feed.source.touch(replica_id)
                return

    def replace(self, sources: Sequence[Source]) -> None:
        """
        Let these be the sources from now on.

        One whose name and configuration are already there goes on. The replicas of one that is not
        named any more drain until each is forgotten; a source of the same name takes them over as
        soon as it has published for the first time. What that one says is loading goes on until then
        as its predecessor says, if both name the same URL: it may not have been asked yet.

        A ``exclusive`` source begins when its predecessor has ended. Until it has published, everything that
        the predecessor had is listed as draining, whether it has something to finish or not, so that
        requests wait for it; what the successor will not have is listed as leaving, and nobody waits.
        Models that only the successor has are missing until then.
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
        """A replica that is being removed has nothing left to do."""
        for feed in self._leaving:
            feed.forget(replica_id)
        self._rebuild()

    async def run(self) -> None:
        """Run all sources until cancelled, and end them then."""
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
        """Wait until a removed source has nothing left to do, or too long, then end it."""
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
        """Only a exclusive source has engines that end with it: what others list finishes its answers unseen."""
        if feed.source.exclusive:
            cut = sum(self._busy(replica.id) for replica in feed.unfinished)
            _LOG.warning(
                "source %s is ended: its answers had %g s to finish; still under way and cut off: %d",
                feed.source.name,
                self._drain_s,
                cut,
            )

    def _rebuild(self) -> None:
        """Make a snapshot of what was published last, and tell it if it differs."""
        merged: dict[str, Replica] = {}
        origin: dict[str, str] = {}
        problems = [f"source {name} is there more than once; the first one counts" for name in self._repeated]
        for feed in self._feeds:
            for replica in feed.replicas:
                if replica.id in merged:
                    kept = origin[replica.id]
                    problems.append(
                        f"replica {replica.id} of {feed.source.name} is left out: {kept} has one of that id"
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
        """Add what removed sources still have, as what follows each of them makes it."""
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
            except Exception:  # noqa: BLE001  a border: whoever listens must not end the source that just published
                _LOG.exception("a subscriber of the fleet failed")


class _Feed:
    """
    One source as the registry runs it, and what it published last.

    Attributes:
        replicas: As the fleet sees them.
        spoken: It has published.
        done: It was removed, and none of its replicas has anything left to do.
        ended: It was removed, and does not run any more.
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
        """Run the source, again and again if need be, once the tasks ``predecessors`` have ended."""
        if predecessors:
            await asyncio.wait(predecessors)
        loop, backoff_s = asyncio.get_running_loop(), _FIRST_BACKOFF_S
        while True:
            began = loop.time()
            try:
                await self.source.run(self._publish)
                reason = "it ended by itself"
            except Exception as error:  # noqa: BLE001  a border: what one source gets wrong must not end the others
                reason = _one_line(error)
                _LOG.debug("source %s", self.source.name, exc_info=True)
            if loop.time() - began > _LONGEST_BACKOFF_S:
                backoff_s = _FIRST_BACKOFF_S
            _LOG.error("source %s failed: %s; it is started again in %.0f s", self.source.name, reason, backoff_s)
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
        Let only those go on that may still be answering, and those drain; nothing that has a new source.

        Args:
            leaving: No other source of its name follows: they will not be back.
            stands_in: Show also what has nothing to finish, until the successor says what there is.
            returning: Ids of those stand-ins that the successor will have; ``None``: nobody knows, all of them.
            going_on: Ids of those that stay as they are.
        """
        self._drain = _Drain(leaving, placeholders, returning, still_serving)
        self._released |= {replica.id for replica in self._published if replica.id in taken_over}
        self._filter()

    def still_serving(self, urls: Container[str]) -> list[Replica]:
        """What takes requests at these URLs and has not been taken over."""
        return [one for one in self._published if one.url in urls and one.usable and one.id not in self._released]

    @property
    def unfinished(self) -> list[Replica]:
        """What may still be answering."""
        return [replica for replica in self._published if self._may_be_busy(replica)]

    def _may_be_busy(self, replica: Replica) -> bool:
        return replica.state in {State.READY, State.DRAINING} and replica.id not in self._released

    def forget(self, replica_id: str) -> None:
        """Let one replica go that drains."""
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
    """What went wrong first, without the groups that tasks wrap it in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
