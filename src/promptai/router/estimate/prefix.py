"""Compare the prefixes of prompts without keeping their text.

A KV cache helps a prompt only as far as both begin with the same text. So a prompt is kept as a chain of checksums of
ever longer prefixes: two chains are equal as far as their texts are. Pure.
"""

import hashlib
import zlib
from collections.abc import Sequence

import msgspec

#: Characters per link, about sixteen tokens: a match falls short by less than this.
WINDOW = 64


class Chain(msgspec.Struct, frozen=True):
    """
    A text as checksums of ever longer prefixes.

    Attributes:
        links: Checksums of the first 64 characters, the first 128, and so on; a shorter rest has none. 32 bits
            suffice: a collision only makes one estimate wrong.
        chars: Length of the whole text.
    """

    links: tuple[int, ...]
    chars: int

    @property
    def head(self) -> int:
        """Identifies the conversation: the checksum of its first 128 characters, which conversations may share."""
        return self.links[min(1, len(self.links) - 1)] if self.links else self.chars

    def shared(self, other: "Chain") -> int:
        """Length of the common prefix in characters, rounded down to whole windows."""
        low, high = 0, min(len(self.links), len(other.links))
        while low < high:  # equal links mean equal texts up to there
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.links[middle - 1] == other.links[middle - 1] else (low, middle - 1)
        return low * WINDOW

    def begins_with(self, other: "Chain") -> bool:
        """Whether ``other`` is a prefix of this text, compared by whole windows."""
        count = len(other.links)
        return count <= len(self.links) and (not count or self.links[count - 1] == other.links[-1])


def chain(text: str) -> Chain:
    """Build the chain of a text."""
    links, state = [], 0
    # Encoded once, with four bytes per character, so that every window has the same size.
    data, step = memoryview(text.encode("utf-32-le", "surrogatepass")), 4 * WINDOW
    for start in range(0, len(data) - step + 1, step):
        state = zlib.crc32(data[start : start + step], state)
        links.append(state)
    return Chain(tuple(links), len(text))


def rendezvous(head: int, replica_ids: Sequence[str]) -> str:
    """
    Pick one replica for a conversation, the same one in every gateway (highest random weight, Thaler 1996).

    Args:
        head: Identifies the conversation (``Chain.head``).
    """

    # Not CRC-32: among four addresses that differ in one digit, it gave one of them half of all conversations.
    def weight(name: str) -> bytes:
        return hashlib.blake2b(f"{head}/{name}".encode(), digest_size=8).digest()

    return max(replica_ids, key=weight)
