"""A queue that is fair between API keys, not between requests.

First come, first served is unfair to light users: behind a script that sends a thousand prompts, the next person
waits for all of them. So service alternates between keys (a person, a team, a program) by start-time fair queuing
(Goyal, Vin, Cheng: SIGCOMM 1996). Each key has a finish tag: the tokens it has been served so far, on a clock shared
by all keys. The virtual time is the start tag of the item served last. An item starts at its key's finish tag, but not
before the virtual time, so an idle key saves up no credit; the smallest start tag is served next.

Two things differ from the paper, because an item may leave from any position: its client disconnects, or the
dispatcher places it while an earlier one waits for a model to load.

- Tags are computed when they are needed, not on arrival. An item that leaves is not charged.
- A key that waits for its model gains no credit. With credit it would block all other keys once the model is loaded.

Interactive items come before batch items, until a batch item has waited for ``patience_s``. Pure: no clock; ``now`` is
in seconds of a monotonic clock.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T", bound=Hashable)


class _Entry(msgspec.Struct, frozen=True):
    """A queued item's bookkeeping; ``cost`` is the later charge to its key."""

    key: str
    cost: float
    batch: bool
    first: bool
    since: float


class FairQueue(Generic[T]):
    """
    Waiting items, each with a key and an estimated cost.

    Args:
        patience_s: Time after which a batch item counts as interactive.
        remembered: Maximum number of finish tags kept, so that memory stays flat. A forgotten key loses at most the
            debt of its last service.
    """

    def __init__(self, *, patience_s: float = 300.0, remembered: int = 4096) -> None:
        self._patience_s = patience_s
        self._remembered = remembered
        self._entries: dict[T, _Entry] = {}  # in order of arrival
        self._finish: dict[str, float] = {}  # in order of last service
        self._virtual = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def push(
        self,
        item: T,
        *,
        key: str,
        cost: float,
        batch: bool = False,
        first: bool = False,
        now: float,
    ) -> None:
        """
        Add an item.

        Args:
            item: A hashable value that is not queued yet.
            cost: Estimated tokens.
            first: The item was served before and lost its slot: it precedes all others and is not charged again.

        Raises:
            ValueError: The item is already queued, or its cost is not above 0.
        """
        if item in self._entries:
            raise ValueError("the item is already queued")
        if not cost > 0:  # also NaN
            raise ValueError(f"a cost must be above 0, not {cost}")
        self._entries[item] = _Entry(key, 0.0 if first else cost, batch, first, now)

    def remove(self, item: T) -> bool:
        """Drop an item without charging its key; ``False`` if it is not in the queue."""
        return self._entries.pop(item, None) is not None

    def take(self, item: T) -> float:
        """
        Drop an item that is served now, and charge its key.

        Any item may be taken. Its key is charged as if the item were the key's first: otherwise an item taken from
        far behind would move the virtual time, and with it all newcomers, past the items ahead of it.

        Returns:
            The tokens charged; 0 if the item was charged before.

        Raises:
            KeyError: The item is not in the queue.
        """
        entry = self._entries.pop(item)
        if not entry.first:
            self._virtual = self._start(entry.key)
            self._remember(entry.key, self._virtual + entry.cost)
        return entry.cost

    def settle(self, key: str, difference: float) -> None:
        """
        Correct the charge to a key once the real cost is known.

        Args:
            difference: Real minus estimated tokens.
        """
        self._remember(key, self._finish.get(key, self._virtual) + difference)

    def ordered(self, now: float) -> list[T]:
        """All items in order of service."""
        first: list[T] = []
        interactive: list[tuple[T, _Entry]] = []
        batch: list[tuple[T, _Entry]] = []
        for item, entry in self._entries.items():
            if entry.first:
                first.append(item)
                continue
            (batch if self._yields(entry, now) else interactive).append((item, entry))
        reached: dict[str, float] = {}
        return first + self._by_start(interactive, reached) + self._by_start(batch, reached)

    def yields(self, item: T, now: float) -> bool:
        """
        Whether an item is a batch item that still yields to every interactive one.

        Raises:
            KeyError: The item is not in the queue.
        """
        return self._yields(self._entries[item], now)

    def position(self, item: T, now: float) -> int:
        """
        Number of items ahead of this one.

        Raises:
            KeyError: The item is not in the queue.
        """
        if item not in self._entries:
            raise KeyError(item)
        return self.ordered(now).index(item)

    def _yields(self, entry: _Entry, now: float) -> bool:
        return entry.batch and not entry.first and now - entry.since < self._patience_s

    def _by_start(self, waiting: list[tuple[T, _Entry]], reached: dict[str, float]) -> list[T]:
        """Sort by start tag; ``reached``: start tag of each key's next item, updated here."""
        tagged: list[tuple[float, T]] = []
        for item, entry in waiting:
            start = reached[entry.key] if entry.key in reached else self._start(entry.key)
            reached[entry.key] = start + entry.cost
            tagged.append((start, item))
        tagged.sort(key=lambda pair: pair[0])  # stable: equal tags keep the order of arrival
        return [item for _, item in tagged]

    def _start(self, key: str) -> float:
        return max(self._virtual, self._finish.get(key, 0.0))

    def _remember(self, key: str, finish: float) -> None:
        self._finish.pop(key, None)
        self._finish[key] = finish
        while len(self._finish) > self._remembered:
            del self._finish[next(iter(self._finish))]
