"""Track which conversations lie in which KV cache, from the gateway's own requests.

Prefilling a long conversation takes minutes on a board, and seconds where a slot's KV cache still holds its earlier
turns. Engines report cache hits only after the fact, so the gateway records which prompt went to which slot.

A slot holds one conversation. When another one takes the slot, the first is lost, or moves to the engine's prompt
cache in main memory if it has one (tried with b11549: found again there completely). An eviction costs something
only if the evicted conversation continues; ``best_slot`` weighs that against the tokens to compute.

Bookkeeping and arithmetic only: no clock, no prompt text.
"""

from collections.abc import Collection, Iterable
from typing import Protocol

import msgspec

from promptai.router.estimate.prefix import WINDOW, Chain
from promptai.router.estimate.reuse import FORGOTTEN_AFTER_GAPS, ReuseModel

#: Conversations kept per replica, and the most recent ones whose return is estimated one by one.
_MAX_CONVERSATIONS, _MAX_RECENT = 1024, 64


class Capacity(msgspec.Struct, frozen=True):
    """
    Room in a replica's caches.

    Attributes:
        slots: Slots, each with the KV cache of one conversation.
        host_chars: Characters that fit into the engine's prompt cache (llama-server's ``--cache-ram``), which keeps
            conversations that left their slot; 0: no such cache.
    """

    slots: int
    host_chars: float


class CachedConversation(msgspec.Struct, frozen=True):
    """A conversation in a cache, and the time of its last use."""

    chain: Chain
    used_at: float


class SlotChoice(msgspec.Struct, frozen=True):
    """
    The best slot of a replica for a prompt.

    Attributes:
        slot: ``None`` if no slot is free.
        cached_chars: Characters of the prompt in the cache.
        evicted_chars: Characters of other conversations that the prompt evicts, times the probability that they
            continue.
    """

    slot: int | None
    cached_chars: int = 0
    evicted_chars: float = 0.0


class CacheIndex:
    """
    Cached conversations of every replica.

    Attributes:
        reuse: Model of whether and when conversations continue.
    """

    def __init__(self) -> None:
        self.reuse = ReuseModel()
        self._caches: dict[str, _ReplicaCaches] = {}

    def best_slot(
        self, replica_id: str, capacity: Capacity, prompt: Chain, *, busy: Collection[int], now: float
    ) -> SlotChoice:
        """Return the free slot with the least to compute and to evict; ``busy``: slots in use."""
        caches = self._caches.get(replica_id)
        if caches is None:
            return SlotChoice(_first_free(capacity, busy))
        return caches.best_slot(capacity, prompt, busy, now)

    def store(self, replica_id: str, capacity: Capacity, slot: int, conversation: Chain, now: float) -> None:
        """Record that a slot's cache now holds ``conversation``."""
        caches, kind = self._caches.get(replica_id), _PromptCache if capacity.host_chars else _SlotCaches
        if not isinstance(caches, kind):
            caches = self._caches[replica_id] = kind(self.reuse)
        caches.store(capacity, slot, CachedConversation(conversation, now))

    def drop(self, replica_id: str, slot: int | None = None) -> None:
        """Forget the contents of a slot, or of the whole replica (``None``)."""
        if slot is None:
            self._caches.pop(replica_id, None)
        elif replica_id in self._caches:
            self._caches[replica_id].drop(slot)

    def expected_returns(
        self, replica_id: str, *, busy: Collection[int], current: Iterable[Chain], now: float
    ) -> float:
        """
        Expected number of idle conversations in a replica's caches that will continue.

        Args:
            busy: Slots in use; their earlier conversation either continues right now or is evicted.
            current: Prompts already received; the conversations they continue have returned.
        """
        caches, expected = self._caches.get(replica_id), 0.0
        horizon_s = FORGOTTEN_AFTER_GAPS * self.reuse.mean_gap_s
        recent = [held for held in caches.recent(busy) if now - held.used_at < horizon_s] if caches is not None else ()
        prompts = list(current) if recent else ()
        for held in recent:
            if not any(prompt.begins_with(held.chain) for prompt in prompts):
                expected += self.reuse.probability(now - held.used_at)
        return expected

    def chars(self, replica_id: str) -> int:
        """Characters of all conversations in a replica's caches."""
        return self._caches[replica_id].chars if replica_id in self._caches else 0


class _ReplicaCaches(Protocol):
    """The caches of one replica."""

    @property
    def chars(self) -> int: ...
    def best_slot(self, capacity: Capacity, prompt: Chain, busy: Collection[int], now: float) -> SlotChoice: ...
    def store(self, capacity: Capacity, slot: int, conversation: CachedConversation) -> None: ...
    def drop(self, slot: int) -> None: ...
    def recent(self, busy: Collection[int]) -> list[CachedConversation]: ...


class _SlotCaches:
    """Caches of an engine that has only its slots."""

    def __init__(self, reuse: ReuseModel) -> None:
        self._reuse = reuse
        self._by_slot: dict[int, CachedConversation] = {}

    @property
    def chars(self) -> int:
        return sum(held.chain.chars for held in self._by_slot.values())

    def best_slot(self, capacity: Capacity, prompt: Chain, busy: Collection[int], now: float) -> SlotChoice:
        options = []
        for slot in range(capacity.slots):
            held = self._by_slot.get(slot)
            shared = prompt.shared(held.chain) if held else 0
            evicted = (held.chain.chars - shared) * self._reuse.probability(now - held.used_at) if held else 0.0
            options.append((prompt.chars - shared + evicted, held.used_at if held else -1.0, slot, shared, evicted))
        free = [option for option in options if option[2] not in busy]
        if not free:
            return SlotChoice(None, max(option[3] for option in options))
        _, _, slot, shared, evicted = min(free)
        return SlotChoice(slot, shared, evicted)

    def store(self, capacity: Capacity, slot: int, conversation: CachedConversation) -> None:
        self._by_slot[slot] = conversation
        for removed in [other for other in self._by_slot if other >= capacity.slots]:
            del self._by_slot[removed]

    def drop(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

    def recent(self, busy: Collection[int]) -> list[CachedConversation]:
        return [held for slot, held in self._by_slot.items() if slot not in busy]


class _PromptCache:
    """
    Caches of an engine with a prompt cache: conversations in any slot or in memory, least recently used first.

    The longest prefix shared with any of a thousand conversations must not take a thousand comparisons. A link is
    present only if all links before it are, so binary search finds the last one.
    """

    def __init__(self, reuse: ReuseModel) -> None:
        self.chars = 0
        self._reuse = reuse
        self._by_last_link: dict[int, CachedConversation] = {}
        self._link_counts: dict[int, int] = {}  # conversations that contain the link

    def best_slot(self, capacity: Capacity, prompt: Chain, busy: Collection[int], now: float) -> SlotChoice:
        low, high = 0, len(prompt.links)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if prompt.links[middle - 1] in self._link_counts else (low, middle - 1)
        shared = low * WINDOW
        evicted = self._evicted_chars(self.chars + prompt.chars - shared - capacity.host_chars, now)
        return SlotChoice(_first_free(capacity, busy), shared, evicted)

    def store(self, capacity: Capacity, slot: int, conversation: CachedConversation) -> None:
        del slot  # the engine moves conversations between slots and memory
        if not conversation.chain.links:
            return
        for link in conversation.chain.links:  # replaces its own earlier turns
            self._remove(link)
        self._by_last_link[conversation.chain.links[-1]] = conversation
        self.chars += conversation.chain.chars
        for link in conversation.chain.links:
            self._link_counts[link] = self._link_counts.get(link, 0) + 1
        while len(self._by_last_link) > _MAX_CONVERSATIONS or (
            len(self._by_last_link) > capacity.slots and self.chars > capacity.host_chars
        ):
            self._remove(next(iter(self._by_last_link)))

    def drop(self, slot: int) -> None:
        """Keep everything: the engine saved the slot's conversation to its prompt cache."""

    def recent(self, busy: Collection[int]) -> list[CachedConversation]:
        del busy
        found = []
        for held in reversed(self._by_last_link.values()):
            found.append(held)
            if len(found) == _MAX_RECENT:
                break
        return found

    def _remove(self, last_link: int) -> None:
        held = self._by_last_link.pop(last_link, None)
        if held is None:
            return
        self.chars -= held.chain.chars
        for link in held.chain.links:
            self._link_counts[link] -= 1
            if not self._link_counts[link]:
                del self._link_counts[link]

    def _evicted_chars(self, excess: float, now: float) -> float:
        evicted = 0.0
        for held in self._by_last_link.values():
            if excess <= 0:
                break
            excess -= held.chain.chars
            evicted += held.chain.chars * self._reuse.probability(now - held.used_at)
        return evicted


def _first_free(capacity: Capacity, busy: Collection[int]) -> int | None:
    return next((slot for slot in range(capacity.slots) if slot not in busy), None)
