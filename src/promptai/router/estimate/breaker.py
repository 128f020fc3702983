"""Keep a failing replica out of rotation until it has had time to recover.

A throttled or swapping board rarely fails cleanly: ``/health`` still returns 200 while every prompt times out. So
the router counts the failures of real requests, with one breaker per replica:

    CLOSED --failures reach the limit--> OPEN --cooldown over--> TRIAL
       ^                                   ^                       |
       |                                   +------ failure --------+
       +---------------------------- success ----------------------+

In TRIAL (half-open, in a circuit breaker's usual terms) one request at a time goes through, so a board that is still
broken costs one retry.

A pure state machine: it never sleeps, logs or reads a clock. ``now`` is in seconds of a monotonic clock, so a test
passes an hour of outage in microseconds.
"""

from enum import Enum

import msgspec

FAILURE_LIMIT = 3
_COOLDOWN_S = 2.0
_TRIAL_LIMIT_S = 120.0


class BreakerState(Enum):
    """Requests that the router may send to the replica now."""

    CLOSED = "closed"  # anything
    OPEN = "open"  # nothing
    TRIAL = "trial"  # one request; its outcome decides


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """
    Recent failures of one replica.

    Immutable: every event returns another breaker, so a routing decision works on a stable value. A success resets
    everything: a new ``Breaker()`` follows it.

    Attributes:
        failures: Failures since the last success.
        opened_at: When the replica was last taken out; ``None`` while closed.
        cooldown_s: How long it stays out; doubles each time a trial fails.
        trial_at: When the current trial began; ``None`` without one.
    """

    failures: int = 0
    opened_at: float | None = None
    cooldown_s: float = _COOLDOWN_S
    trial_at: float | None = None

    def state(self, now: float) -> BreakerState:
        """State at that time."""
        if self.opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self.opened_at + self.cooldown_s else BreakerState.TRIAL

    def allows(self, now: float, *, trial_limit_s: float = _TRIAL_LIMIT_S) -> bool:
        """
        Whether a request may be sent now; in TRIAL it must be announced with ``took_trial``.

        Args:
            trial_limit_s: A trial without an outcome after this time is given up, and another may begin. Two
                minutes, since a long prompt on a slow board takes that long to its first token.
        """
        state = self.state(now)
        if state is BreakerState.TRIAL:
            return self.trial_at is None or now >= self.trial_at + trial_limit_s
        return state is BreakerState.CLOSED

    def rest_s(self, now: float) -> float:
        """Seconds until the cooldown ends; 0 without one."""
        return 0.0 if self.opened_at is None else max(0.0, self.opened_at + self.cooldown_s - now)

    def took_trial(self, now: float) -> "Breaker":
        """Record that a request was sent; in TRIAL it is the only one until its outcome."""
        if self.state(now) is not BreakerState.TRIAL:
            return self
        return msgspec.structs.replace(self, trial_at=now)

    def released_trial(self, *, sent_at: float | None = None) -> "Breaker":
        """
        Record that a request ended without an outcome, because its client disconnected.

        Args:
            sent_at: When it was sent; ``None``: it was the trial. A request sent before the trial began does not
                end the trial.
        """
        if self.trial_at is None or (sent_at is not None and sent_at < self.trial_at):
            return self
        return msgspec.structs.replace(self, trial_at=None)

    def failed(
        self,
        now: float,
        *,
        limit: int = FAILURE_LIMIT,
        weight: int = 1,
        sent_at: float | None = None,
        max_cooldown_s: float = 120.0,
    ) -> "Breaker":
        """
        Count a failure; open the breaker at the limit.

        Args:
            limit: Consecutive failures that open the breaker.
            weight: Number of failures this one counts as. A replica that refuses the connection, breaks off or falls
                silent before its first token counts as ``limit``: a board that is off need not fail three requests.
            sent_at: When the failed request was sent, if known. A request sent before the breaker opened changes
                nothing, even during a trial.
            max_cooldown_s: Ceiling for the doubling: a board that was off all night is tried again within two
                minutes of coming back.
        """
        state = self.state(now)
        late = self.opened_at is not None and sent_at is not None and sent_at < self.opened_at
        if state is BreakerState.OPEN or late:
            # Sent before the breaker opened and timed out only now: counting it would extend the outage.
            return self
        failures = self.failures + weight
        if state is BreakerState.TRIAL:
            cooldown_s = min(2 * self.cooldown_s, max_cooldown_s)
            return Breaker(failures=failures, opened_at=now, cooldown_s=cooldown_s)
        return msgspec.structs.replace(self, failures=failures, opened_at=now if failures >= limit else None)
