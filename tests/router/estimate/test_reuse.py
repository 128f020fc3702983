"""Which conversations return, and when."""

import heapq
from random import Random

import pytest

from promptai.router.estimate.prefix import WINDOW, Chain, chain
from promptai.router.estimate.reuse import ReuseModel


def letters(windows: int, seed: int) -> str:
    """Random text of that many windows; each seed gives a different text."""
    generator = Random(seed)
    return "".join(generator.choices("abcdefgh ", k=windows * WINDOW))


def chain_of(conversation: int, windows: int) -> Chain:
    """Return a chain of that many windows without hashing any text."""
    return Chain(tuple(1000 * conversation + number for number in range(windows)), windows * WINDOW)


def test_the_probability_of_a_return_falls_with_age() -> None:
    probabilities = [ReuseModel().probability(age) for age in (0, 60, 300, 3600)]

    assert sorted(probabilities, reverse=True) == probabilities
    assert probabilities[0] == pytest.approx(0.75)
    assert probabilities[-1] < 0.001


@pytest.mark.parametrize(("share", "mean_gap_s"), [(0.5, 20.0), (0.9, 20.0), (0.9, 300.0)])
def test_the_share_and_mean_gap_of_returning_conversations_are_learned(share: float, mean_gap_s: float) -> None:
    """Pauses are exponential; a conversation ends after each answer with a known probability, and a new one begins."""
    generator, reuse = Random(0), ReuseModel()
    turns = [(generator.expovariate(1 / mean_gap_s), conversation, 2) for conversation in range(20)]
    for new_conversation in range(20, 1500):
        now, conversation, windows = heapq.heappop(turns)
        reuse.asked(chain_of(conversation, windows), now)
        reuse.answered(chain_of(conversation, windows + 2), now)
        continues = generator.random() < share
        next_at = now + generator.expovariate(1 / mean_gap_s)
        heapq.heappush(turns, (next_at, conversation, windows + 3) if continues else (next_at, new_conversation, 2))

    assert reuse.mean_gap_s == pytest.approx(mean_gap_s, rel=0.3)
    assert reuse.probability(0.0) == pytest.approx(share, abs=0.1)


def test_a_conversation_is_recognised_after_its_client_strips_the_answer() -> None:
    """The last window has changed; the one before it has not."""
    reuse, text = ReuseModel(), letters(10, 1)
    reuse.answered(chain(text), 0.0)
    before = reuse.mean_gap_s

    reuse.asked(chain(text[: 10 * WINDOW - 1] + letters(5, 2)), 10_000.0)

    assert reuse.mean_gap_s > before


def test_at_most_2048_answers_are_remembered() -> None:
    reuse = ReuseModel()
    for number in range(5000):
        reuse.answered(chain(letters(3, number)), 0.0)

    assert len(reuse._answered_at) <= 2048
