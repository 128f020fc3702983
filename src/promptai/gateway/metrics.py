"""What the gateway tells Prometheus; the only module that knows prometheus_client.

What happened is counted when it happens; what is (queues, slots, breakers) is asked when
somebody scrapes, so that a scrape never reads anything stale, and never wakes anything.

Every label has few values. Models and replicas are those of the fleet, never what a
request said: any other name becomes ``unknown``. A replica that leaves the fleet takes its
series along.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec
import prometheus_client
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

UNKNOWN = "unknown"

#: A prompt on a board takes from a blink (all of it cached) to minutes.
_WAIT_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 600.0)
#: 200 tokens a second down to one in five seconds.
_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_BREAKER = {"closed": 0.0, "trial": 1.0, "open": 2.0}
_RETRY_REASONS = {"busy", "refused", "protocol", "died"}


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """
    One request that has ended, as far as it got.

    Attributes:
        status: HTTP status; 499 where the client went away.
        prompt_tokens: Tokens of the prompt; ``cached_tokens`` of them were in a cache.
        ttft_s: From its arrival to the first token.
        queue_s: From its arrival until it was sent to a replica.
        decode_s_per_token: Mean time of a generated token after the first.
        saved_s: What prefilling the cached tokens would have taken.
    """

    model: str
    replica: str
    status: int
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    generated_tokens: int | None = None
    ttft_s: float | None = None
    queue_s: float | None = None
    decode_s_per_token: float | None = None
    saved_s: float | None = None


class ReplicaSample(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of a replica at this moment."""

    replica: str
    model: str
    slots: int
    busy: int
    up: bool
    breaker: Literal["closed", "trial", "open"] = "closed"


class FleetSample(msgspec.Struct, frozen=True):
    """
    What is true at this moment.

    Attributes:
        queued: Waiting requests by model.
    """

    queued: dict[str, int] = {}
    replicas: tuple[ReplicaSample, ...] = ()


class Metrics:
    """
    All series of one gateway.

    Args:
        now: Called at every scrape; must not wait for anything.
    """

    def __init__(self, now: Callable[[], FleetSample] = FleetSample) -> None:
        # One series more for each counter, of the moment it was made; nobody asks for it.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = prometheus_client.CollectorRegistry()
        self._fleet: set[tuple[str, str]] = set()
        self._models: set[str] = set()
        registry.register(_Gauges(now))
        prometheus_client.ProcessCollector(registry=registry)
        by_replica = ("model", "replica")

        def counter(name: str, text: str, labels: Sequence[str]) -> prometheus_client.Counter:
            return prometheus_client.Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(name, text, by_replica, registry=registry, buckets=buckets)

        self._requests = counter("promptai_requests", "Requests that have ended.", (*by_replica, "status"))
        self._tokens = counter(
            "promptai_tokens", "Tokens; cached ones are among those of the prompt.", ("model", "kind")
        )
        self._ttft = histogram("promptai_ttft_seconds", "From arrival to the first token.", _WAIT_BUCKETS_S)
        self._queue = histogram("promptai_queue_seconds", "From arrival to a free slot.", _WAIT_BUCKETS_S)
        self._decode = histogram(
            "promptai_decode_seconds_per_token", "Mean time of a token after the first.", _TOKEN_BUCKETS_S
        )
        self._saved = counter(
            "promptai_prefill_seconds_saved", "Prefilling that cached tokens made unnecessary.", by_replica
        )
        self._retries = counter("promptai_retries", "Requests sent to another replica.", ("reason",))
        self._continuations = counter("promptai_continuations", "Answers finished by another replica.", ("how",))

    def set_fleet(self, members: Iterable[tuple[str, str]]) -> None:
        """Take note of the fleet, as (replica, model); series of whatever is not in it any more are removed."""
        fleet = set(members)
        for replica, model in self._fleet - fleet:
            for family in (self._requests, self._ttft, self._queue, self._decode, self._saved):
                family.remove_by_labels({"model": model, "replica": replica})
        models = {model for _, model in fleet}
        for model in self._models - models:
            self._tokens.remove_by_labels({"model": model})
            self._requests.remove_by_labels({"model": model})
        self._fleet, self._models = fleet, models

    def observe_request(self, outcome: RequestRecord) -> None:
        """Count a request that has ended."""
        labels = self._labels(outcome.model, outcome.replica)
        status = str(outcome.status) if 100 <= outcome.status <= 599 else UNKNOWN
        self._requests.labels(**labels, status=status).inc()
        tokens = {
            "prompt": outcome.prompt_tokens,
            "cached": outcome.cached_tokens,
            "generated": outcome.generated_tokens,
        }
        for kind, number in tokens.items():
            if number:
                self._tokens.labels(model=labels["model"], kind=kind).inc(number)
        times = {
            self._ttft: outcome.ttft_s,
            self._queue: outcome.queue_s,
            self._decode: outcome.decode_s_per_token,
        }
        for family, seconds in times.items():
            if seconds is not None:
                family.labels(**labels).observe(seconds)
        if outcome.saved_s:
            self._saved.labels(**labels).inc(outcome.saved_s)

    def observe_retry(self, reason: str) -> None:
        """Count a request that went to another replica before its first token."""
        self._retries.labels(reason=reason if reason in _RETRY_REASONS else "other").inc()

    def observe_continuation(self, how: Literal["ids", "text"]) -> None:
        """Count an answer that another replica went on with, from token ids or from text."""
        self._continuations.labels(how=how).inc()

    def render(self) -> tuple[bytes, str]:
        """Everything in Prometheus' text format, and its content type."""
        return prometheus_client.generate_latest(self._registry), prometheus_client.CONTENT_TYPE_LATEST

    def _labels(self, model: str, replica: str) -> dict[str, str]:
        known = (replica, model) in self._fleet
        return {
            "model": model if model in self._models else UNKNOWN,
            "replica": replica if known else UNKNOWN,
        }


class _Gauges(Collector):
    """Asks what is true when it is scraped."""

    def __init__(self, now: Callable[[], FleetSample]) -> None:
        self._now = now

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask yet."""
        return ()

    def collect(self) -> Iterator[Any]:
        """The gauges."""
        now = self._now()
        depth = GaugeMetricFamily("promptai_queue_depth", "Requests that wait.", labels=["model"])
        for model, number in now.queued.items():
            depth.add_metric([model], number)
        yield depth
        slots = GaugeMetricFamily("promptai_slots", "Streams at once.", labels=["replica", "model"])
        busy = GaugeMetricFamily("promptai_slots_busy", "Streams of this gateway.", labels=["replica", "model"])
        up = GaugeMetricFamily("promptai_replica_up", "1 where it takes requests.", labels=["replica", "model"])
        breaker = GaugeMetricFamily("promptai_breaker_state", "0 closed, 1 trial, 2 open.", labels=["replica"])
        for one in now.replicas:
            slots.add_metric([one.replica, one.model], one.slots)
            busy.add_metric([one.replica, one.model], one.busy)
            up.add_metric([one.replica, one.model], float(one.up))
            breaker.add_metric([one.replica], _BREAKER[one.breaker])
        yield from (slots, busy, up, breaker)
