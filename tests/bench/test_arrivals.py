from itertools import pairwise
from random import Random

import pytest

from promptai.bench.arrivals import Arrivals, Kind, remaining_offsets, start_offsets


def poisson(seed: int, count: int = 4000) -> list[float]:
    """Arrivals at two conversations per second."""
    offsets = start_offsets(Arrivals("poisson", 2.0), count, Random(seed))
    assert offsets is not None
    return offsets


@pytest.mark.parametrize("rate", [None, 0.0, -1.0], ids=["no-rate", "zero", "negative"])
@pytest.mark.parametrize("kind", ["constant", "poisson"])
def test_rejects_open_arrivals_without_a_positive_rate(kind: Kind, rate: float | None) -> None:
    with pytest.raises(ValueError, match=f"{kind} arrivals need a rate above 0"):
        start_offsets(Arrivals(kind, rate), 3, Random(0))


def test_a_closed_loop_has_no_offsets() -> None:
    assert start_offsets(Arrivals(), 3, Random(0)) is None


def test_constant_arrivals_are_evenly_spaced_from_zero() -> None:
    assert start_offsets(Arrivals("constant", 0.5), 4, Random(0)) == [0.0, 2.0, 4.0, 6.0]


def test_poisson_arrivals_repeat_with_the_seed_and_differ_without() -> None:
    assert poisson(7) == poisson(7)
    assert poisson(7) != poisson(8)


def test_a_shorter_stage_has_the_first_offsets_of_a_longer_one() -> None:
    assert poisson(7)[:50] == poisson(7, count=50)


def test_a_resumed_stage_keeps_the_remaining_gaps() -> None:
    """The third conversation was the last to be answered, the second was not."""
    offsets = [1.0, 4.0, 6.0, 9.0, 11.0]

    assert remaining_offsets(offsets, [0, 1, 2, 3, 4]) == offsets
    assert remaining_offsets(offsets, [1, 3, 4]) == [3.0, 8.0, 10.0]


def test_poisson_gaps_are_exponential_with_the_requested_mean() -> None:
    """An exponential's mean and standard deviation are equal; 4000 gaps estimate both to within 5 %."""
    gaps = [after - before for before, after in pairwise([0.0, *poisson(7)])]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5

    assert min(gaps) > 0
    assert pytest.approx(0.5, rel=0.05) == mean
    assert pytest.approx(0.5, rel=0.05) == deviation
