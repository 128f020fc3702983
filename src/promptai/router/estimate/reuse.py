"""Whether a conversation that was answered some time ago will go on.

Which of sixteen conversations is over, nobody says. But how long people take for their next
question can be learned, and whoever has taken six times as long is hardly coming back. What lies
in a cache is worth as much as that. Pure: the time comes in as ``now``.
"""

import math

from promptai.router.estimate.prefix import Chain

#: What is believed before anything was seen, as if of so many conversations: most go on, after two minutes.
_GOES_ON, _GAP_S, _PRIOR = 0.75, 120.0, 4.0
_FADE = 0.98
#: Answers that are remembered, to see whether their conversation goes on; and for how many mean gaps.
_REMEMBERED, GAPS = 2048, 6.0


class ReuseModel:
    """
    What was learned of pauses between an answer and the next question.

    With exponential pauses of mean m, and a share g of answers that are followed by a question at all, a
    conversation of that age goes on with probability

        g e^(-age/m) / (g e^(-age/m) + 1 - g)
    """

    def __init__(self) -> None:
        self._answered: dict[int, float] = {}
        self._back, self._gone, self._gap_s = _GOES_ON * _PRIOR, (1 - _GOES_ON) * _PRIOR, _GOES_ON * _PRIOR * _GAP_S

    @property
    def mean_gap_s(self) -> float:
        """Mean seconds from an answer to the next question."""
        return self._gap_s / self._back

    def answered(self, held: Chain, now: float) -> None:
        """A conversation has been answered; ``held`` is all of it."""
        if len(held.links) > 1:
            mark = _mark(held)
            self._answered.pop(mark, None)  # so that the order stays that of the answers
            self._answered[mark] = now
        patience = GAPS * self.mean_gap_s
        while self._answered:
            oldest, since = next(iter(self._answered.items()))
            if now - since < patience and len(self._answered) <= _REMEMBERED:
                return
            del self._answered[oldest]
            self._learn(back=0.0, mean_gap_s=0.0)

    def asked(self, prompt: Chain, now: float) -> None:
        """A question has come; it may go on a conversation that was answered."""
        for link in reversed(prompt.links):
            since = self._answered.pop(link, None)
            if since is not None:
                self._learn(back=1.0, mean_gap_s=now - since)
                return

    def likely(self, age_s: float) -> float:
        """How likely a conversation goes on that was answered ``age_s`` seconds ago."""
        share = self._back / (self._back + self._gone)
        silent = share * math.exp(-max(0.0, age_s) / self.mean_gap_s)
        return silent / (silent + 1 - share)

    def _learn(self, *, back: float, mean_gap_s: float) -> None:
        self._back = _FADE * self._back + back
        self._gone = _FADE * self._gone + 1 - back
        self._gap_s = _FADE * self._gap_s + mean_gap_s


def _mark(held: Chain) -> int:
    """What the next question will have among its links; not the last one: clients strip what ends in a space."""
    return held.links[-2]
