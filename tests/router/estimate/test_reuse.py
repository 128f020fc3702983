"""Who comes back, and when."""

import heapq
from random import Random

import pytest

from promptai.router.estimate.prefix import WINDOW, Chain, chain
from promptai.router.estimate.reuse import ReuseModel


def letters(windows: int, seed: int) -> str:
    """A text of so many windows, unlike that of any other seed."""
    generator = Random(seed)
    return "".join(generator.choices("abcdefgh ", k=windows * WINDOW))


def linked(who: int, windows: int) -> Chain:
    """The chain of a conversation of so many windows, without its text."""
    return Chain(tuple(1000 * who + number for number in range(windows)), windows * WINDOW)


def test_the_probability_of_a_return_falls_with_age() -> None:
    likely = [ReuseModel().probability(age) for age in (0, 60, 300, 3600)]

    assert sorted(likely, reverse=True) == likely
    assert likely[0] == pytest.approx(0.75)
    assert likely[-1] < 0.001


@pytest.mark.parametrize(("share", "mean_gap_s"), [(0.5, 20.0), (0.9, 20.0), (0.9, 300.0)])
def test_share_and_pause_of_returns_are_learned(share: float, mean_gap_s: float) -> None:
    """Exponential pauses; each conversation ends after an answer with a known chance, and another one begins."""
    generator, returns = Random(0), ReuseModel()
    turns = [(generator.expovariate(1 / mean_gap_s), who, 2) for who in range(20)]
    for fresh in range(20, 1500):
        now, who, windows = heapq.heappop(turns)
        returns.asked(linked(who, windows), now)
        returns.answered(linked(who, windows + 2), now)
        goes_on = generator.random() < share
        then = now + generator.expovariate(1 / mean_gap_s)
        heapq.heappush(turns, (then, who, windows + 3) if goes_on else (then, fresh, 2))

    assert returns.mean_gap_s == pytest.approx(mean_gap_s, rel=0.3)
    assert returns.probability(0.0) == pytest.approx(share, abs=0.1)


def test_a_client_that_strips_answers_is_recognised() -> None:
    """What the last window held has changed then; the one before it has not."""
    returns, text = ReuseModel(), letters(10, 1)
    returns.answered(chain(text), 0.0)
    before = returns.mean_gap_s

    returns.asked(chain(text[: 10 * WINDOW - 1] + letters(5, 2)), 10_000.0)

    assert returns.mean_gap_s > before


def test_remembered_answers_are_bounded() -> None:
    returns = ReuseModel()
    for number in range(5000):
        returns.answered(chain(letters(3, number)), 0.0)

    assert len(returns._answered_at) <= 2048
