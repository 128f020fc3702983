"""A key gets exactly its limits, and the time until its next request."""

import msgspec
import pytest

from promptai.gateway.limits import KeyLimits, LimitReached, UsageMeter


def begin_and_end(meter: UsageMeter, limits: KeyLimits, now: float, times: int = 1) -> list[LimitReached | None]:
    """Begin so many requests at one moment, each ending at once; return the results."""
    results = []
    for _ in range(times):
        results.append(meter.begin("k", limits, now))
        if results[-1] is None:
            meter.end("k")
    return results


@pytest.mark.parametrize("name", ["requests_per_min", "tokens_per_min", "concurrent"])
def test_refuses_a_limit_of_zero(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"{name} must be at least 1, not 0"):
        msgspec.convert({name: 0}, KeyLimits)


def test_refuses_requests_beyond_the_limit_until_the_bucket_refills() -> None:
    meter, limits = UsageMeter(), KeyLimits(requests_per_min=6)

    assert begin_and_end(meter, limits, 100.0, times=7) == [None] * 6 + [LimitReached("requests", 10.0)]
    assert begin_and_end(meter, limits, 104.0) == [LimitReached("requests", pytest.approx(6.0))]  # type: ignore[arg-type]
    assert begin_and_end(meter, limits, 110.0, times=2) == [None, LimitReached("requests", 10.0)]


def test_admits_a_request_after_exactly_retry_after_s() -> None:
    for per_min in (7, 13, 59, 61, 1000):
        meter, limits, now = UsageMeter(), KeyLimits(requests_per_min=per_min), 1e6 / 3
        begin_and_end(meter, limits, now, times=per_min)
        for _ in range(50):
            (reached,) = begin_and_end(meter, limits, now)
            assert reached is not None
            now += reached.retry_after_s
            assert begin_and_end(meter, limits, now) == [None]


def test_a_long_pause_refills_at_most_a_minutes_worth() -> None:
    meter, limits = UsageMeter(), KeyLimits(requests_per_min=2)
    begin_and_end(meter, limits, 0.0, times=2)

    assert begin_and_end(meter, limits, 3600.0, times=3)[:2] == [None, None]
    assert begin_and_end(meter, limits, 3600.0) != [None]


def test_an_overdrawn_bucket_refuses_requests_until_it_is_refilled() -> None:
    meter, limits = UsageMeter(), KeyLimits(tokens_per_min=60)
    assert begin_and_end(meter, limits, 0.0) == [None]
    meter.charge("k", limits, 159, 0.0)

    assert begin_and_end(meter, limits, 0.0) == [LimitReached("tokens", 100.0)]
    assert begin_and_end(meter, limits, 99.0) == [LimitReached("tokens", 1.0)]
    assert begin_and_end(meter, limits, 100.0) == [None]


def test_reserved_tokens_are_unavailable_until_they_are_charged() -> None:
    meter, limits = UsageMeter(), KeyLimits(tokens_per_min=60)

    assert [meter.reserve("k", limits, 50, 0.0) for _ in range(3)] == [None, None, LimitReached("tokens", 41.0)]
    assert begin_and_end(meter, limits, 0.0) == [LimitReached("tokens", 41.0)]
    assert meter.reserve("other", limits, 50, 0.0) is None
    meter.charge("k", limits, 20, 0.0, reserved=50)
    assert begin_and_end(meter, limits, 0.0) == [LimitReached("tokens", 11.0)]
    meter.charge("k", limits, 70, 0.0, reserved=50)
    assert begin_and_end(meter, limits, 0.0) == [LimitReached("tokens", 31.0)]


def test_releases_exactly_the_reserved_tokens() -> None:
    meter, limits = UsageMeter(), KeyLimits(tokens_per_min=60)
    meter.reserve("k", limits, 10**9, 0.0)
    meter.charge("k", limits, 0, 30.0, reserved=10**9)

    assert meter.reserve("k", limits, 60, 30.0) is None
    assert begin_and_end(meter, limits, 30.0) == [LimitReached("tokens", 1.0)]


def test_admits_one_request_larger_than_the_limit() -> None:
    meter, limits = UsageMeter(), KeyLimits(tokens_per_min=60)

    assert meter.reserve("k", limits, 600, 0.0) is None
    meter.charge("k", limits, 600, 0.0, reserved=600)
    assert begin_and_end(meter, limits, 540.0) == [LimitReached("tokens", 1.0)]
    assert begin_and_end(meter, limits, 541.0) == [None]


def test_a_failed_reservation_does_not_count_as_a_request() -> None:
    meter, limits = UsageMeter(), KeyLimits(tokens_per_min=60, requests_per_min=2)
    assert begin_and_end(meter, limits, 0.0, times=2) == [None, None]
    assert meter.reserve("k", limits, 60, 0.0) is None
    assert meter.reserve("k", limits, 60, 0.0) == LimitReached("tokens", 1.0)
    meter.charge("k", limits, 0, 0.0, reserved=60)

    assert begin_and_end(meter, limits, 0.0, times=2) == [None, LimitReached("requests", 30.0)]


def test_reserves_nothing_without_a_token_limit() -> None:
    meter = UsageMeter()

    assert [meter.reserve("k", KeyLimits(), 10**9, 0.0) for _ in range(2)] == [None, None]
    assert meter._tokens == {}


def test_a_request_refused_for_its_tokens_does_not_count() -> None:
    meter, limits = UsageMeter(), KeyLimits(tokens_per_min=60, requests_per_min=1)
    meter.charge("k", limits, 60, 0.0)

    assert [reached and reached.limit for reached in begin_and_end(meter, limits, 0.0, times=3)] == ["tokens"] * 3
    assert begin_and_end(meter, limits, 60.0) == [None]


def test_limits_concurrent_requests() -> None:
    meter, limits = UsageMeter(), KeyLimits(concurrent=2)

    assert [meter.begin("k", limits, 0.0) for _ in range(3)] == [None, None, LimitReached("concurrent", 1.0)]
    assert meter.begin("other", limits, 0.0) is None
    meter.end("k")
    assert meter.begin("k", limits, 0.0) is None


def test_finished_requests_leave_no_state() -> None:
    meter = UsageMeter()
    begin_and_end(meter, KeyLimits(), 0.0, times=3)

    assert (meter.running("k"), meter._running) == (0, {})


def test_a_lowered_limit_applies_at_once() -> None:
    meter = UsageMeter()
    begin_and_end(meter, KeyLimits(requests_per_min=100), 0.0)

    assert begin_and_end(meter, KeyLimits(requests_per_min=1), 0.0, times=2)[0] is None
    assert begin_and_end(meter, KeyLimits(requests_per_min=1), 0.0) != [None]
    assert begin_and_end(meter, KeyLimits(), 0.0) == [None]


def test_a_clock_that_jumps_back_removes_no_tokens() -> None:
    meter, limits = UsageMeter(), KeyLimits(requests_per_min=60)
    begin_and_end(meter, limits, 100.0)

    assert begin_and_end(meter, limits, 50.0, times=58) == [None] * 58


def test_allows_only_listed_models() -> None:
    assert KeyLimits().allow("any")
    assert [KeyLimits(models=("a",)).allow(name) for name in ("a", "b", "A")] == [True, False, False]
    assert not KeyLimits(models=()).allow("a")
