"""Learn whether, and how soon, a conversation continues after an answer.

Clients never announce that a conversation is over. But the pause before the next question can be learned, and after
six times the mean pause hardly any conversation returns. A cached prompt is worth as much as the probability that it
is used again. Pure: the time comes in as ``now``.
"""

import math

from promptai.router.estimate.prefix import Chain

#: Prior, weighted like ``_PRIOR`` conversations: three quarters continue, after a mean pause of two minutes.
_CONTINUES, _GAP_S, _PRIOR = 0.75, 120.0, 4.0
_FADE = 0.98
#: Answers remembered while their conversation may still continue, and for how many mean pauses.
_MAX_ANSWERS, FORGOTTEN_AFTER_GAPS = 2048, 6.0


class ReuseModel:
    """
    Pauses between an answer and the next question of its conversation.

    With exponential pauses of mean m, and a share g of answers that are followed by a question at all, a
    conversation of age a continues with probability

        g e^(-a/m) / (g e^(-a/m) + 1 - g)
    """

    def __init__(self) -> None:
        self._answered_at: dict[int, float] = {}  # by link, in the order of the answers
        self._returned, self._ended = _CONTINUES * _PRIOR, (1 - _CONTINUES) * _PRIOR
        self._gaps_s = self._returned * _GAP_S

    @property
    def mean_gap_s(self) -> float:
        """Mean seconds from an answer to the next question."""
        return self._gaps_s / self._returned

    def answered(self, conversation: Chain, now: float) -> None:
        """Record an answer; ``conversation`` includes it."""
        if len(conversation.links) > 1:
            link = _continuation_link(conversation)
            self._answered_at.pop(link, None)  # keeps the order of answers
            self._answered_at[link] = now
        horizon_s = FORGOTTEN_AFTER_GAPS * self.mean_gap_s
        while self._answered_at:
            oldest, answered_at = next(iter(self._answered_at.items()))
            if now - answered_at < horizon_s and len(self._answered_at) <= _MAX_ANSWERS:
                return
            del self._answered_at[oldest]
            self._learn(returned=0.0, gap_s=0.0)

    def asked(self, prompt: Chain, now: float) -> None:
        """Record a question, which may continue an answered conversation."""
        for link in reversed(prompt.links):
            answered_at = self._answered_at.pop(link, None)
            if answered_at is not None:
                self._learn(returned=1.0, gap_s=now - answered_at)
                return

    def probability(self, age_s: float) -> float:
        """Probability that a conversation answered ``age_s`` seconds ago continues."""
        share = self._returned / (self._returned + self._ended)
        still_silent = share * math.exp(-max(0.0, age_s) / self.mean_gap_s)
        return still_silent / (still_silent + 1 - share)

    def _learn(self, *, returned: float, gap_s: float) -> None:
        self._returned = _FADE * self._returned + returned
        self._ended = _FADE * self._ended + 1 - returned
        self._gaps_s = _FADE * self._gaps_s + gap_s


def _continuation_link(conversation: Chain) -> int:
    """Link that the next question will contain: the last but one, since clients strip trailing spaces of an answer."""
    return conversation.links[-2]
