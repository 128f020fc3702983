"""How long the rest of a run will take, corrected by what the finished part took.

A progress bar that counts requests lies when late prompts are ten times as long
as early ones. This one counts seconds: each request's time is estimated from its
length and the rates seen in the warm-up, and the estimates of each target and
cache setting are scaled by how wrong they have been so far. Pure.
"""

from collections.abc import Iterable, Mapping

from promptai.bench.plan import Rates
from promptai.bench.trace import Cache, Key
from promptai.bench.workload import Conversation

Group = tuple[str, Cache]


class TimeLeft:
    """
    Estimates for one run.

    Keeps sums a group, not requests, so that asking is cheap however long the run is.

    Args:
        pending: Requests that are still to be made.
        conversations: By id.
    """

    def __init__(self, pending: Iterable[Key], conversations: Mapping[str, Conversation]) -> None:
        self._chars = {key: _new_chars(key, conversations[key.conversation]) for key in pending}
        self._left: dict[Group, _Sum] = {}
        for key, chars in self._chars.items():
            self._left.setdefault((key.target, key.cache), _Sum()).add(chars, 1)
        self._rates: dict[str, Rates] = {}
        self._seen: dict[Group, tuple[float, float]] = {}
        self._finished_s = 0.0
        self._finished = 0

    def opened(self, target: str, rates: Rates) -> None:
        """Learn what a target can do."""
        self._rates[target] = rates

    def played(self, key: Key, seconds: float) -> None:
        """A request is finished and took ``seconds``."""
        self._finished_s += seconds
        self._finished += 1
        chars = self._chars.pop(key, None)
        if chars is None:
            return
        group = (key.target, key.cache)
        self._left[group].add(-chars, -1)
        if key.target in self._rates:
            estimated, taken = self._seen.get(group, (0.0, 0.0))
            self._seen[group] = (estimated + _seconds(chars, 1, self._rates[key.target]), taken + seconds)

    def seconds(self) -> float | None:
        """Seconds that are left; ``None`` while no target has been seen."""
        if not self._rates:
            return None
        known = [
            (_seconds(left.chars, left.count, self._rates[group[0]]) * self._correction(group), left.count)
            for group, left in self._left.items()
            if group[0] in self._rates
        ]
        unknown = sum(left.count for group, left in self._left.items() if group[0] not in self._rates)
        total, count = sum(seconds for seconds, _ in known), sum(count for _, count in known)
        # A target that has not been opened yet counts like those that have, their finished requests included.
        requests = count + self._finished
        return total + (unknown * (total + self._finished_s) / requests if requests else 0.0)

    def share(self) -> float:
        """Finished share of the run's seconds, 0 to 1."""
        left = self.seconds()
        if left is None or self._finished_s + left <= 0:
            return 0.0
        return self._finished_s / (self._finished_s + left)

    def _correction(self, group: Group) -> float:
        """Taken / estimated of the group so far; before its first request, of the same target's other group."""
        pairs = [self._seen[group]] if group in self._seen else [p for g, p in self._seen.items() if g[0] == group[0]]
        estimated, taken = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        return taken / estimated if estimated > 0 else 1.0


class _Sum:
    """Characters to prefill and answers to wait for."""

    def __init__(self) -> None:
        self.chars = 0
        self.count = 0

    def add(self, chars: int, count: int) -> None:
        self.chars += chars
        self.count += count


def _new_chars(key: Key, conversation: Conversation) -> int:
    """Characters that this request has to prefill."""
    chars = conversation.prompt_chars(key.turn)
    if key.cache == "warm" and key.turn > 0:
        return chars - conversation.prompt_chars(key.turn - 1)
    return chars


def _seconds(chars: int, answers: int, rates: Rates) -> float:
    return chars / rates.chars_per_token / rates.prefill_tps + answers * rates.answer_tokens / rates.decode_tps
