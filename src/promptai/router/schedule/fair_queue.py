"""Let everybody have their turn: a queue that is fair between keys, not between requests.

First come, first served is unfair to those who ask little: a script that sends a thousand
prompts makes the next person wait for all of them. So turns go to keys (a person, a team, a
program), by start-time fair queuing (Goyal, Vin, Cheng: SIGCOMM 1996). Each key has a finish
tag, the tokens it has been given so far on a clock that all keys share; the virtual time is
where the latest one to be served began. An item starts where its key has finished, and not
before the virtual time, so that an idle key saves nothing up; the smallest start is next.

Two things differ from the paper, because an item may leave from anywhere: its client goes, or
the dispatcher places it while the one before it waits for a model that loads.

- Tags are worked out when they are asked for, not on arrival. Whoever goes is not charged.
- A key that has to wait for its model gains no credit by it. With credit, it would hold up
  everybody else once the model is there.

Interactive items come before those of the batch class, until one of the latter has waited for
``patience_s``. Pure: no clock; ``now`` is in seconds of a monotonic one.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T", bound=Hashable)


class _Entry(msgspec.Struct, frozen=True):
    """What is known of a queued item; ``cost`` is what its key will be charged."""

    key: str
    cost: float
    batch: bool
    first: bool
    since: float


class FairQueue(Generic[T]):
    """
    Items that wait, each of a key and of an estimated cost.

    Args:
        patience_s: After so long a batch item counts as interactive.
        remembered: Keys whose finish tags are kept. Forgetting one forgives it at most what it was given
            beyond its turn, so that memory stays flat whatever keys come along.
    """

    def __init__(self, *, patience_s: float = 300.0, remembered: int = 4096) -> None:
        self._patience_s = patience_s
        self._remembered = remembered
        self._entries: dict[T, _Entry] = {}  # in the order of arrival
        self._finish: dict[str, float] = {}  # in the order of last service
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
            item: Anything hashable that is not queued yet.
            cost: What it is going to take, in estimated tokens.
            first: It was served before and lost that: it comes before all others, and is not charged again.

        Raises:
            ValueError: It is queued already, or its cost is not above 0.
        """
        if item in self._entries:
            raise ValueError("the item is in the queue already")
        if not cost > 0:  # also NaN
            raise ValueError(f"a cost must be above 0, not {cost}")
        self._entries[item] = _Entry(key, 0.0 if first else cost, batch, first, now)

    def remove(self, item: T) -> bool:
        """Drop an item without charging its key; ``False``: it was not there (any more)."""
        return self._entries.pop(item, None) is not None

    def take(self, item: T) -> float:
        """
        Drop an item because it is served now, and charge its key.

        Any item may be taken. Its key is charged as if it had been the key's first: otherwise one that is
        taken from far behind would carry the virtual time, and so all newcomers, beyond those before it.

        Returns:
            What its key is charged: its cost, or nothing where it was charged before.

        Raises:
            KeyError: It is not in the queue.
        """
        entry = self._entries.pop(item)
        if not entry.first:
            self._virtual = self._start(entry.key)
            self._remember(entry.key, self._virtual + entry.cost)
        return entry.cost

    def settle(self, key: str, difference: float) -> None:
        """
        Correct what a key was charged, once the real cost is known.

        Args:
            difference: Real minus estimated cost.
        """
        self._remember(key, self._finish.get(key, self._virtual) + difference)

    def ordered(self, now: float) -> list[T]:
        """All items, whose turn it is first."""
        first: list[T] = []
        interactive: list[tuple[T, _Entry]] = []
        batch: list[tuple[T, _Entry]] = []
        for item, entry in self._entries.items():
            if entry.first:
                first.append(item)
                continue
            (batch if self._waits_behind(entry, now) else interactive).append((item, entry))
        reached: dict[str, float] = {}
        return first + self._by_start(interactive, reached) + self._by_start(batch, reached)

    def patient(self, item: T, now: float) -> bool:
        """
        Whether an item is of the batch class and still lets every interactive one go before it.

        Raises:
            KeyError: It is not in the queue.
        """
        return self._waits_behind(self._entries[item], now)

    def position(self, item: T, now: float) -> int:
        """
        How many items are before this one.

        Raises:
            KeyError: It is not in the queue.
        """
        if item not in self._entries:
            raise KeyError(item)
        return self.ordered(now).index(item)

    def _waits_behind(self, entry: _Entry, now: float) -> bool:
        return entry.batch and not entry.first and now - entry.since < self._patience_s

    def _by_start(self, waiting: list[tuple[T, _Entry]], reached: dict[str, float]) -> list[T]:
        """Sort by start tag; ``reached`` is where each key's next item starts, and is carried on."""
        tagged: list[tuple[float, T]] = []
        for item, entry in waiting:
            start = reached[entry.key] if entry.key in reached else self._start(entry.key)
            reached[entry.key] = start + entry.cost
            tagged.append((start, item))
        tagged.sort(key=lambda pair: pair[0])  # stable: equal starts stay in the order of arrival
        return [item for _, item in tagged]

    def _start(self, key: str) -> float:
        return max(self._virtual, self._finish.get(key, 0.0))

    def _remember(self, key: str, finish: float) -> None:
        self._finish.pop(key, None)
        self._finish[key] = finish
        while len(self._finish) > self._remembered:
            del self._finish[next(iter(self._finish))]
