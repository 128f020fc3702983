"""Seconds per token by number of concurrent streams, interpolated from the few numbers observed.

A board with four slots has been observed with one stream and with three, and a request needs the value for two and
four. Each missing number follows the nearest observed one along a straight line: every further stream adds the same
share of the single-stream step. Every request evaluates the curve, so the cost must not grow with the slots. Pure.
"""

import bisect
import math
from collections.abc import Mapping
from typing import Self

import msgspec

#: Stream counts below ``_EXACT`` are kept one by one; beyond it on a geometric grid.
_EXACT, _GRID = 8, 1.25


class StepCurve(msgspec.Struct, frozen=True):
    """
    Seconds from one token of a stream to its next, piecewise.

    Attributes:
        begins: Number of streams at which each piece begins.
        single_s: Single-stream step that each piece implies.
        longest_before_s: Longest step of all earlier pieces.
        slowdown: Share of the single-stream step that each further stream adds.
    """

    begins: tuple[int, ...]
    single_s: tuple[float, ...]
    longest_before_s: tuple[float, ...]
    slowdown: float

    @classmethod
    def flat(cls, step_s: float) -> Self:
        """Return a curve with the same step for any number of streams."""
        return cls((1,), (step_s,), (0.0,), 0.0)

    @classmethod
    def between(cls, observed: Mapping[int, float], slowdown: float) -> Self:
        """
        Interpolate observations.

        Args:
            observed: Seconds per token by number of streams; at least one. Exactly half-way between two
                observations, the mean of both applies.
        """
        numbers = sorted(observed)
        single = [observed[streams] / shape(slowdown, streams) for streams in numbers]
        begins, pieces = [1], [single[0]]
        for low, high, here, there in zip(numbers, numbers[1:], single, single[1:], strict=False):
            half_way = (low + high) / 2
            if half_way.is_integer():
                begins.append(int(half_way))
                pieces.append((here + there) / 2)
            begins.append(math.floor(half_way) + 1)
            pieces.append(there)
        longest_before, longest = [0.0], 0.0
        for piece, end in zip(pieces, begins[1:], strict=False):
            longest = max(longest, piece * shape(slowdown, end - 1))
            longest_before.append(longest)
        return cls(tuple(begins), tuple(pieces), tuple(longest_before), slowdown)

    def at(self, streams: int) -> float:
        """Return the step with that many streams."""
        streams = max(1, streams)
        return self.single_s[bisect.bisect_right(self.begins, streams) - 1] * shape(self.slowdown, streams)

    def longest(self, streams: int) -> float:
        """Return the longest step with up to that many streams: noise can make more streams look faster."""
        streams = max(1, streams)
        piece = bisect.bisect_right(self.begins, streams) - 1
        return max(self.longest_before_s[piece], self.single_s[piece] * shape(self.slowdown, streams))


def grid_point(streams: float) -> int:
    """Round a mean number of streams to the count under which it is recorded: exact below 8, then by steps of 25 %."""
    if streams < _EXACT:
        return max(1, round(streams))
    return round(_EXACT * _GRID ** round(math.log(streams / _EXACT, _GRID)))


def shape(slowdown: float, streams: float) -> float:
    """Return the step with that many streams as a multiple of the single-stream step."""
    return 1.0 + slowdown * (streams - 1.0)
