"""What the gateway has learned of each replica from the requests that it finished.

An earlier run or a forecast says how fast a board ought to be. Then it throttles, swaps, or is
busy with something else. The timings that come back with every answer say how fast it is, so
the router believes those as soon as there are any, and ``Replica.rates`` until then.

Learned of a replica: prefill rate, decode step by the number of streams, and how far it can be
trusted to still have in its cache what was left there. Learned of a model: how long its answers
are, and how many characters make a token.

Averages fade: with every request the earlier ones count a little less, in numerator and
denominator alike, so that a rate is always a sum over a sum. Pure: no clock; a book that nobody
writes in keeps what it says.
"""

from typing import Any

import msgspec

from promptai.fleet.replica import Rates, Replica
from promptai.router.estimate.step_curve import StepCurve, kept, shape
from promptai.wire.llamaserver import Timings

_FADE = 0.9  # of what concerns a board: half is forgotten after 7 requests, so that throttling shows
_FADE_MODEL = 0.98  # of what concerns a model, whose answers vary more than it changes
_MIN_PROMPT_TOKENS = 16  # of fewer, the time is mostly overhead
_MIN_COUNTED_TOKENS = 64  # of fewer, many are marks of the chat template
_MIN_ANSWER_TOKENS = 8
_MIN_CACHED_TOKENS = 32
_ANSWER_PRIOR_TOKENS = 200.0
# Both in tokens: as much as one or two prompts, so that one lost slot does not look like a cache that never works.
_TRUST_PRIOR = 1000.0
_CHARS_PRIOR = 500.0
_CHARS_PER_TOKEN_PRIOR = 3.6
#: Boards and models that are remembered, gone ones included: in a cluster names come and go.
_REMEMBERED = 1024


class _Ratio(msgspec.Struct, frozen=True):
    """A fading sum over a fading sum."""

    above: float = 0.0
    below: float = 0.0

    @property
    def value(self) -> float:
        return self.above / self.below

    def after(self, above: float, below: float, *, fade: float = _FADE) -> "_Ratio":
        return _Ratio(fade * self.above + above, fade * self.below + below)


class _Board(msgspec.Struct):
    """
    What is known of a replica while it serves one model.

    Attributes:
        prefill: Prompt tokens over seconds; ``None`` until a request was alone.
        prefill_bound: The best rate of a request among others, as long as none was alone.
        steps: Seconds over generated tokens, by the number of streams.
    """

    model: str
    prefill: _Ratio | None = None
    prefill_bound: float | None = None
    steps: dict[int, _Ratio] = {}
    cached: _Ratio = _Ratio(_TRUST_PRIOR, _TRUST_PRIOR)


class _Model(msgspec.Struct):
    """
    What is known of a model wherever it runs.

    Attributes:
        answers: Generated tokens over answers that ended by themselves.
        chars: Characters over prompt tokens.
    """

    answers: _Ratio = _Ratio()
    chars: _Ratio = _Ratio(_CHARS_PRIOR * _CHARS_PER_TOKEN_PRIOR, _CHARS_PRIOR)


class RateBook:
    """The only state of this module; one for a gateway."""

    def __init__(self) -> None:
        self._boards: dict[str, _Board] = {}
        self._models: dict[str, _Model] = {}

    def observe(
        self,
        replica_id: str,
        *,
        model: str,
        timings: Timings,
        predicted_cached: float,
        mean_streams: float,
        alone: bool,
        prompt_chars: int,
        capped: bool,
    ) -> None:
        """
        Learn from a finished request.

        Args:
            replica_id: Who answered. A replica that has changed its model is learned anew.
            timings: The engine's own account.
            predicted_cached: Prompt tokens that were expected in the cache.
            mean_streams: Streams on the replica while it answered, this one included, averaged over time.
            alone: Whether there was never another.
            prompt_chars: Of the prompt as it was counted; 0: not known.
            capped: Whether ``max_tokens``, the context or the client ended the answer, not the model.
        """
        board = self._boards.pop(replica_id, None)
        if board is None or board.model != model:
            board = _Board(model)
        self._boards[replica_id] = board
        _trim(self._boards)
        _learn_prefill(board, timings, alone=alone)
        _learn_decode(board, timings, mean_streams)
        _learn_trust(board, timings, predicted_cached)
        known = self._models[model] = self._models.pop(model, _Model())
        _trim(self._models)
        _learn_model(known, timings, prompt_chars, capped=capped)

    def prefill_tps(self, replica: Replica) -> float | None:
        """Prompt tokens a second of a request that is alone; ``None``: not known."""
        board, expected = self._board(replica), replica.rates.prefill_tps
        if board.prefill is not None:
            return board.prefill.value
        if board.prefill_bound is None:
            return expected
        return max(board.prefill_bound, expected or 0.0)

    def decode_step_s(self, replica: Replica, streams: int) -> float | None:
        """
        Seconds from one token of a stream to its next, with so many streams at once; ``None``: not known.

        A number of streams that was not seen is filled in from the nearest that were, by a straight line.
        """
        steps = self.decode_steps(replica)
        return steps.at(streams) if steps is not None else None

    def decode_steps(self, replica: Replica) -> StepCurve | None:
        """``decode_step_s`` of any number of streams; ``None``: not known."""
        seen = self._board(replica).steps
        slowdown = _slowdown(seen)
        if slowdown is None:
            slowdown = replica.rates.decode_slowdown
        if seen:
            return StepCurve.between({streams: step.value for streams, step in seen.items()}, slowdown)
        alone_tps = replica.rates.decode_tps
        return StepCurve.between({1: 1 / alone_tps}, slowdown) if alone_tps else None

    def answer_tokens(self, model: str) -> float:
        """
        Tokens of an answer that nobody cuts, on average.

        A cut answer would have been longer, so its tokens count but its end does not: the estimate for
        exponential lengths. It begins as if one answer of 200 tokens had been seen.
        """
        answers = self._models.get(model, _Model()).answers
        return (_ANSWER_PRIOR_TOKENS + answers.above) / (1.0 + answers.below)

    def chars_per_token(self, model: str) -> float:
        """Characters of a prompt for each of its tokens; 3.6, as of English, until prompts have been seen."""
        return self._models.get(model, _Model()).chars.value

    def trust(self, replica_id: str) -> float:
        """
        How much of what was expected in its cache was there, 0 to 1.

        An engine whose cache does not work (some architectures and builds) is thereby no longer preferred for
        a conversation.
        """
        board = self._boards.get(replica_id)
        return 1.0 if board is None else board.cached.value

    def source(self, replica: Replica) -> str:
        """Where its rates come from: ``learned``, else as ``Rates.source`` says, else ``unknown``."""
        board, rates = self._board(replica), replica.rates
        if board.prefill is not None or board.prefill_bound is not None or board.steps:
            return "learned"
        return rates.source if rates.prefill_tps is not None or rates.decode_tps is not None else "unknown"

    def _board(self, replica: Replica) -> _Board:
        board = self._boards.get(replica.id)
        return board if board is not None and board.model == replica.model else _Board(replica.model)


def _learn_prefill(board: _Board, timings: Timings, *, alone: bool) -> None:
    """Others can only have slowed a request down: its rate is then a lower bound, and counts if it is news."""
    if timings.prompt_n < _MIN_PROMPT_TOKENS or timings.prompt_ms <= 0:
        return
    seconds = timings.prompt_ms / 1000
    rate = timings.prompt_n / seconds
    if alone or (board.prefill is not None and rate > board.prefill.value):
        board.prefill = (board.prefill or _Ratio()).after(timings.prompt_n, seconds)
    elif board.prefill is None:
        board.prefill_bound = max(rate, board.prefill_bound or 0.0)


def _learn_decode(board: _Board, timings: Timings, mean_streams: float) -> None:
    """The number of streams is seldom whole over a request; the step is carried to the nearest that is kept."""
    if timings.predicted_n < _MIN_ANSWER_TOKENS or timings.predicted_ms <= 0:
        return
    streams = kept(mean_streams)
    slowdown = _slowdown(board.steps)
    if slowdown is None:
        slowdown = Rates().decode_slowdown
    carried = shape(slowdown, streams) / shape(slowdown, max(1.0, mean_streams))
    tokens = timings.predicted_n - 1  # the time runs from the first token
    seen = board.steps.get(streams, _Ratio())
    board.steps[streams] = seen.after(carried * timings.predicted_ms / 1000, tokens)


def _learn_trust(board: _Board, timings: Timings, predicted_cached: float) -> None:
    if timings.cache_n is not None and predicted_cached >= _MIN_CACHED_TOKENS:
        board.cached = board.cached.after(min(timings.cache_n, predicted_cached), predicted_cached)


def _learn_model(model: _Model, timings: Timings, prompt_chars: int, *, capped: bool) -> None:
    model.answers = model.answers.after(timings.predicted_n, 0.0 if capped else 1.0, fade=_FADE_MODEL)
    if timings.cache_n is None:
        return
    tokens = timings.prompt_n + timings.cache_n
    if prompt_chars > 0 and tokens >= _MIN_COUNTED_TOKENS:
        model.chars = model.chars.after(prompt_chars, tokens, fade=_FADE_MODEL)


def _trim(known: dict[str, Any]) -> None:
    while len(known) > _REMEMBERED:
        del known[next(iter(known))]


def _slowdown(steps: dict[int, _Ratio]) -> float | None:
    """
    What each further stream adds, as a share of the step of one: a line through the steps, weighted by tokens.

    ``None``: fewer than two numbers of streams were seen, or they make no sense as a line.
    """
    if len(steps) < 2:
        return None
    weight = seconds = weighted = squares = products = 0.0
    for streams, step in steps.items():
        weight += step.below
        seconds += step.above
        weighted += step.below * streams
        squares += step.below * streams * streams
        products += step.above * streams
    slope = (products - seconds * weighted / weight) / (squares - weighted * weighted / weight)
    alone = seconds / weight - slope * (weighted / weight - 1.0)
    return max(0.0, slope / alone) if alone > 0 else None
