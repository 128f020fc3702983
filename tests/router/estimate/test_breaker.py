from itertools import pairwise
from random import Random

import pytest

from promptai.router.estimate.breaker import FAILURE_LIMIT, Breaker, BreakerState


def opened(at: float = 0.0) -> Breaker:
    """Return a breaker that a refused connection opened at that time."""
    return Breaker().failed(at, weight=FAILURE_LIMIT)


def test_three_consecutive_failures_open_the_breaker() -> None:
    twice = Breaker().failed(0.0).failed(1.0)
    thrice = twice.failed(2.0)

    assert BreakerState.CLOSED is twice.state(1.0)
    assert twice.allows(1.0)
    assert BreakerState.OPEN is thrice.state(2.0)
    assert not thrice.allows(2.0)
    assert thrice.opened_at == 2.0


def test_a_refused_connection_opens_the_breaker_at_once() -> None:
    refused = Breaker().failed(5.0, limit=4, weight=4)

    assert not refused.allows(5.0)


def test_a_failure_while_open_does_not_extend_the_cooldown() -> None:
    breaker = opened()

    assert breaker == breaker.failed(1.9)
    assert BreakerState.TRIAL is breaker.state(2.0)


def test_a_late_failure_is_not_taken_for_the_outcome_of_a_trial() -> None:
    """The request was sent before the breaker opened and timed out during a trial."""
    on_trial = opened(at=10.0).took_trial(12.0)

    assert on_trial == on_trial.failed(13.0, sent_at=9.0)
    assert BreakerState.OPEN is on_trial.failed(13.0, sent_at=12.0).state(13.0)


def test_a_failed_trial_doubles_the_cooldown_up_to_two_minutes() -> None:
    breaker, now, cooldowns = opened(), 0.0, []
    for _ in range(9):
        cooldowns.append(breaker.cooldown_s)
        now += breaker.cooldown_s
        assert BreakerState.TRIAL is breaker.state(now)
        breaker = breaker.took_trial(now).failed(now)
        assert not breaker.allows(now)

    assert cooldowns == [2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 120.0, 120.0, 120.0]


def test_only_one_trial_runs_at_a_time() -> None:
    due_for_trial = opened()
    on_trial = due_for_trial.took_trial(2.0)

    assert due_for_trial.allows(2.0)
    assert not on_trial.allows(2.0)
    assert not on_trial.allows(100.0)


def test_a_trial_without_an_outcome_expires() -> None:
    on_trial = opened().took_trial(2.0)

    assert not on_trial.allows(121.9)
    assert on_trial.allows(122.0)
    assert not on_trial.took_trial(122.0).allows(122.0)
    assert on_trial.allows(7.0, trial_limit_s=5.0)


def test_a_trial_whose_client_disconnects_allows_another() -> None:
    on_trial = opened().took_trial(2.0)

    assert on_trial.released_trial().allows(2.1)
    assert on_trial.released_trial(sent_at=2.0).allows(2.1)


def test_a_disconnect_from_an_earlier_request_does_not_end_the_trial() -> None:
    """One request was sent before the breaker opened; the other was an earlier trial that expired."""
    on_trial = opened(at=10.0).took_trial(12.0).took_trial(132.0)

    assert on_trial == on_trial.released_trial(sent_at=9.0)
    assert on_trial == on_trial.released_trial(sent_at=12.0)
    assert not on_trial.allows(133.0)


@pytest.mark.parametrize("sent_at", [None, 1.0])
def test_a_disconnect_outside_a_trial_changes_nothing(sent_at: float | None) -> None:
    for breaker in (Breaker().failed(0.0), opened()):
        assert breaker == breaker.released_trial(sent_at=sent_at)


def test_a_failed_trial_allows_another_after_the_cooldown() -> None:
    reopened = opened().took_trial(2.0).failed(3.0)

    assert reopened.allows(7.0)


@pytest.mark.parametrize("breaker", [Breaker(), Breaker().failed(0.0), opened()], ids=["new", "failed-once", "open"])
def test_took_trial_changes_nothing_outside_the_trial_state(breaker: Breaker) -> None:
    assert breaker == breaker.took_trial(1.0)


def test_rest_s_is_the_remaining_cooldown() -> None:
    assert Breaker().rest_s(1.0) == 0.0
    assert opened(at=10.0).rest_s(10.5) == 1.5
    assert opened(at=10.0).rest_s(60.0) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_a_dead_replica_gets_few_requests_and_a_recovered_one_returns_within_150_s(seed: int) -> None:
    """For an hour one request a second on average, all failing; then the board recovers."""
    generator, breaker, now = Random(seed), Breaker(), 0.0
    tried: list[float] = []
    while now < 3600.0 or breaker.opened_at is not None:
        now += generator.expovariate(1.0)
        if breaker.allows(now):
            tried.append(now)
            sent = breaker.took_trial(now)
            breaker = sent.failed(now + 0.01, sent_at=now) if now < 3600.0 else Breaker()

    assert len([at for at in tried if at < 3600.0]) <= 3 + 6 + 3600 / 120
    assert all(after - before <= 150.0 for before, after in pairwise(tried))
    assert now < 3600.0 + 150.0
