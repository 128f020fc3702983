"""What a token takes with any number of streams, from what it took with some."""

import pytest

from promptai.router.estimate.step_curve import StepCurve, grid_point


def test_one_observation_extends_along_the_slowdown() -> None:
    """Two streams at 0.3 s: 0.2 s alone, as each further one costs half of that."""
    steps = StepCurve.between({2: 0.3}, 0.5)

    assert [steps.at(streams) for streams in (0, 1, 2, 3, 9)] == pytest.approx([0.2, 0.2, 0.3, 0.4, 1.0])


def test_missing_numbers_follow_the_nearest_observation() -> None:
    """Without a slowdown each stands for its neighbours, and half-way is the mean of both."""
    steps = StepCurve.between({2: 0.2, 6: 0.5, 9: 0.8}, 0.0)

    found = [steps.at(streams) for streams in range(1, 12)]

    assert found == pytest.approx([0.2, 0.2, 0.2, 0.35, 0.5, 0.5, 0.5, 0.8, 0.8, 0.8, 0.8])


def test_adjacent_observations_have_no_piece_between_them() -> None:
    steps = StepCurve.between({1: 0.1, 2: 0.3, 3: 0.2}, 0.0)

    assert [steps.at(streams) for streams in (1, 2, 3, 4)] == pytest.approx([0.1, 0.3, 0.2, 0.2])


def test_the_longest_step_never_falls_with_more_streams() -> None:
    steps = StepCurve.between({1: 0.1, 2: 0.3, 3: 0.2, 7: 0.25}, 0.1)

    longest = [steps.longest(streams) for streams in range(12)]

    assert longest == sorted(longest)
    assert longest[1:] == pytest.approx([max(steps.at(n) for n in range(1, most + 1)) for most in range(1, 12)])


def test_flat_is_constant() -> None:
    assert {StepCurve.flat(0.1).longest(streams) for streams in (0, 1, 5, 500)} == {0.1}


def test_few_streams_are_exact_and_many_are_on_a_grid() -> None:
    """A server with 256 slots is not remembered 256 times."""
    assert [grid_point(streams) for streams in (0.2, 1.0, 1.4, 1.6, 7.4, 8.0, 9.0, 10.0)] == [1, 1, 1, 2, 7, 8, 10, 10]
    assert len({grid_point(streams) for streams in range(1, 257)}) < 25
    assert all(abs(grid_point(streams) / streams - 1) < 0.15 for streams in range(8, 1000))
