from random import Random
from typing import TypedDict, Unpack

import pytest

from promptai.fleet.replica import Rates, Replica
from promptai.router.estimate.rates import RateBook
from promptai.wire.llamaserver import Timings

UNKNOWN = Replica(id="a", url="", model="m")
PROFILED = Replica(id="a", url="", model="m", slots=4, rates=Rates(prefill_tps=50.0, decode_tps=10.0, source="profile"))


class Circumstances(TypedDict, total=False):
    """Circumstances of a request that a test may change."""

    model: str
    predicted_cached: float
    mean_streams: float
    alone: bool
    prompt_chars: int
    capped: bool


def observe(
    book: RateBook,
    *,
    prompt_n: int = 0,
    prompt_ms: float = 0.0,
    predicted_n: int = 0,
    predicted_ms: float = 0.0,
    cache_n: int | None = 0,
    **changes: Unpack[Circumstances],
) -> None:
    """Observe one request; with the defaults it teaches nothing."""
    circumstances: Circumstances = {
        "model": "m",
        "predicted_cached": 0.0,
        "mean_streams": 1.0,
        "alone": True,
        "prompt_chars": 0,
        "capped": True,
    }
    circumstances.update(changes)
    book.observe("a", timings=Timings(prompt_n, prompt_ms, predicted_n, predicted_ms, cache_n), **circumstances)


def prefilled(*requests: tuple[int, float, bool]) -> RateBook:
    """Return a book after requests given as (prompt tokens, tokens a second, ran alone)."""
    book = RateBook()
    for tokens, rate, alone in requests:
        observe(book, prompt_n=tokens, prompt_ms=1000 * tokens / rate, alone=alone)
    return book


def decoded(*answers: tuple[float, float], tokens: int = 101) -> RateBook:
    """Return a book after answers given as (streams, seconds a step)."""
    book = RateBook()
    for streams, step_s in answers:
        observe(book, predicted_n=tokens, predicted_ms=1000 * step_s * (tokens - 1), mean_streams=streams)
    return book


def test_rates_of_an_unobserved_replica_are_unknown() -> None:
    book = RateBook()

    assert book.prefill_tps(UNKNOWN) is None
    assert book.decode_step_s(UNKNOWN, 1) is None
    assert book.source(UNKNOWN) == "unknown"
    assert book.trust("a") == 1.0


def test_timings_of_zero_are_ignored() -> None:
    """A server that sends zeros has reported nothing, and is not infinitely fast."""
    book = RateBook()
    observe(book, prompt_n=100, prompt_ms=0.0, predicted_n=100, predicted_ms=0.0, cache_n=None, prompt_chars=400)

    assert book.prefill_tps(UNKNOWN) is None
    assert book.decode_step_s(UNKNOWN, 1) is None
    assert book.chars_per_token("m") == 3.6
    assert book.source(UNKNOWN) == "unknown"


def test_a_source_without_a_rate_is_unknown() -> None:
    assert RateBook().source(Replica(id="a", url="", model="m", rates=Rates(source="settings"))) == "unknown"


def test_the_profile_applies_until_a_rate_is_learned() -> None:
    book = RateBook()

    assert book.prefill_tps(PROFILED) == 50.0
    assert [book.decode_step_s(PROFILED, streams) for streams in (1, 2, 3)] == pytest.approx([0.1, 0.15, 0.2])
    assert book.source(PROFILED) == "profile"

    observe(book, prompt_n=100, prompt_ms=5000.0)
    assert book.prefill_tps(PROFILED) == 20.0
    assert book.decode_step_s(PROFILED, 1) == pytest.approx(0.1)
    assert book.source(PROFILED) == "learned"


def test_rates_start_anew_when_a_replica_changes_its_model() -> None:
    book = prefilled((100, 20.0, True))
    assert book.prefill_tps(Replica(id="a", url="", model="other")) is None

    observe(book, model="other", prompt_n=100, prompt_ms=1000.0)
    assert book.prefill_tps(Replica(id="a", url="", model="other")) == 100.0
    assert book.prefill_tps(UNKNOWN) is None


def test_a_short_prompt_does_not_change_the_prefill_rate() -> None:
    assert prefilled((15, 1.0, True)).prefill_tps(UNKNOWN) is None
    assert prefilled((16, 1.0, True)).prefill_tps(UNKNOWN) == 1.0


def test_the_prefill_rate_is_a_sum_over_a_sum() -> None:
    """1000 tokens in 10 s, then 100 in 5 s; the first request's weight has faded to nine tenths."""
    assert prefilled((1000, 100.0, True), (100, 20.0, True)).prefill_tps(UNKNOWN) == pytest.approx(1000 / 14)


def test_a_request_beside_others_counts_only_if_it_was_faster() -> None:
    book = prefilled((100, 50.0, True))
    for rate, expected in [(20.0, 50.0), (100.0, 190 / 2.8)]:
        observe(book, prompt_n=100, prompt_ms=100_000 / rate, alone=False)
        assert book.prefill_tps(UNKNOWN) == pytest.approx(expected)


def test_a_request_beside_others_is_a_lower_bound_until_one_runs_alone() -> None:
    book = prefilled((100, 20.0, False), (100, 60.0, False), (100, 40.0, False))
    assert book.prefill_tps(UNKNOWN) == 60.0
    assert book.prefill_tps(PROFILED) == 60.0
    assert prefilled((100, 20.0, False)).prefill_tps(PROFILED) == 50.0

    observe(book, prompt_n=100, prompt_ms=2500.0, alone=True)
    assert book.prefill_tps(UNKNOWN) == 40.0


def test_throttling_shows_in_the_rate_after_15_requests() -> None:
    book = prefilled(*[(500, 80.0, True)] * 50, *[(500, 40.0, True)] * 15)

    assert book.prefill_tps(UNKNOWN) == pytest.approx(40.0, rel=0.15)


def test_a_short_answer_does_not_change_the_decode_step() -> None:
    assert decoded((1.0, 0.1), tokens=7).decode_step_s(UNKNOWN, 1) is None
    assert decoded((1.0, 0.1), tokens=8).decode_step_s(UNKNOWN, 1) == pytest.approx(0.1)


def test_steps_for_unobserved_numbers_of_streams_are_interpolated() -> None:
    """Two streams take 0.3 s, so one takes 0.2 s: each further stream adds half of that."""
    book = decoded((2.0, 0.3))

    assert [book.decode_step_s(UNKNOWN, streams) for streams in (0, 1, 2, 3)] == pytest.approx([0.2, 0.2, 0.3, 0.4])


def test_the_slowdown_is_learned_from_observed_steps() -> None:
    """0.1 s with one stream and 0.14 s with three: each further stream adds a fifth."""
    book = decoded((1.0, 0.1), (3.0, 0.14))

    assert [book.decode_step_s(PROFILED, streams) for streams in (1, 2, 3, 4)] == pytest.approx([0.1, 0.12, 0.14, 0.16])
    steps = book.decode_steps(PROFILED)
    assert steps is not None
    assert steps.slowdown == pytest.approx(0.2)


def test_the_slowdown_is_never_negative() -> None:
    """Noise put the step with two streams below the step with one."""
    book = decoded((1.0, 0.11), (2.0, 0.10))

    assert book.decode_step_s(UNKNOWN, 4) == pytest.approx(0.10)


def test_the_default_slowdown_applies_if_a_line_fit_gives_a_negative_step() -> None:
    """The line through these two points is below zero at one stream."""
    book = decoded((2.0, 0.1), (3.0, 1.0))

    assert book.decode_step_s(UNKNOWN, 1) == pytest.approx(0.1 / 1.5)


def test_a_step_at_a_fractional_number_of_streams_is_scaled_to_the_nearest() -> None:
    """A mean of 1.4 streams took 0.24 s, so one takes 0.2 s."""
    assert decoded((1.4, 0.24)).decode_step_s(UNKNOWN, 1) == pytest.approx(0.2)


@pytest.mark.parametrize("seed", range(6))
def test_the_true_decode_steps_are_learned_under_any_load(seed: int) -> None:
    """Steps of 0.08 s that grow by 30 % per stream, with 10 % noise and fractional numbers of streams."""
    generator, book = Random(seed), RateBook()
    for _ in range(400):
        streams = generator.uniform(1.0, 4.4)
        step_s = 0.08 * (1 + 0.3 * (streams - 1)) * generator.uniform(0.9, 1.1)
        observe(book, predicted_n=100, predicted_ms=99_000 * step_s, mean_streams=streams)

    for streams in range(1, 5):
        assert book.decode_step_s(UNKNOWN, streams) == pytest.approx(0.08 * (1 + 0.3 * (streams - 1)), rel=0.1)


def test_an_answer_is_expected_to_have_200_tokens_at_first() -> None:
    assert RateBook().answer_tokens("m") == 200.0


def test_a_capped_answer_raises_the_expected_length() -> None:
    """Its tokens count, its end does not: (200 + 100) tokens over one end."""
    capped, ended = RateBook(), RateBook()
    observe(capped, predicted_n=100, capped=True)
    observe(ended, predicted_n=100, capped=False)

    assert capped.answer_tokens("m") == 300.0
    assert ended.answer_tokens("m") == 150.0


@pytest.mark.parametrize("cap", [50, 400])
@pytest.mark.parametrize("mean", [60.0, 300.0])
def test_the_mean_answer_length_is_learned_even_if_most_answers_are_capped(mean: float, cap: int) -> None:
    """Lengths are exponential, as the estimate assumes; its mean over 20 books is within 15 %."""
    estimates = []
    for seed in range(20):
        generator, book = Random(seed), RateBook()
        for _ in range(300):
            length = generator.expovariate(1 / mean)
            observe(book, predicted_n=round(min(length, cap)), capped=length > cap)
        estimates.append(book.answer_tokens("m"))

    assert sum(estimates) / len(estimates) == pytest.approx(mean, rel=0.15)


def test_characters_per_token_include_the_cached_tokens() -> None:
    book = RateBook()
    for _ in range(200):
        observe(book, prompt_n=50, cache_n=150, prompt_chars=500)

    assert book.chars_per_token("m") == pytest.approx(2.5, rel=0.05)


def test_trust_falls_when_the_cache_never_hits() -> None:
    book = RateBook()
    trusts = []
    for _ in range(8):
        observe(book, predicted_cached=500.0, cache_n=0)
        trusts.append(book.trust("a"))

    assert trusts == sorted(trusts, reverse=True)
    assert trusts[0] > 0.6
    assert trusts[-1] < 0.15


def test_trust_is_at_most_1() -> None:
    book = RateBook()
    observe(book, predicted_cached=100.0, cache_n=900)

    assert book.trust("a") == 1.0


def test_small_predictions_and_unreported_cache_hits_do_not_change_the_trust() -> None:
    book = RateBook()
    observe(book, predicted_cached=31.0, cache_n=0)
    observe(book, predicted_cached=500.0, cache_n=None)

    assert book.trust("a") == 1.0


def test_trust_recovers_when_the_cache_hits_again() -> None:
    book = RateBook()
    for cached in [0] * 20 + [500] * 20:
        observe(book, predicted_cached=500.0, cache_n=cached)

    assert book.trust("a") > 0.85


def test_one_request_updates_the_replica_and_its_model() -> None:
    book = RateBook()
    observe(book, prompt_n=100, prompt_ms=2000.0, predicted_n=11, predicted_ms=1000.0, capped=False)

    assert book.prefill_tps(UNKNOWN) == 50.0
    assert book.decode_step_s(UNKNOWN, 1) == pytest.approx(0.1)
    assert book.answer_tokens("m") == pytest.approx(105.5)


def test_only_the_last_1024_replicas_are_remembered() -> None:
    book = RateBook()
    for number in range(1100):
        timings = Timings(prompt_n=100, prompt_ms=1000.0, predicted_n=1, predicted_ms=0.0)
        book.observe(
            f"pod-{number}",
            model="m",
            timings=timings,
            predicted_cached=0.0,
            mean_streams=1.0,
            alone=True,
            prompt_chars=0,
            capped=True,
        )

    pods = [Replica(id=f"pod-{number}", url="", model="m") for number in range(1100)]
    assert [book.prefill_tps(pod) for pod in pods] == [None] * 76 + [100.0] * 1024
