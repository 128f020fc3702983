"""Keep a failing replica out of rotation until it has had time to recover.

A throttled or swapping board rarely fails cleanly: ``/health`` still answers 200 while
every prompt times out. So the router also counts what really happened to requests, one
breaker for each replica:

    CLOSED --failures reach the limit--> OPEN --cooldown over--> TRIAL
       ^                                   ^                       |
       |                                   +------ failure --------+
       +---------------------------- success ----------------------+

In TRIAL one request at a time goes through: a board that is still broken should cost one
person a retry, not everybody.

A pure state machine: it never sleeps, logs or reads a clock. ``now`` is in seconds of a
monotonic clock, so that a test walks through an hour of outage in microseconds.
"""

from enum import Enum

import msgspec

FAILURE_LIMIT = 3
_COOLDOWN_S = 2.0
_TRIAL_LIMIT_S = 120.0


class BreakerState(Enum):
    """What the router may send to the replica right now."""

    CLOSED = "closed"  # anything
    OPEN = "open"  # nothing
    TRIAL = "trial"  # one request; its outcome decides


class Breaker(msgspec.Struct, frozen=True, kw_only=True):
    """
    The recent history of one replica, as far as routing cares.

    Immutable: every event returns another breaker, so that nothing changes under a decision
    that reads it. A success forgives everything: what follows it is a new ``Breaker()``.

    Attributes:
        failures: Failures since the last success.
        opened_at: When the replica was last taken out; ``None`` while closed.
        cooldown_s: How long it stays out; doubles each time a trial fails.
        trial_at: When the trial that is under way began; ``None``: there is none.
    """

    failures: int = 0
    opened_at: float | None = None
    cooldown_s: float = _COOLDOWN_S
    trial_at: float | None = None

    def state(self, now: float) -> BreakerState:
        """What may be sent at that time."""
        if self.opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self.opened_at + self.cooldown_s else BreakerState.TRIAL

    def allows(self, now: float, *, trial_limit_s: float = _TRIAL_LIMIT_S) -> bool:
        """
        Whether a request may be sent now; in TRIAL it must be announced with ``took_trial``.

        Args:
            trial_limit_s: A trial without an outcome for so long is given up, and another may begin. A long
                prompt on a slow board takes minutes to its first token, hence two of them.
        """
        state = self.state(now)
        if state is BreakerState.TRIAL:
            return self.trial_at is None or now >= self.trial_at + trial_limit_s
        return state is BreakerState.CLOSED

    def rest_s(self, now: float) -> float:
        """Seconds until something may be sent again, as far as the cooldown decides; 0 when it does not."""
        return 0.0 if self.opened_at is None else max(0.0, self.opened_at + self.cooldown_s - now)

    def took_trial(self, now: float) -> "Breaker":
        """A request was sent; in TRIAL it is the only one until its outcome, otherwise nothing changes."""
        if self.state(now) is not BreakerState.TRIAL:
            return self
        return msgspec.structs.replace(self, trial_at=now)

    def released_trial(self, *, sent_at: float | None = None) -> "Breaker":
        """
        A request ended without saying anything of the replica: its client left.

        Args:
            sent_at: When it was sent; ``None``: it was the one on trial. One that was sent before the trial
                began is another, and the trial goes on.
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
        Count a failure, taking the replica out when it is one too many.

        Args:
            limit: Failures in a row that open the breaker.
            weight: As how many it counts. A refused connection counts as ``limit``: a board that is off
                need not fail three people to be believed.
            sent_at: When the failed request was sent, if known. One that was sent before the breaker opened is
                late news even when a trial is under way.
            max_cooldown_s: Ceiling for the doubling, so that a board that was off all night is tried again
                within two minutes of coming back.
        """
        state = self.state(now)
        late = self.opened_at is not None and sent_at is not None and sent_at < self.opened_at
        if state is BreakerState.OPEN or late:
            # Sent before the breaker opened and timed out only now: it says nothing new, and
            # counting it would extend the outage.
            return self
        failures = self.failures + weight
        if state is BreakerState.TRIAL:
            cooldown_s = min(2 * self.cooldown_s, max_cooldown_s)
            return Breaker(failures=failures, opened_at=now, cooldown_s=cooldown_s)
        return msgspec.structs.replace(self, failures=failures, opened_at=now if failures >= limit else None)
