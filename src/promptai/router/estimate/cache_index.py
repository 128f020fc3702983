"""What the KV caches of the fleet hold, as far as the gateway can know.

Prefilling a long conversation takes minutes on a board, and seconds where its earlier turns
still lie in a slot's KV cache. Which slot of which replica that is, nobody tells: engines
report what they found in their cache only after the fact. So the gateway remembers what it
sent where.

A slot has room for one conversation. Whatever was in it is lost when another one takes it, or
moves to the engine's prompt cache in ordinary memory, if it has one (tried with b11549: it is
found again there whole). What is pushed out costs something if whoever it belongs to comes back;
``spot`` weighs that against what would have to be computed.

This module is bookkeeping and arithmetic: it reads no clock and holds no text.
"""

from collections.abc import Collection, Iterable
from typing import Protocol

import msgspec

from promptai.router.estimate.prefix import WINDOW, Chain
from promptai.router.estimate.reuse import GAPS, ReuseModel

#: Conversations of one replica that are remembered, and of those the latest that are asked about one by one.
_MOST, _LATEST = 1024, 64


class Capacity(msgspec.Struct, frozen=True):
    """
    What a replica's caches have room for.

    Attributes:
        slots: Conversations, one in each slot.
        host_chars: Of conversations that left their slot, in the engine's prompt cache (llama-server's
            ``--cache-ram``); 0: it has none, and a slot that is taken is lost.
    """

    slots: int
    host_chars: float


class CachedConversation(msgspec.Struct, frozen=True):
    """One conversation in a cache, and since when."""

    chain: Chain
    used_at: float


class SlotChoice(msgspec.Struct, frozen=True):
    """
    What a replica's caches are to a prompt.

    Attributes:
        slot: The slot that it should get; ``None``: none is free.
        cached_chars: Of the prompt, that are cached.
        lost_chars: Of other conversations, that it pushes out, times how likely those go on.
    """

    slot: int | None
    cached_chars: int = 0
    evicted_chars: float = 0.0


class CacheIndex:
    """
    What the caches of each replica hold, by what the gateway itself has sent there.

    Attributes:
        returns: What has been learned of whether conversations go on.
    """

    def __init__(self) -> None:
        self.reuse = ReuseModel()
        self._caches: dict[str, _ReplicaCaches] = {}

    def spot(self, replica_id: str, room: Capacity, prompt: Chain, *, busy: Collection[int], now: float) -> SlotChoice:
        """
        The cheapest spot for ``prompt``: what must be computed, and what is pushed out.

        Args:
            busy: Slots that are in use.
        """
        there = self._caches.get(replica_id)
        return there.spot(room, prompt, busy, now) if there is not None else SlotChoice(_first_free(room, busy))

    def hold(self, replica_id: str, room: Capacity, slot: int, held: Chain, now: float) -> None:
        """A conversation is in a slot's cache now."""
        there, kind = self._caches.get(replica_id), _PromptCache if room.host_chars else _SlotCaches
        if not isinstance(there, kind):
            there = self._caches[replica_id] = kind(self.reuse)
        there.hold(room, slot, CachedConversation(held, now))

    def lose(self, replica_id: str, slot: int | None = None) -> None:
        """What is in a slot, or all that a replica has, is gone or unknown."""
        if slot is None:
            self._caches.pop(replica_id, None)
        elif replica_id in self._caches:
            self._caches[replica_id].lose(slot)

    def expected_returns(self, replica_id: str, *, busy: Collection[int], going: Iterable[Chain], now: float) -> float:
        """
        How many conversations that were left in a replica's caches will go on, as it looks.

        Args:
            busy: Slots that are in use; whatever was in them is either going on or gone.
            going: Prompts that have come; whom they continue is not awaited any more.
        """
        there, awaited, longest = self._caches.get(replica_id), 0.0, GAPS * self.reuse.mean_gap_s
        held = [one for one in there.latest(busy) if now - one.used_at < longest] if there is not None else ()
        prompts = list(going) if held else ()
        for one in held:
            if not any(prompt.begins_with(one.chain) for prompt in prompts):
                awaited += self.reuse.likely(now - one.used_at)
        return awaited

    def chars(self, replica_id: str) -> int:
        """Characters that a replica's caches hold together."""
        return self._caches[replica_id].chars if replica_id in self._caches else 0


class _ReplicaCaches(Protocol):
    """The caches of one replica."""

    @property
    def chars(self) -> int: ...
    def spot(self, room: Capacity, prompt: Chain, busy: Collection[int], now: float) -> SlotChoice: ...
    def hold(self, room: Capacity, slot: int, held: CachedConversation) -> None: ...
    def lose(self, slot: int) -> None: ...
    def latest(self, busy: Collection[int]) -> list[CachedConversation]: ...


class _SlotCaches:
    """Of an engine that has nothing but its slots."""

    def __init__(self, returns: ReuseModel) -> None:
        self._returns = returns
        self._held: dict[int, CachedConversation] = {}

    @property
    def chars(self) -> int:
        return sum(held.chain.chars for held in self._held.values())

    def spot(self, room: Capacity, prompt: Chain, busy: Collection[int], now: float) -> SlotChoice:
        options = []
        for slot in range(room.slots):
            there = self._held.get(slot)
            shared = prompt.shared(there.chain) if there else 0
            lost = (there.chain.chars - shared) * self._returns.likely(now - there.used_at) if there else 0.0
            options.append((prompt.chars - shared + lost, there.used_at if there else -1.0, slot, shared, lost))
        free = [option for option in options if option[2] not in busy]
        if not free:
            return SlotChoice(None, max(option[3] for option in options))
        _, _, slot, shared, lost = min(free)
        return SlotChoice(slot, shared, lost)

    def hold(self, room: Capacity, slot: int, held: CachedConversation) -> None:
        self._held[slot] = held
        for gone in [other for other in self._held if other >= room.slots]:
            del self._held[gone]

    def lose(self, slot: int) -> None:
        self._held.pop(slot, None)

    def latest(self, busy: Collection[int]) -> list[CachedConversation]:
        return [held for slot, held in self._held.items() if slot not in busy]


class _PromptCache:
    """
    Of an engine with a prompt cache: conversations wherever they are, least recently used first.

    Finding what a prompt shares with any of a thousand conversations must not take a thousand looks: a link
    is only there if all links before it are, so that the last one is found by halving.
    """

    def __init__(self, returns: ReuseModel) -> None:
        self.chars = 0
        self._returns = returns
        self._held: dict[int, CachedConversation] = {}  # by the last link
        self._links: dict[int, int] = {}  # how many conversations have it

    def spot(self, room: Capacity, prompt: Chain, busy: Collection[int], now: float) -> SlotChoice:
        low, high = 0, len(prompt.links)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if prompt.links[middle - 1] in self._links else (low, middle - 1)
        shared = low * WINDOW
        lost = self._pushed_out(self.chars + prompt.chars - shared - room.host_chars, now)
        return SlotChoice(_first_free(room, busy), shared, lost)

    def hold(self, room: Capacity, slot: int, held: CachedConversation) -> None:
        del slot  # where it lies, the engine decides
        if not held.chain.links:
            return
        for link in held.chain.links:  # what it goes on from, or the same again
            self._drop(link)
        self._held[held.chain.links[-1]] = held
        self.chars += held.chain.chars
        for link in held.chain.links:
            self._links[link] = self._links.get(link, 0) + 1
        while len(self._held) > _MOST or (len(self._held) > room.slots and self.chars > room.host_chars):
            self._drop(next(iter(self._held)))

    def lose(self, slot: int) -> None:
        """A slot is not all there is: what was in it has been kept."""

    def latest(self, busy: Collection[int]) -> list[CachedConversation]:
        del busy
        found = []
        for held in reversed(self._held.values()):
            found.append(held)
            if len(found) == _LATEST:
                break
        return found

    def _drop(self, last_link: int) -> None:
        held = self._held.pop(last_link, None)
        if held is None:
            return
        self.chars -= held.chain.chars
        for link in held.chain.links:
            self._links[link] -= 1
            if not self._links[link]:
                del self._links[link]

    def _pushed_out(self, over: float, now: float) -> float:
        lost = 0.0
        for held in self._held.values():
            if over <= 0:
                break
            over -= held.chain.chars
            lost += held.chain.chars * self._returns.likely(now - held.used_at)
        return lost


def _first_free(room: Capacity, busy: Collection[int]) -> int | None:
    return next((slot for slot in range(room.slots) if slot not in busy), None)
