"""Forecast the remaining time of a run, corrected by the time of its finished part.

A progress bar that counts requests misleads if late prompts are ten times as long as early ones.
This forecast counts seconds: it estimates each request from its length and the rates of the
warm-up, and scales the estimates of each target and cache setting by their error so far. Pure.
"""

from collections.abc import Iterable, Mapping

import msgspec

from promptai.bench.plan import RequestWork, WarmUpRates, request_work
from promptai.bench.trace import Cache, TraceKey
from promptai.bench.workload import Conversation, History

Group = tuple[str, Cache]


class TimeLeft:
    """
    The forecast of one run.

    Keeps sums per group instead of requests, so a forecast is cheap for any length of run.

    Args:
        pending: Requests left to play.
        conversations: Conversations by id.
        history: Whether earlier answers in a prompt come from the data or from the model.
    """

    def __init__(
        self, pending: Iterable[TraceKey], conversations: Mapping[str, Conversation], history: History
    ) -> None:
        self._work = {
            key: request_work(conversations[key.conversation], key.turn, key.cache, history) for key in pending
        }
        self._left: dict[Group, RequestWork] = {}
        for key, work in self._work.items():
            group = (key.target, key.cache)
            self._left[group] = self._left.get(group, RequestWork()).plus(work)
        self._rates: dict[str, WarmUpRates] = {}
        self._seen: dict[Group, tuple[float, float]] = {}
        self._finished_s = 0.0
        self._finished = 0

    def opened(self, target: str, rates: WarmUpRates) -> None:
        """Record the rates of a target."""
        self._rates[target] = rates

    def played(self, key: TraceKey, seconds: float) -> None:
        """Record that a request finished after ``seconds``."""
        self._finished_s += seconds
        self._finished += 1
        work = self._take(key)
        if work is not None and key.target in self._rates:
            group = (key.target, key.cache)
            estimated, taken = self._seen.get(group, (0.0, 0.0))
            self._seen[group] = (estimated + work.seconds(self._rates[key.target]), taken + seconds)

    def given_up(self, key: TraceKey, seconds: float) -> None:
        """Record that a request failed after ``seconds``; the rest of its conversation will be skipped."""
        self._finished_s += seconds
        self._finished += 1
        while self._take(key) is not None:
            key = msgspec.structs.replace(key, turn=key.turn + 1)

    def seconds(self) -> float | None:
        """Forecast the seconds left; ``None`` until a target has been opened."""
        if not self._rates:
            return None
        known = [
            (left.seconds(self._rates[group[0]]) * self._correction(group), left.answers)
            for group, left in self._left.items()
            if group[0] in self._rates
        ]
        unknown = sum(left.answers for group, left in self._left.items() if group[0] not in self._rates)
        total, count = sum(seconds for seconds, _ in known), sum(count for _, count in known)
        # A target not opened yet counts like the mean of the others, including their finished requests.
        requests = count + self._finished
        return total + (unknown * (total + self._finished_s) / requests if requests else 0.0)

    def share(self) -> float:
        """Return the finished share of the run's seconds, 0 to 1."""
        left = self.seconds()
        if left is None or self._finished_s + left <= 0:
            return 0.0
        return self._finished_s / (self._finished_s + left)

    def _correction(self, group: Group) -> float:
        """Actual / estimated seconds of the group so far; before its first request, of the target's other group."""
        pairs = [self._seen[group]] if group in self._seen else [p for g, p in self._seen.items() if g[0] == group[0]]
        estimated, taken = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        return taken / estimated if estimated > 0 else 1.0

    def _take(self, key: TraceKey) -> RequestWork | None:
        """Remove a request from the work left; ``None`` if it was not part of it."""
        work = self._work.pop(key, None)
        if work is not None:
            group = (key.target, key.cache)
            self._left[group] = self._left[group].plus(work, -1)
        return work
