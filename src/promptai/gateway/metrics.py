"""Export the gateway's metrics to Prometheus; the only module that imports prometheus_client.

Events are counted when they happen. Current state (queues, slots, breakers) is read during a scrape, so it is never
stale, and reading it never loads a model.

Every label has few values: models and replicas of the fleet, never names from requests; any other name becomes
``unknown``. When a replica leaves the fleet, its series are removed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import msgspec
import prometheus_client
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

UNKNOWN = "unknown"

#: Prefill on a board takes from a moment (the whole prompt is cached) to minutes.
_WAIT_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 600.0)
#: From 200 tokens/s down to one token in five seconds.
_TOKEN_BUCKETS_S = (0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_BREAKER = {"closed": 0.0, "trial": 1.0, "open": 2.0}
_RETRY_REASONS = {"busy", "refused", "protocol", "died"}


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """
    One request that has ended; ``None``: unknown, or the request did not get that far.

    Attributes:
        status: HTTP status; 499 if the client disconnected.
        prompt_tokens: Tokens of the prompt, including ``cached_tokens``.
        cached_tokens: Prompt tokens found in a cache.
        ttft_s: Time from arrival to the first token.
        queue_s: Time from arrival until it was sent to a replica.
        decode_s_per_token: Mean time per generated token after the first.
        saved_s: Prefill time that the cached tokens saved.
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
    """Current state of one replica."""

    replica: str
    model: str
    slots: int
    busy: int
    up: bool
    breaker: Literal["closed", "trial", "open"] = "closed"


class FleetSample(msgspec.Struct, frozen=True):
    """
    Current state of the fleet.

    Attributes:
        queued: Queued requests by model.
    """

    queued: dict[str, int] = {}
    replicas: tuple[ReplicaSample, ...] = ()


class Metrics:
    """
    All series of one gateway.

    Args:
        sample: Returns the current state; called at every scrape, must not block.
    """

    def __init__(self, sample: Callable[[], FleetSample] = FleetSample) -> None:
        # Otherwise every counter has a second series with its time of creation, which is not needed.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = prometheus_client.CollectorRegistry()
        self._fleet: set[tuple[str, str]] = set()
        self._models: set[str] = set()
        registry.register(_Gauges(sample))
        prometheus_client.ProcessCollector(registry=registry)
        by_replica = ("model", "replica")

        def counter(name: str, text: str, labels: Sequence[str]) -> prometheus_client.Counter:
            return prometheus_client.Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> prometheus_client.Histogram:
            return prometheus_client.Histogram(name, text, by_replica, registry=registry, buckets=buckets)

        self._requests = counter("promptai_requests", "Finished requests.", (*by_replica, "status"))
        self._tokens = counter("promptai_tokens", "Tokens; prompt includes cached.", ("model", "kind"))
        self._ttft = histogram("promptai_ttft_seconds", "Time from arrival to the first token.", _WAIT_BUCKETS_S)
        self._queue = histogram("promptai_queue_seconds", "Time from arrival to a free slot.", _WAIT_BUCKETS_S)
        self._decode = histogram(
            "promptai_decode_seconds_per_token", "Mean time per token after the first.", _TOKEN_BUCKETS_S
        )
        self._saved = counter("promptai_prefill_seconds_saved", "Prefill time saved by cached tokens.", by_replica)
        self._retries = counter("promptai_retries", "Requests retried on another replica.", ("reason",))
        self._continuations = counter("promptai_continuations", "Answers continued by another replica.", ("how",))

    def set_fleet(self, members: Iterable[tuple[str, str]]) -> None:
        """Set the fleet, as (replica, model), and remove the series of replicas and models that left it."""
        fleet = set(members)
        for replica, model in self._fleet - fleet:
            for family in (self._requests, self._ttft, self._queue, self._decode, self._saved):
                family.remove_by_labels({"model": model, "replica": replica})
        models = {model for _, model in fleet}
        for model in self._models - models:
            self._tokens.remove_by_labels({"model": model})
            self._requests.remove_by_labels({"model": model})
        self._fleet, self._models = fleet, models

    def observe_request(self, record: RequestRecord) -> None:
        """Add a finished request."""
        labels = self._labels(record.model, record.replica)
        status = str(record.status) if 100 <= record.status <= 599 else UNKNOWN
        self._requests.labels(**labels, status=status).inc()
        tokens = {
            "prompt": record.prompt_tokens,
            "cached": record.cached_tokens,
            "generated": record.generated_tokens,
        }
        for kind, number in tokens.items():
            if number:
                self._tokens.labels(model=labels["model"], kind=kind).inc(number)
        times = {
            self._ttft: record.ttft_s,
            self._queue: record.queue_s,
            self._decode: record.decode_s_per_token,
        }
        for family, seconds in times.items():
            if seconds is not None:
                family.labels(**labels).observe(seconds)
        if record.saved_s:
            self._saved.labels(**labels).inc(record.saved_s)

    def observe_retry(self, reason: str) -> None:
        """Count a request that was sent to another replica before its first token."""
        self._retries.labels(reason=reason if reason in _RETRY_REASONS else "other").inc()

    def observe_continuation(self, how: Literal["ids", "text"]) -> None:
        """Count an answer that another replica continued, from token ids or from text."""
        self._continuations.labels(how=how).inc()

    def render(self) -> tuple[bytes, str]:
        """Return all series in Prometheus' text format, and its content type."""
        return prometheus_client.generate_latest(self._registry), prometheus_client.CONTENT_TYPE_LATEST

    def _labels(self, model: str, replica: str) -> dict[str, str]:
        known = (replica, model) in self._fleet
        return {
            "model": model if model in self._models else UNKNOWN,
            "replica": replica if known else UNKNOWN,
        }


class _Gauges(Collector):
    """Reads the current state at every scrape."""

    def __init__(self, sample: Callable[[], FleetSample]) -> None:
        self._sample = sample

    def describe(self) -> Iterable[Metric]:
        """Return nothing: registration would otherwise call ``collect``."""
        return ()

    def collect(self) -> Iterator[Any]:
        """Yield the gauges."""
        sample = self._sample()
        depth = GaugeMetricFamily("promptai_queue_depth", "Queued requests.", labels=["model"])
        for model, number in sample.queued.items():
            depth.add_metric([model], number)
        yield depth
        slots = GaugeMetricFamily("promptai_slots", "Slots of a replica.", labels=["replica", "model"])
        busy = GaugeMetricFamily("promptai_slots_busy", "Slots in use by this gateway.", labels=["replica", "model"])
        up = GaugeMetricFamily("promptai_replica_up", "1 if the replica accepts requests.", labels=["replica", "model"])
        breaker = GaugeMetricFamily(
            "promptai_breaker_state", "Circuit breaker: 0 closed, 1 trial, 2 open.", labels=["replica"]
        )
        for replica in sample.replicas:
            slots.add_metric([replica.replica, replica.model], replica.slots)
            busy.add_metric([replica.replica, replica.model], replica.busy)
            up.add_metric([replica.replica, replica.model], float(replica.up))
            breaker.add_metric([replica.replica], _BREAKER[replica.breaker])
        yield from (slots, busy, up, breaker)
