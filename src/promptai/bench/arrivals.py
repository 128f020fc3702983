"""Decide when conversations begin: closed loop, constant rate or Poisson process.

In a closed loop a slow server receives fewer requests, which flatters it. Open arrivals do not
wait for answers. Arrivals must be repeatable for runs to compare, so the caller seeds the
generator. Pure.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from random import Random

Kind = Literal["closed", "constant", "poisson"]


class Arrivals(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    How conversations arrive.

    Attributes:
        kind: ``closed``: as soon as fewer than ``concurrency`` conversations are active.
        rate_per_s: Conversations per second; ``None`` for ``closed``.
    """

    kind: Kind = "closed"
    rate_per_s: float | None = None

    def __str__(self) -> str:
        """As on the command line: ``closed``, ``constant:RATE`` or ``poisson:RATE``."""
        return self.kind if self.rate_per_s is None else f"{self.kind}:{self.rate_per_s:g}"


def start_offsets(arrivals: Arrivals, count: int, generator: "Random") -> list[float] | None:
    """
    Return when each conversation begins, in seconds from the start of a stage.

    ``None`` for a closed loop, whose starts depend on the answers. The gaps of a
    Poisson process are exponential with mean 1 / rate; the first arrival is at 0 for
    ``constant`` and after the first gap for ``poisson``.

    Raises:
        ValueError: ``constant`` or ``poisson`` arrivals without a positive rate.
    """
    if arrivals.kind == "closed":
        return None
    if arrivals.rate_per_s is None or arrivals.rate_per_s <= 0:
        raise ValueError(f"{arrivals.kind} arrivals need a rate above 0 conversations per second")
    if arrivals.kind == "constant":
        return [number / arrivals.rate_per_s for number in range(count)]
    offsets, now = [], 0.0
    for _ in range(count):
        now += generator.expovariate(arrivals.rate_per_s)
        offsets.append(now)
    return offsets


def remaining_offsets(offsets: Sequence[float], pending: Sequence[int]) -> list[float]:
    """
    Return the offsets of the conversations left in a stage, counted from where the stage stopped.

    Args:
        offsets: The offsets of the whole stage.
        pending: Positions of the conversations left, in order, at least one.
    """
    stopped = offsets[pending[0] - 1] if pending[0] > 0 else 0.0
    return [offsets[position] - stopped for position in pending]
