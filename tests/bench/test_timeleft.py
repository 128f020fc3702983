import pytest

from promptai.bench.plan import WarmUpRates
from promptai.bench.timeleft import TimeLeft
from promptai.bench.trace import Cache, TraceKey
from support_runs import long_talk

#: Turns of a talk: prompts of 400, 1200, 2000 characters; 100 characters prefill in 1 s, an answer takes 5 s.
RATES = WarmUpRates(prefill_tps=25.0, decode_tps=10.0, chars_per_token=4.0, answer_tokens=50.0)
TALKS = {"a": long_talk("a", turns=3, chars=400)}
COLD_S, WARM_S = (4 + 5) + (12 + 5) + (20 + 5), (4 + 5) + (8 + 5) + (8 + 5)


def keys(target: str = "m", cache: Cache = "cold") -> list[TraceKey]:
    return [TraceKey(target, cache, 0, "a", turn) for turn in range(3)]


def time_left(*pending: TraceKey) -> TimeLeft:
    """The forecast of a run whose target m has been opened."""
    left = TimeLeft(pending, TALKS, "data")
    left.opened("m", RATES)
    return left


def test_there_is_no_forecast_before_a_target_is_opened() -> None:
    left = TimeLeft(keys(), TALKS, "data")

    assert (left.seconds(), left.share()) == (None, 0.0)


@pytest.mark.parametrize(("cache", "seconds"), [("cold", COLD_S), ("warm", WARM_S)])
def test_prompts_count_by_their_uncached_part(cache: Cache, seconds: float) -> None:
    """Cold: the whole prompt; warm: the part added since the previous turn."""
    assert pytest.approx(seconds) == time_left(*keys(cache=cache)).seconds()


def test_own_answers_count_as_prefill() -> None:
    """User messages of 100, 200 and 300 tokens, and zero, one and two answers of 50."""
    left = TimeLeft(keys(), TALKS, "own")
    left.opened("m", RATES)

    assert pytest.approx((100 + 250 + 400) / 25 + 3 * 5) == left.seconds()


def test_a_failed_conversation_takes_no_more_time() -> None:
    """Its second prompt fails at once: the third is never sent, and the failure does not count as speed."""
    left = time_left(*keys(), *keys(cache="warm"))
    left.played(keys()[0], 9.0)
    left.given_up(keys()[1], 0.01)

    assert pytest.approx(WARM_S) == left.seconds()
    assert pytest.approx(9.01 / (9.01 + WARM_S)) == left.share()


def test_finished_requests_correct_the_estimates() -> None:
    left = time_left(*keys())
    left.played(keys()[0], 18.0)  # estimated at 9

    assert pytest.approx(2 * (17 + 25)) == left.seconds()


def test_cold_and_warm_are_corrected_separately() -> None:
    left = time_left(*keys(), *keys(cache="warm"))
    left.played(keys()[0], 18.0)
    left.played(keys(cache="warm")[0], 4.5)

    assert pytest.approx(2 * (17 + 25) + 0.5 * (13 + 13)) == left.seconds()


def test_a_cache_setting_not_played_yet_is_corrected_by_its_target() -> None:
    left = time_left(*keys(), *keys(cache="warm"))
    left.played(keys()[0], 18.0)

    assert pytest.approx(2 * (17 + 25) + 2 * WARM_S) == left.seconds()


def test_an_unopened_target_counts_like_the_others() -> None:
    assert pytest.approx(2 * COLD_S) == time_left(*keys(), *keys("other")).seconds()


def test_an_unopened_target_still_counts_after_the_others_have_finished() -> None:
    """While the second model loads, the run is half finished, not finished."""
    left = time_left(*keys(), *keys("other"))
    for key, seconds in zip(keys(), (9.0, 17.0, 25.0), strict=True):
        left.played(key, seconds)

    assert pytest.approx(COLD_S) == left.seconds()
    assert pytest.approx(0.5) == left.share()


def test_the_finished_share_counts_seconds_not_requests() -> None:
    left = time_left(*keys())
    left.played(keys()[2], 25.0)

    assert pytest.approx(25 / COLD_S) == left.share()


def test_a_run_with_nothing_left_is_finished() -> None:
    left = time_left(*keys())
    for key in keys():
        left.played(key, 3.0)

    assert (left.seconds(), left.share()) == (0.0, 1.0)


def test_an_unexpected_request_is_ignored() -> None:
    left = time_left(*keys())
    left.played(keys("stranger")[0], 3.0)

    assert pytest.approx(COLD_S) == left.seconds()
