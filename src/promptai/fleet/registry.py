"""All replicas in one place, whoever knows of them.

A list of boards, the engines of this machine and, later, a cluster each know some replicas and
learn of changes at their own pace. The router wants one thing that does not change while it
reads it. So sources publish, and the registry makes a snapshot of what they published last:

    source ──publish──▶ feed ─┐
    source ──publish──▶ feed ─┼─▶ snapshot, version + 1 ──▶ subscribers
    source ──publish──▶ feed ─┘   (only when something differs)

A source that fails takes nothing with it: its replicas are down, and it is started again after
a rest. When settings are read again, what has not changed goes on undisturbed, and what was
removed first finishes what it has. Of two replicas with one id the first is kept, because
requests, caches and breakers are booked under that id.

Everything happens on one event loop. Subscribers are called at once and must not wait.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Container, Sequence

import msgspec

from promptai.fleet.replica import Replica, Snapshot, State
from promptai.fleet.source import Source

_LOG = logging.getLogger("promptai.fleet")
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 60.0
#: The longest answer that a removed replica is given time for.
DRAIN_S = 600.0


class Registry:
    """
    The fleet as a whole.

    Args:
        sources: In the order in which their replicas are listed; of one name only the first counts.
        drain_s: After this long the replicas of a removed source are gone, whatever they still do.

    Attributes:
        troubles: What is wrong with the fleet's configuration, one line each.
    """

    def __init__(self, sources: Sequence[Source], *, drain_s: float = DRAIN_S) -> None:
        self.troubles: tuple[str, ...] = ()
        self._drain_s = drain_s
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
        soon as it has published for the first time.
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
                self._group.create_task(self._see_out(feed))
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
                before = [
                    old.task
                    for old in self._leaving
                    if feed.source.sole and old.source.name == feed.source.name and old.task is not None
                ]
                feed.task = group.create_task(feed.run(before))

    async def _see_out(self, feed: "_Feed") -> None:
        """Wait until a removed source has nothing left to do, then end it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await feed.done.wait()
        if feed.task is not None:
            feed.task.cancel()
            await asyncio.wait([feed.task])
        self._leaving.remove(feed)
        self._rebuild()

    def _rebuild(self) -> None:
        """Make a snapshot of what was published last, and tell it if it differs."""
        merged: dict[str, Replica] = {}
        origin: dict[str, str] = {}
        troubles = [f"source {name} is there more than once; the first one counts" for name in self._repeated]
        for feed in self._feeds:
            for replica in feed.replicas:
                if replica.id in merged:
                    kept = origin[replica.id]
                    troubles.append(
                        f"replica {replica.id} of {feed.source.name} is left out: {kept} has one of that id"
                    )
                else:
                    merged[replica.id], origin[replica.id] = replica, feed.source.name
        silent = {feed.source.name for feed in self._feeds if not (feed.spoken or feed.source.sole)}
        for feed in self._leaving:
            successor_silent = feed.source.name in silent
            if not successor_silent:
                feed.drain(taken_over=merged.keys())
            for replica in feed.replicas:
                merged.setdefault(replica.id, replica)
        self.troubles = tuple(troubles)
        replicas = tuple(merged.values())
        if replicas != self._snapshot.replicas:
            self._snapshot = Snapshot(self._snapshot.version + 1, replicas)
            self._tell()

    def _tell(self) -> None:
        for callback in tuple(self._subscribers):
            try:
                callback(self._snapshot)
            except Exception:  # noqa: BLE001  a border: whoever listens must not end the source that just published
                _LOG.exception("a subscriber of the fleet failed")


class _Feed:
    """One source as the registry runs it, and what it published last."""

    def __init__(self, source: Source, changed: Callable[[], None]) -> None:
        self.source = source
        self.replicas: tuple[Replica, ...] = ()
        self.spoken = False
        self.task: asyncio.Task[None] | None = None
        self.done = asyncio.Event()
        self._changed = changed
        self._draining = False
        self._gone: set[str] = set()

    async def run(self, before: Sequence[asyncio.Task[None]]) -> None:
        """Run the source, again and again if need be, once the tasks ``before`` have ended."""
        if before:
            await asyncio.wait(before)
        loop, rest_s = asyncio.get_running_loop(), _FIRST_REST_S
        while True:
            began = loop.time()
            try:
                await self.source.run(self._publish)
                reason = "it ended by itself"
            except Exception as error:  # noqa: BLE001  a border: what one source gets wrong must not end the others
                reason = _one_line(error)
                _LOG.debug("source %s", self.source.name, exc_info=True)
            if loop.time() - began > _LONGEST_REST_S:
                rest_s = _FIRST_REST_S
            _LOG.error("source %s failed: %s; it is started again in %.0f s", self.source.name, reason, rest_s)
            self._publish(
                [
                    msgspec.structs.replace(replica, state=State.DOWN, reason=f"its source failed: {reason}")
                    for replica in self.replicas
                ]
            )
            await asyncio.sleep(rest_s)
            rest_s = min(2 * rest_s, _LONGEST_REST_S)

    def drain(self, *, taken_over: Container[str]) -> None:
        """Let only those go on that may still be answering, and those drain; nothing that has a new source."""
        self._draining = True
        self._gone |= {replica.id for replica in self.replicas if replica.id in taken_over}
        self._filter(self.replicas)

    def forget(self, replica_id: str) -> None:
        """Let one replica go that drains."""
        if self._draining:
            self._gone.add(replica_id)

    def _publish(self, replicas: Sequence[Replica]) -> None:
        self.spoken = True
        self._filter(replicas)
        self._changed()

    def _filter(self, replicas: Sequence[Replica]) -> None:
        self.replicas = tuple(replicas)
        if self._draining:
            self.replicas = tuple(
                msgspec.structs.replace(
                    replica, state=State.DRAINING, reason="it was removed from the settings", leaving=True
                )
                for replica in replicas
                if replica.state in {State.READY, State.DRAINING} and replica.id not in self._gone
            )
            if not self.replicas:
                self.done.set()


def _one_line(error: BaseException) -> str:
    """What went wrong first, without the groups that tasks wrap it in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
