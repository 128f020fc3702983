"""When conversations begin: closed loop, at a constant rate, or as a Poisson process.

In a closed loop a slow server is asked less often, which flatters it. Open
arrivals do not wait for answers. A benchmark whose arrivals cannot be repeated
compares nothing, so the generator is seeded by the caller. Pure.
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
        kind: ``closed``: as soon as one of ``concurrency`` places is free.
        rate_per_s: Conversations a second for the open kinds.
    """

    kind: Kind = "closed"
    rate_per_s: float | None = None

    def __str__(self) -> str:
        """As on the command line: ``closed``, ``constant:RATE`` or ``poisson:RATE``."""
        return self.kind if self.rate_per_s is None else f"{self.kind}:{self.rate_per_s:g}"


def start_offsets(arrivals: Arrivals, count: int, generator: "Random") -> list[float] | None:
    """
    Seconds from the start of a stage at which each conversation begins.

    ``None`` for a closed loop, where the server's answers decide. The gaps of a
    Poisson process are exponential with mean 1 / rate; the first arrival is at 0 for
    ``constant`` and after the first gap for ``poisson``.

    Raises:
        ValueError: An open kind without a positive rate.
    """
    if arrivals.kind == "closed":
        return None
    if arrivals.rate_per_s is None or arrivals.rate_per_s <= 0:
        raise ValueError(f"{arrivals.kind} arrivals need a rate above 0 conversations a second")
    if arrivals.kind == "constant":
        return [number / arrivals.rate_per_s for number in range(count)]
    offsets, now = [], 0.0
    for _ in range(count):
        now += generator.expovariate(arrivals.rate_per_s)
        offsets.append(now)
    return offsets


def remaining_offsets(offsets: Sequence[float], pending: Sequence[int]) -> list[float]:
    """
    The offsets of what a stage still has to begin, counted from where it stopped.

    Args:
        offsets: Of the whole stage.
        pending: Positions of what is left, in order, at least one.
    """
    stopped = offsets[pending[0] - 1] if pending[0] > 0 else 0.0
    return [offsets[position] - stopped for position in pending]
