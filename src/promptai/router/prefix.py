"""What the KV caches of the fleet hold, as far as the gateway can know.

Prefilling a long conversation takes minutes on a board, and seconds where its earlier turns
still lie in a slot's KV cache. Which slot of which replica that is, nobody tells: engines
report what they found in their cache only after the fact. So the gateway remembers what it
sent where, as a chain of checksums over the conversation from its beginning, since a KV cache
is only good for a prompt that begins with exactly what it holds.

A slot has room for one conversation. Whatever was in it is lost when another one takes it, or
moves to the engine's prompt cache in ordinary memory, if it has one (tried with b11549: it is
found again there whole). What is pushed out costs something if whoever it belongs to comes back;
``spot`` weighs that against what would have to be computed.

This module is bookkeeping and arithmetic: it reads no clock and holds no text.
"""

import math
import zlib
from collections.abc import Collection, Sequence

import msgspec

#: Characters of one link, about sixteen tokens: the most that a match is too short by.
WINDOW = 64
#: What is believed before anything was seen, as if of so many conversations: most go on, after two minutes.
_GOES_ON, _GAP_S, _PRIOR = 0.75, 120.0, 4.0
_FADE = 0.98
#: Answers that are remembered, to see whether their conversation goes on; and for how many mean gaps.
_REMEMBERED, _GAPS = 2048, 6.0


class Chain(msgspec.Struct, frozen=True):
    """
    A text as checksums of ever longer beginnings.

    Attributes:
        links: Of the first 64 characters, the first 128, and so on; what is over has none. 32 bits suffice:
            two that collide make one estimate wrong, nothing else.
        chars: Length of the whole text.
    """

    links: tuple[int, ...]
    chars: int

    @property
    def head(self) -> int:
        """What stands for the conversation as a whole: its beginning, as long as it has one of two windows."""
        return self.links[min(1, len(self.links) - 1)] if self.links else self.chars

    def shared(self, other: "Chain") -> int:
        """Characters that both surely begin with."""
        low, high = 0, min(len(self.links), len(other.links))
        while low < high:  # a link is the checksum of all before it: equal once means equal until there
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.links[middle - 1] == other.links[middle - 1] else (low, middle - 1)
        return low * WINDOW

    def begins_with(self, other: "Chain") -> bool:
        """Whether it goes on from there, as far as links tell."""
        count = len(other.links)
        return count <= len(self.links) and (not count or self.links[count - 1] == other.links[-1])


def chain(text: str) -> Chain:
    """The chain of a text."""
    links, state = [], 0
    for start in range(0, len(text) - WINDOW + 1, WINDOW):
        state = zlib.crc32(text[start : start + WINDOW].encode("utf-8", "surrogatepass"), state)
        links.append(state)
    return Chain(tuple(links), len(text))


class Room(msgspec.Struct, frozen=True):
    """
    What a replica's caches have room for.

    Attributes:
        slots: Conversations, one in each slot.
        host_chars: Of conversations that left their slot, in the engine's prompt cache (llama-server's
            ``--cache-ram``); 0: it has none, and a slot that is taken is lost.
    """

    slots: int
    host_chars: float


class Held(msgspec.Struct, frozen=True):
    """One conversation in a cache, and since when."""

    chain: Chain
    used_at: float


class Spot(msgspec.Struct, frozen=True):
    """
    What a replica's caches are to a prompt.

    Attributes:
        slot: The slot that it should get; ``None``: none is free.
        cached_chars: Of the prompt, that are cached.
        lost_chars: Of other conversations, that it pushes out, times how likely those go on.
    """

    slot: int | None
    cached_chars: int = 0
    lost_chars: float = 0.0


class CacheIndex:
    """
    What the caches of each replica hold, by what the gateway itself has sent there.

    Attributes:
        returns: What has been learned of whether conversations go on.
    """

    def __init__(self) -> None:
        self.returns = Returns()
        # By slot where that is all there is, else by a number of their own; least recently used first.
        self._held: dict[str, dict[int, Held]] = {}
        self._number = 0

    def spot(self, replica_id: str, room: Room, prompt: Chain, *, busy: Collection[int], now: float) -> Spot:
        """
        The cheapest spot for ``prompt``: what must be computed, and what is pushed out.

        Args:
            busy: Slots that are in use.
        """
        held = self._held.get(replica_id, {})
        free = [slot for slot in range(room.slots) if slot not in busy]
        if room.host_chars:
            shared = max((prompt.shared(one.chain) for one in held.values()), default=0)
            return Spot(free[0] if free else None, shared, self._pushed_out(held, room, prompt.chars - shared, now))
        options = []
        for slot in range(room.slots):
            there = held.get(slot)
            shared = prompt.shared(there.chain) if there else 0
            lost = (there.chain.chars - shared) * self.returns.likely(now - there.used_at) if there else 0.0
            options.append((prompt.chars - shared + lost, there.used_at if there else -1.0, slot, shared, lost))
        if not free:
            return Spot(None, max(option[3] for option in options))
        _, _, slot, shared, lost = min(option for option in options if option[2] in free)
        return Spot(slot, shared, lost)

    def hold(self, replica_id: str, room: Room, slot: int, held: Chain, now: float) -> None:
        """A conversation is in a slot's cache now."""
        there = self._held.setdefault(replica_id, {})
        if not room.host_chars:
            there[slot] = Held(held, now)
            return
        for number in [number for number, one in there.items() if held.begins_with(one.chain)]:
            del there[number]
        self._number -= 1  # below any slot's
        there[self._number] = Held(held, now)
        total = sum(one.chain.chars for one in there.values())
        while len(there) > room.slots and total > room.host_chars:
            total -= there.pop(next(iter(there))).chain.chars

    def lose(self, replica_id: str, slot: int | None = None) -> None:
        """A slot's cache, or all of a replica's, is gone or unknown."""
        if slot is None:
            self._held.pop(replica_id, None)
        else:
            self._held.get(replica_id, {}).pop(slot, None)

    def chars(self, replica_id: str) -> int:
        """Characters that a replica's caches hold together."""
        return sum(held.chain.chars for held in self._held.get(replica_id, {}).values())

    def _pushed_out(self, held: dict[int, Held], room: Room, more: int, now: float) -> float:
        over = sum(one.chain.chars for one in held.values()) + more - room.host_chars
        lost = 0.0
        for one in held.values():
            if over <= 0:
                break
            over -= one.chain.chars
            lost += one.chain.chars * self.returns.likely(now - one.used_at)
        return lost


class Returns:
    """
    Whether a conversation that was answered so long ago will go on.

    Which of sixteen conversations is over, nobody says. But how long people take for their next
    question can be learned, and whoever has taken six times as long is hardly coming back. With
    exponential gaps of mean m, and a share g of answers that are followed by a question at all, it is

        g e^(-age/m) / (g e^(-age/m) + 1 - g)
    """

    def __init__(self) -> None:
        self._answered: dict[int, float] = {}
        self._back, self._gone, self._gap_s = _GOES_ON * _PRIOR, (1 - _GOES_ON) * _PRIOR, _GOES_ON * _PRIOR * _GAP_S

    @property
    def gap_s(self) -> float:
        """Mean seconds from an answer to the next question."""
        return self._gap_s / self._back

    def answered(self, held: Chain, now: float) -> None:
        """A conversation has been answered; ``held`` is all of it."""
        if len(held.links) > 1:
            mark = _mark(held)
            self._answered.pop(mark, None)  # so that the order stays that of the answers
            self._answered[mark] = now
        patience = _GAPS * self.gap_s
        while self._answered:
            oldest, since = next(iter(self._answered.items()))
            if now - since < patience and len(self._answered) <= _REMEMBERED:
                return
            del self._answered[oldest]
            self._learn(back=0.0, gap_s=0.0)

    def asked(self, prompt: Chain, now: float) -> None:
        """A question has come; it may go on a conversation that was answered."""
        for link in reversed(prompt.links):
            since = self._answered.pop(link, None)
            if since is not None:
                self._learn(back=1.0, gap_s=now - since)
                return

    def likely(self, age_s: float) -> float:
        """How likely a conversation goes on that was answered ``age_s`` seconds ago."""
        share = self._back / (self._back + self._gone)
        silent = share * math.exp(-max(0.0, age_s) / self.gap_s)
        return silent / (silent + 1 - share)

    def _learn(self, *, back: float, gap_s: float) -> None:
        self._back = _FADE * self._back + back
        self._gone = _FADE * self._gone + 1 - back
        self._gap_s = _FADE * self._gap_s + gap_s


def _mark(held: Chain) -> int:
    """What the next question will have among its links; not the last one: clients strip what ends in a space."""
    return held.links[-2]


def rendezvous(head: int, replica_ids: Sequence[str]) -> str:
    """
    One of several replicas for a conversation, the same in every gateway (highest random weight, Thaler 1996).

    Args:
        head: What stands for the conversation.
    """
    return max(replica_ids, key=lambda name: (zlib.crc32(f"{head}/{name}".encode()), name))
