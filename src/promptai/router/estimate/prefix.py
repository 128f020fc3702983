"""A conversation as its beginnings: what two prompts have in common, without their texts.

A KV cache is good for a prompt that begins with exactly what it holds, and for that beginning
alone. So a prompt is kept as a chain of checksums of ever longer beginnings: two chains are
equal up to where their texts are. Pure.
"""

import hashlib
import zlib
from collections.abc import Sequence

import msgspec

#: Characters of one link, about sixteen tokens: the most that a match is too short by.
WINDOW = 64


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
    # At once, and in four bytes a character, so that a window is as long wherever it stands.
    data, step = memoryview(text.encode("utf-32-le", "surrogatepass")), 4 * WINDOW
    for start in range(0, len(data) - step + 1, step):
        state = zlib.crc32(data[start : start + step], state)
        links.append(state)
    return Chain(tuple(links), len(text))


def rendezvous(head: int, replica_ids: Sequence[str]) -> str:
    """
    One of several replicas for a conversation, the same in every gateway (highest random weight, Thaler 1996).

    Args:
        head: What stands for the conversation.
    """

    # No checksum: of four addresses that differ in one digit, CRC-32 preferred one to half of all conversations.
    def weight(name: str) -> bytes:
        return hashlib.blake2b(f"{head}/{name}".encode(), digest_size=8).digest()

    return max(replica_ids, key=weight)
