"""Learn the speed of each replica from the timings of the requests that it finished.

An earlier run or a forecast predicts how fast a board should be. Then the board throttles, swaps or runs other
programs. Every answer comes with timings, so the router uses those as soon as there are any, and ``Replica.rates``
until then.

Per replica it learns the prefill rate, the decode step by number of streams, and which share of the expected cache
hits occurs. Per model it learns the length of answers and the characters per token.

Averages fade: each request lowers the weight of the earlier ones, in numerator and denominator alike, so a rate is
always a sum over a sum. Pure: no clock; without new requests nothing fades.
"""

from typing import Any

import msgspec

from promptai.fleet.replica import Rates, Replica
from promptai.router.estimate.step_curve import StepCurve, grid_point, shape
from promptai.wire.llamaserver import Timings

_FADE = 0.9  # for replicas: half the weight is gone after 7 requests, so that throttling shows soon
_FADE_MODEL = 0.98  # for models: their answers vary more than the model changes
_MIN_PROMPT_TOKENS = 16  # below this, prefill time is mostly overhead
_MIN_COUNTED_TOKENS = 64  # below this, much of the prompt is the chat template's marks
_MIN_ANSWER_TOKENS = 8
_MIN_CACHED_TOKENS = 32
_ANSWER_PRIOR_TOKENS = 200.0
# Both in tokens, worth one or two prompts: one lost slot must not look like a cache that never works.
_TRUST_PRIOR = 1000.0
_CHARS_PRIOR = 500.0
_CHARS_PER_TOKEN_PRIOR = 3.6
#: Replicas and models to remember, including removed ones: in a cluster names come and go.
_MAX_REMEMBERED = 1024


class _Ratio(msgspec.Struct, frozen=True):
    """A fading sum over a fading sum."""

    above: float = 0.0
    below: float = 0.0

    @property
    def value(self) -> float:
        return self.above / self.below

    def after(self, above: float, below: float, *, fade: float = _FADE) -> "_Ratio":
        return _Ratio(fade * self.above + above, fade * self.below + below)


class _ReplicaRates(msgspec.Struct):
    """
    Learned rates of a replica while it serves one model.

    Attributes:
        prefill: Prompt tokens over seconds; ``None`` until a request ran alone.
        prefill_bound: Best rate of a request beside others, until one ran alone.
        steps: Seconds over generated tokens, by number of streams.
        cache_hits: Cached tokens found over cached tokens expected.
    """

    model: str
    prefill: _Ratio | None = None
    prefill_bound: float | None = None
    steps: dict[int, _Ratio] = {}
    cache_hits: _Ratio = _Ratio(_TRUST_PRIOR, _TRUST_PRIOR)


class _ModelStatistics(msgspec.Struct):
    """
    Learned properties of a model, on any replica.

    Attributes:
        answers: Generated tokens over answers that the model ended itself.
        chars: Characters over prompt tokens.
    """

    answers: _Ratio = _Ratio()
    chars: _Ratio = _Ratio(_CHARS_PRIOR * _CHARS_PER_TOKEN_PRIOR, _CHARS_PRIOR)


class RateBook:
    """Learned rates of all replicas and models of one gateway."""

    def __init__(self) -> None:
        self._replicas: dict[str, _ReplicaRates] = {}
        self._models: dict[str, _ModelStatistics] = {}

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
            replica_id: The replica that answered. Its rates start anew when it changes its model.
            timings: As the engine reported them.
            predicted_cached: Prompt tokens that were expected in the cache.
            mean_streams: Streams on the replica during the answer, this one included, averaged over time.
            alone: Whether no other request ran there meanwhile.
            prompt_chars: Length of the prompt that the engine counted; 0: unknown.
            capped: Whether ``max_tokens``, the context or the client ended the answer, not the model.
        """
        rates = self._replicas.pop(replica_id, None)
        if rates is None or rates.model != model:
            rates = _ReplicaRates(model)
        self._replicas[replica_id] = rates
        _trim(self._replicas)
        _learn_prefill(rates, timings, alone=alone)
        _learn_decode(rates, timings, mean_streams)
        _learn_trust(rates, timings, predicted_cached)
        known = self._models[model] = self._models.pop(model, _ModelStatistics())
        _trim(self._models)
        _learn_model(known, timings, prompt_chars, capped=capped)

    def prefill_tps(self, replica: Replica) -> float | None:
        """Prompt tokens a second of a request that runs alone; ``None`` if unknown."""
        rates, expected = self._of(replica), replica.rates.prefill_tps
        if rates.prefill is not None:
            return rates.prefill.value
        if rates.prefill_bound is None:
            return expected
        return max(rates.prefill_bound, expected or 0.0)

    def decode_step_s(self, replica: Replica, streams: int) -> float | None:
        """
        Seconds from one token of a stream to its next, with that many concurrent streams; ``None`` if unknown.

        Numbers of streams without an observation are interpolated (``StepCurve``).
        """
        steps = self.decode_steps(replica)
        return steps.at(streams) if steps is not None else None

    def decode_steps(self, replica: Replica) -> StepCurve | None:
        """``decode_step_s`` for any number of streams; ``None`` if unknown."""
        seen = self._of(replica).steps
        slowdown = _slowdown(seen)
        if slowdown is None:
            slowdown = replica.rates.decode_slowdown
        if seen:
            return StepCurve.between({streams: step.value for streams, step in seen.items()}, slowdown)
        alone_tps = replica.rates.decode_tps
        return StepCurve.between({1: 1 / alone_tps}, slowdown) if alone_tps else None

    def answer_tokens(self, model: str) -> float:
        """
        Mean length of an answer that the model ends itself, in tokens.

        A capped answer would have been longer, so its tokens count but its end does not: the maximum-likelihood
        estimate for exponential lengths. The prior is one answer of 200 tokens.
        """
        answers = self._models.get(model, _ModelStatistics()).answers
        return (_ANSWER_PRIOR_TOKENS + answers.above) / (1.0 + answers.below)

    def chars_per_token(self, model: str) -> float:
        """Characters per prompt token; starts at 3.6, the value for English."""
        return self._models.get(model, _ModelStatistics()).chars.value

    def trust(self, replica_id: str) -> float:
        """
        Share of the expected cached tokens that a replica's cache held, 0 to 1.

        Keeps the router from preferring an engine whose cache does not work (some architectures and builds).
        """
        rates = self._replicas.get(replica_id)
        return 1.0 if rates is None else rates.cache_hits.value

    def source(self, replica: Replica) -> str:
        """Origin of a replica's rates: ``learned``, else ``Rates.source``, else ``unknown``."""
        learned, expected = self._of(replica), replica.rates
        if learned.prefill is not None or learned.prefill_bound is not None or learned.steps:
            return "learned"
        return expected.source if expected.prefill_tps is not None or expected.decode_tps is not None else "unknown"

    def _of(self, replica: Replica) -> _ReplicaRates:
        rates = self._replicas.get(replica.id)
        return rates if rates is not None and rates.model == replica.model else _ReplicaRates(replica.model)


def _learn_prefill(rates: _ReplicaRates, timings: Timings, *, alone: bool) -> None:
    """Use the rate of a request that ran alone; other requests only slow it down, so theirs is a lower bound."""
    if timings.prompt_n < _MIN_PROMPT_TOKENS or timings.prompt_ms <= 0:
        return
    seconds = timings.prompt_ms / 1000
    rate = timings.prompt_n / seconds
    if alone or (rates.prefill is not None and rate > rates.prefill.value):
        rates.prefill = (rates.prefill or _Ratio()).after(timings.prompt_n, seconds)
    elif rates.prefill is None:
        rates.prefill_bound = max(rate, rates.prefill_bound or 0.0)


def _learn_decode(rates: _ReplicaRates, timings: Timings, mean_streams: float) -> None:
    """Scale the step from the mean number of streams, seldom a whole number, to the nearest grid point."""
    if timings.predicted_n < _MIN_ANSWER_TOKENS or timings.predicted_ms <= 0:
        return
    streams = grid_point(mean_streams)
    slowdown = _slowdown(rates.steps)
    if slowdown is None:
        slowdown = Rates().decode_slowdown
    scale = shape(slowdown, streams) / shape(slowdown, max(1.0, mean_streams))
    tokens = timings.predicted_n - 1  # predicted_ms starts at the first token
    seen = rates.steps.get(streams, _Ratio())
    rates.steps[streams] = seen.after(scale * timings.predicted_ms / 1000, tokens)


def _learn_trust(rates: _ReplicaRates, timings: Timings, predicted_cached: float) -> None:
    if timings.cache_n is not None and predicted_cached >= _MIN_CACHED_TOKENS:
        rates.cache_hits = rates.cache_hits.after(min(timings.cache_n, predicted_cached), predicted_cached)


def _learn_model(model: _ModelStatistics, timings: Timings, prompt_chars: int, *, capped: bool) -> None:
    model.answers = model.answers.after(timings.predicted_n, 0.0 if capped else 1.0, fade=_FADE_MODEL)
    if timings.cache_n is None:
        return
    tokens = timings.prompt_n + timings.cache_n
    if prompt_chars > 0 and tokens >= _MIN_COUNTED_TOKENS:
        model.chars = model.chars.after(prompt_chars, tokens, fade=_FADE_MODEL)


def _trim(known: dict[str, Any]) -> None:
    while len(known) > _MAX_REMEMBERED:
        del known[next(iter(known))]


def _slowdown(steps: dict[int, _Ratio]) -> float | None:
    """
    Share of the single-stream step that each further stream adds: a least-squares line, weighted by tokens.

    ``None`` with fewer than two numbers of streams, or without a positive single-stream step.
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
