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


class TimeLeft:
    """
    Estimates for one run.

    Args:
        pending: Requests that are still to be made.
        conversations: By id.
    """

    def __init__(self, pending: Iterable[Key], conversations: Mapping[str, Conversation]) -> None:
        self._chars = {key: _new_chars(key, conversations[key.conversation]) for key in pending}
        self._rates: dict[str, Rates] = {}
        self._seen: dict[tuple[str, Cache], tuple[float, float]] = {}
        self._finished_s = 0.0

    def opened(self, target: str, rates: Rates) -> None:
        """Learn what a target can do."""
        self._rates[target] = rates

    def played(self, key: Key, seconds: float) -> None:
        """A request is finished and took ``seconds``."""
        chars = self._chars.pop(key, None)
        self._finished_s += seconds
        if chars is not None and key.target in self._rates:
            estimated, taken = self._seen.get((key.target, key.cache), (0.0, 0.0))
            estimate = _seconds(chars, self._rates[key.target])
            self._seen[key.target, key.cache] = (estimated + estimate, taken + seconds)

    def seconds(self) -> float | None:
        """Seconds that are left; ``None`` while no target has been seen."""
        if not self._rates:
            return None
        known: dict[str, float] = dict.fromkeys(self._rates, 0.0)
        counts: dict[str, int] = dict.fromkeys(self._rates, 0)
        unknown = 0
        for key, chars in self._chars.items():
            if key.target in self._rates:
                known[key.target] += _seconds(chars, self._rates[key.target]) * self._correction(key)
                counts[key.target] += 1
            else:
                unknown += 1
        total = sum(known.values())
        # A target that has not been opened yet counts like those that have.
        mean = total / sum(counts.values()) if sum(counts.values()) else 0.0
        return total + unknown * mean

    def share(self) -> float:
        """Finished share of the run's seconds, 0 to 1."""
        left = self.seconds()
        if left is None or self._finished_s + left <= 0:
            return 0.0
        return self._finished_s / (self._finished_s + left)

    def _correction(self, key: Key) -> float:
        estimated, taken = self._seen.get((key.target, key.cache), (0.0, 0.0))
        if estimated <= 0:
            estimated = sum(e for (target, _), (e, _) in self._seen.items() if target == key.target)
            taken = sum(t for (target, _), (_, t) in self._seen.items() if target == key.target)
        return taken / estimated if estimated > 0 else 1.0


def _new_chars(key: Key, conversation: Conversation) -> int:
    """Characters that this request has to prefill."""
    chars = conversation.prompt_chars(key.turn)
    if key.cache == "warm" and key.turn > 0:
        return chars - conversation.prompt_chars(key.turn - 1)
    return chars


def _seconds(chars: int, rates: Rates) -> float:
    return chars / rates.chars_per_token / rates.prefill_tps + rates.answer_tokens / rates.decode_tps
