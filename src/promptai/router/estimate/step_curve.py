"""How long a token takes by the number of streams at once, from the few numbers that were seen.

A board with four slots has been seen with one stream and with three, and a request asks about two and
four. Each number that was not seen is filled in from the nearest that was, along a straight line: every
further stream adds the same share of the step of one. Looked up for every request, so it must not cost
as much as there are slots. Pure.
"""

import bisect
import math
from collections.abc import Mapping
from typing import Self

import msgspec

_EACH, _GRID = 8, 1.25


class StepCurve(msgspec.Struct, frozen=True):
    """
    Seconds from one token of a stream to its next, in pieces.

    Attributes:
        begins: The number of streams at which each piece begins.
        alone: What each piece takes the step of a single stream to be.
        before: The longest step of all pieces before each.
        slowdown: What each further stream adds, as a share of the step of one.
    """

    begins: tuple[int, ...]
    alone: tuple[float, ...]
    before: tuple[float, ...]
    slowdown: float

    @classmethod
    def flat(cls, step_s: float) -> Self:
        """The same for any number of streams."""
        return cls((1,), (step_s,), (0.0,), 0.0)

    @classmethod
    def between(cls, seen: Mapping[int, float], slowdown: float) -> Self:
        """
        From what was seen.

        Args:
            seen: Seconds by number of streams; at least one. Half-way between two, the mean of both counts.
        """
        numbers = sorted(seen)
        alone = [seen[streams] / shape(slowdown, streams) for streams in numbers]
        begins, pieces = [1], [alone[0]]
        for low, high, here, there in zip(numbers, numbers[1:], alone, alone[1:], strict=False):
            half_way = (low + high) / 2
            if half_way.is_integer():
                begins.append(int(half_way))
                pieces.append((here + there) / 2)
            begins.append(math.floor(half_way) + 1)
            pieces.append(there)
        before, longest = [0.0], 0.0
        for one, end in zip(pieces, begins[1:], strict=False):
            longest = max(longest, one * shape(slowdown, end - 1))
            before.append(longest)
        return cls(tuple(begins), tuple(pieces), tuple(before), slowdown)

    def at(self, streams: int) -> float:
        """With so many streams."""
        streams = max(1, streams)
        return self.alone[bisect.bisect_right(self.begins, streams) - 1] * shape(self.slowdown, streams)

    def longest(self, streams: int) -> float:
        """With so many streams or fewer: noise has more of them faster, and nobody should be sent there for it."""
        streams = max(1, streams)
        piece = bisect.bisect_right(self.begins, streams) - 1
        return max(self.before[piece], self.alone[piece] * shape(self.slowdown, streams))


def kept(streams: float) -> int:
    """The number of streams that stands for this one: up to eight each for itself, beyond it in steps of a quarter."""
    if streams < _EACH:
        return max(1, round(streams))
    return round(_EACH * _GRID ** round(math.log(streams / _EACH, _GRID)))


def shape(slowdown: float, streams: float) -> float:
    """The step with so many streams, as a multiple of the step of one."""
    return 1.0 + slowdown * (streams - 1.0)
