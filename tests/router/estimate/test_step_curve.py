"""Time per token for any number of streams, interpolated from a few observed numbers."""

import pytest

from promptai.router.estimate.step_curve import StepCurve, grid_point


def test_one_observation_extends_along_the_slowdown() -> None:
    """Two streams take 0.3 s, so one takes 0.2 s: each further stream adds half of that."""
    steps = StepCurve.between({2: 0.3}, 0.5)

    assert [steps.at(streams) for streams in (0, 1, 2, 3, 9)] == pytest.approx([0.2, 0.2, 0.3, 0.4, 1.0])


def test_a_missing_number_follows_the_nearest_observation() -> None:
    """Without a slowdown the step is that of the nearest observation; half-way it is the mean of both."""
    steps = StepCurve.between({2: 0.2, 6: 0.5, 9: 0.8}, 0.0)

    found = [steps.at(streams) for streams in range(1, 12)]

    assert found == pytest.approx([0.2, 0.2, 0.2, 0.35, 0.5, 0.5, 0.5, 0.8, 0.8, 0.8, 0.8])


def test_adjacent_observations_are_used_unchanged() -> None:
    steps = StepCurve.between({1: 0.1, 2: 0.3, 3: 0.2}, 0.0)

    assert [steps.at(streams) for streams in (1, 2, 3, 4)] == pytest.approx([0.1, 0.3, 0.2, 0.2])


def test_longest_never_decreases_with_the_number_of_streams() -> None:
    steps = StepCurve.between({1: 0.1, 2: 0.3, 3: 0.2, 7: 0.25}, 0.1)

    longest = [steps.longest(streams) for streams in range(12)]

    assert longest == sorted(longest)
    assert longest[1:] == pytest.approx([max(steps.at(n) for n in range(1, streams + 1)) for streams in range(1, 12)])


def test_a_flat_curve_is_the_same_for_any_number_of_streams() -> None:
    assert {StepCurve.flat(0.1).longest(streams) for streams in (0, 1, 5, 500)} == {0.1}


def test_the_grid_is_exact_below_8_streams_and_geometric_above() -> None:
    """A server with 256 slots does not need 256 entries."""
    assert [grid_point(streams) for streams in (0.2, 1.0, 1.4, 1.6, 7.4, 8.0, 9.0, 10.0)] == [1, 1, 1, 2, 7, 8, 10, 10]
    assert len({grid_point(streams) for streams in range(1, 257)}) < 25
    assert all(abs(grid_point(streams) / streams - 1) < 0.15 for streams in range(8, 1000))
