"""A key gets what it was promised, no more, and is told when it gets the next."""

import msgspec
import pytest

from promptai.gateway.limits import KeyLimits, Meter, Refusal


def begun(meter: Meter, limits: KeyLimits, now: float, times: int = 1) -> list[Refusal | None]:
    """What that many requests at one moment are told; each ends at once."""
    told = []
    for _ in range(times):
        told.append(meter.begin("k", limits, now))
        if told[-1] is None:
            meter.end("k")
    return told


@pytest.mark.parametrize("name", ["requests_per_min", "tokens_per_min", "concurrent"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=f"{name} must be at least 1, not 0"):
        msgspec.convert({name: 0}, KeyLimits)


def test_requests_beyond_the_minutes_are_refused_until_the_next_is_due() -> None:
    meter, limits = Meter(), KeyLimits(requests_per_min=6)

    assert begun(meter, limits, 100.0, times=7) == [None] * 6 + [Refusal("requests", 10.0)]
    assert begun(meter, limits, 104.0) == [Refusal("requests", pytest.approx(6.0))]  # type: ignore[arg-type]
    assert begun(meter, limits, 110.0, times=2) == [None, Refusal("requests", 10.0)]


def test_whoever_waits_as_long_as_told_is_let_in() -> None:
    for per_min in (7, 13, 59, 61, 1000):
        meter, limits, now = Meter(), KeyLimits(requests_per_min=per_min), 1e6 / 3
        begun(meter, limits, now, times=per_min)
        for _ in range(50):
            (refusal,) = begun(meter, limits, now)
            assert refusal is not None
            now += refusal.retry_after_s
            assert begun(meter, limits, now) == [None]


def test_a_long_pause_gives_no_more_than_a_minutes_worth() -> None:
    meter, limits = Meter(), KeyLimits(requests_per_min=2)
    begun(meter, limits, 0.0, times=2)

    assert begun(meter, limits, 3600.0, times=3)[:2] == [None, None]
    assert begun(meter, limits, 3600.0) != [None]


def test_tokens_may_run_into_debt_once_and_are_paid_off() -> None:
    meter, limits = Meter(), KeyLimits(tokens_per_min=60)
    assert begun(meter, limits, 0.0) == [None]
    meter.charge("k", limits, 159, 0.0)

    assert begun(meter, limits, 0.0) == [Refusal("tokens", 100.0)]
    assert begun(meter, limits, 99.0) == [Refusal("tokens", 1.0)]
    assert begun(meter, limits, 100.0) == [None]


def test_what_is_reserved_is_not_there_for_the_next_until_it_is_charged() -> None:
    meter, limits = Meter(), KeyLimits(tokens_per_min=60)

    assert [meter.reserve("k", limits, 50, 0.0) for _ in range(3)] == [None, None, Refusal("tokens", 41.0)]
    assert begun(meter, limits, 0.0) == [Refusal("tokens", 41.0)]
    assert meter.reserve("other", limits, 50, 0.0) is None
    meter.charge("k", limits, 20, 0.0, reserved=50)
    assert begun(meter, limits, 0.0) == [Refusal("tokens", 11.0)]
    meter.charge("k", limits, 70, 0.0, reserved=50)
    assert begun(meter, limits, 0.0) == [Refusal("tokens", 31.0)]


def test_a_request_that_uses_nothing_gives_all_back_that_was_reserved_and_no_more() -> None:
    meter, limits = Meter(), KeyLimits(tokens_per_min=60)
    meter.reserve("k", limits, 10**9, 0.0)
    meter.charge("k", limits, 0, 30.0, reserved=10**9)

    assert meter.reserve("k", limits, 60, 30.0) is None
    assert begun(meter, limits, 30.0) == [Refusal("tokens", 1.0)]


def test_a_request_larger_than_the_limit_is_possible_once() -> None:
    meter, limits = Meter(), KeyLimits(tokens_per_min=60)

    assert meter.reserve("k", limits, 600, 0.0) is None
    meter.charge("k", limits, 600, 0.0, reserved=600)
    assert begun(meter, limits, 540.0) == [Refusal("tokens", 1.0)]
    assert begun(meter, limits, 541.0) == [None]


def test_a_request_whose_tokens_others_have_reserved_meanwhile_costs_no_request() -> None:
    meter, limits = Meter(), KeyLimits(tokens_per_min=60, requests_per_min=2)
    assert begun(meter, limits, 0.0, times=2) == [None, None]
    assert meter.reserve("k", limits, 60, 0.0) is None
    assert meter.reserve("k", limits, 60, 0.0) == Refusal("tokens", 1.0)
    meter.charge("k", limits, 0, 0.0, reserved=60)

    assert begun(meter, limits, 0.0, times=2) == [None, Refusal("requests", 30.0)]


def test_without_a_limit_of_tokens_nothing_is_reserved() -> None:
    meter = Meter()

    assert [meter.reserve("k", KeyLimits(), 10**9, 0.0) for _ in range(2)] == [None, None]
    assert meter._tokens == {}


def test_a_request_that_is_refused_for_its_tokens_costs_no_request() -> None:
    meter, limits = Meter(), KeyLimits(tokens_per_min=60, requests_per_min=1)
    meter.charge("k", limits, 60, 0.0)

    assert [refusal and refusal.reason for refusal in begun(meter, limits, 0.0, times=3)] == ["tokens"] * 3
    assert begun(meter, limits, 60.0) == [None]


def test_only_so_many_run_at_once() -> None:
    meter, limits = Meter(), KeyLimits(concurrent=2)

    assert [meter.begin("k", limits, 0.0) for _ in range(3)] == [None, None, Refusal("concurrent", 1.0)]
    assert meter.begin("other", limits, 0.0) is None
    meter.end("k")
    assert meter.begin("k", limits, 0.0) is None


def test_requests_that_ended_leave_nothing_behind() -> None:
    meter = Meter()
    begun(meter, KeyLimits(), 0.0, times=3)

    assert (meter.running("k"), meter._running) == (0, {})


def test_a_limit_that_is_lowered_holds_at_once() -> None:
    meter = Meter()
    begun(meter, KeyLimits(requests_per_min=100), 0.0)

    assert begun(meter, KeyLimits(requests_per_min=1), 0.0, times=2)[0] is None
    assert begun(meter, KeyLimits(requests_per_min=1), 0.0) != [None]
    assert begun(meter, KeyLimits(), 0.0) == [None]


def test_a_clock_that_jumps_back_takes_nothing_away() -> None:
    meter, limits = Meter(), KeyLimits(requests_per_min=60)
    begun(meter, limits, 100.0)

    assert begun(meter, limits, 50.0, times=58) == [None] * 58


def test_models_are_those_that_are_listed() -> None:
    assert KeyLimits().allow("any")
    assert [KeyLimits(models=("a",)).allow(name) for name in ("a", "b", "A")] == [True, False, False]
    assert not KeyLimits(models=()).allow("a")
