"""Derive a run's summary from its raw lines, at any time.

``summary.json`` has a ``schema`` number and, per target and per cold/warm, metric
name -> {value, unit, n, ci95}. Nothing here measures: the input is traces, telemetry and events.
docs/reference/summary.md lists every metric.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import msgspec

from promptai.bench.checks import Finding, check_target
from promptai.bench.events import Event, MeasurementCost, Opened
from promptai.bench.manifest import Manifest
from promptai.bench.recorder import is_hopeless, read_events, read_manifest, read_traces, write_whole
from promptai.bench.resources import resource_metrics
from promptai.bench.statistics import (
    Bucket,
    Metric,
    buckets,
    cv_metrics,
    latency_metrics,
    mean_metric,
    rate_metric,
)
from promptai.bench.trace import Cache, Trace
from promptai.device.sample import Sample
from promptai.device.telemetry import read_samples
from promptai.errors import RunError

SCHEMA = 1


class CacheSummary(msgspec.Struct, frozen=True):
    """
    One target with one cache setting.

    Attributes:
        planned, answered, failed: Numbers of requests.
        metrics: Metrics by name.
        buckets: The same rates by prompt length.
    """

    planned: int
    answered: int
    failed: int
    metrics: dict[str, Metric]
    buckets: list[Bucket]


class TargetSummary(msgspec.Struct, frozen=True):
    """
    One target.

    Attributes:
        load_s: Mean seconds of loading, over every load.
        cold, warm: ``None``: not measured with this cache setting.
        findings: Reasons to distrust the numbers, and explanations of them.
    """

    name: str
    synthetic: bool
    load_s: Metric
    cold: CacheSummary | None
    warm: CacheSummary | None
    findings: list[Finding]


class HarnessCost(msgspec.Struct, frozen=True):
    """Resources that measuring used: percent of one core, and peak memory in bytes."""

    cpu_percent_of_one_core: Metric
    client_max_rss_bytes: Metric
    telemetry_max_rss_bytes: Metric


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in numbers."""

    run: str
    complete: bool
    targets: list[TargetSummary]
    harness: HarnessCost
    energy_source: str | None
    schema: int = SCHEMA


class RecordedRun(msgspec.Struct, frozen=True):
    """The contents of a run directory."""

    directory: str
    manifest: Manifest
    traces: list[Trace]
    samples: list[Sample]
    events: list[Event]


def read_run(directory: Path) -> RecordedRun:
    """Read a run; raises ``RunError`` if the directory is not a run or has no trace yet."""
    manifest = read_manifest(directory)
    traces = latest(read_traces(directory))
    if not traces:
        raise RunError(f"run {directory} contains no request yet", hint="continue with promptai bench --resume")
    return RecordedRun(
        directory.resolve().name,
        manifest,
        traces,
        # Sessions of older runs could overlap; joining samples to requests needs them in order.
        sorted(read_samples(directory / "telemetry.jsonl"), key=lambda sample: sample.t),
        read_events(directory),
    )


def latest(traces: Sequence[Trace]) -> list[Trace]:
    """Return one trace per request: the last attempt."""
    return list({trace.key: trace for trace in traces}.values())


def summarize(run: RecordedRun) -> Summary:
    """Derive the summary of a run."""
    planned = run.manifest.workload.turns * run.manifest.protocol.repeats
    costs = [event for event in run.events if isinstance(event, MeasurementCost)]
    targets = []
    for facts in run.manifest.targets:
        mine = [trace for trace in run.traces if trace.target == facts.name]
        # Telemetry of this machine does not describe a server on another.
        samples = run.samples if facts.here else []
        parts: dict[Cache, CacheSummary] = {}
        for cache in run.manifest.protocol.caches:
            of_cache = [trace for trace in mine if trace.cache == cache]
            if of_cache:
                parts[cache] = _part(of_cache, samples, planned)
        loads = [event.load_s for event in run.events if isinstance(event, Opened) and event.target == facts.name]
        known = [load for load in loads if load is not None]
        targets.append(
            TargetSummary(
                name=facts.name,
                synthetic=facts.model is not None and facts.model.synthetic,
                load_s=Metric(sum(known) / len(known) if known else None, "s", len(known)),
                cold=parts.get("cold"),
                warm=parts.get("warm"),
                findings=check_target(
                    run.manifest,
                    facts,
                    mine,
                    samples,
                    {cache: part.metrics for cache, part in parts.items()},
                    run.events,
                ),
            )
        )
    return Summary(
        run=run.directory,
        complete=_complete(run),
        targets=targets,
        harness=_harness(costs),
        energy_source=next((cost.energy_source for cost in costs if cost.energy_source), None),
    )


def _complete(run: RecordedRun) -> bool:
    """Whether each conversation was answered to its end, or until it exceeded the context."""
    answered: Counter[tuple[str, Cache, int, str]] = Counter()
    outgrown: set[tuple[str, Cache, int, str]] = set()
    for trace in run.traces:
        place = (trace.target, trace.cache, trace.repeat, trace.conversation)
        answered[place] += trace.error is None
        if is_hopeless(trace):
            outgrown.add(place)
    asked = run.manifest.protocol
    places = product([t.name for t in run.manifest.targets], asked.caches, range(asked.repeats))
    return all(
        answered[(*place, id_)] == turns or (*place, id_) in outgrown
        for place in places
        for id_, turns in run.manifest.workload.selected.items()
    )


def write_summary(directory: Path, summary: Summary) -> Path:
    """Write ``summary.json`` to the run's directory."""
    path = directory / "summary.json"
    write_whole(path, msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
    return path


def _part(traces: Sequence[Trace], samples: Sequence[Sample], planned: int) -> CacheSummary:
    good = [trace for trace in traces if trace.error is None]
    grouped = buckets(good)
    metrics: dict[str, Metric] = {
        **latency_metrics("ttft_s", good, lambda t: t.ttft_s),
        **latency_metrics("latency_s", good, lambda t: t.latency_s),
        "prefill_tps": rate_metric(good, lambda t: t.uncached_tokens, lambda t: t.prompt_s),
        "decode_tps": rate_metric(good, lambda t: t.decode_steps, lambda t: t.decode_s),
        "engine_decode_tps": rate_metric(good, _engine_steps, _engine_decode_s),
        "total_tps": rate_metric(good, lambda t: t.all_tokens, lambda t: t.latency_s),
        "mean_of_prefill_tps": mean_metric(good, lambda t: t.prefill_tps, "tokens/s"),
        "mean_of_decode_tps": mean_metric(good, lambda t: t.decode_tps, "tokens/s"),
        "mean_of_total_tps": mean_metric(good, lambda t: t.total_tps, "tokens/s"),
        "prompt_tokens_mean": mean_metric(good, lambda t: t.prompt_tokens, "tokens"),
        "generated_tokens_mean": mean_metric(good, lambda t: t.generated_tokens, "tokens"),
        "cached_share": _cached_share(good),
        "capped_share": _capped_share(good),
        **cv_metrics(good, grouped),
        **resource_metrics(good, samples),
    }
    return CacheSummary(
        planned=planned, answered=len(good), failed=len(traces) - len(good), metrics=metrics, buckets=grouped
    )


def _engine_steps(trace: Trace) -> int | None:
    return trace.predicted_n - 1 if trace.predicted_n is not None and trace.predicted_n > 1 else None


def _engine_decode_s(trace: Trace) -> float | None:
    return trace.predicted_ms / 1000 if trace.predicted_ms is not None else None


def _cached_share(traces: Sequence[Trace]) -> Metric:
    known = [(t.cached_tokens, t.prompt_tokens) for t in traces if t.cached_tokens is not None and t.prompt_tokens]
    total = sum(prompt for _, prompt in known)
    return Metric(sum(cached for cached, _ in known) / total if total else None, "1", len(known))


def _capped_share(traces: Sequence[Trace]) -> Metric:
    capped = sum(trace.finish_reason == "length" for trace in traces)
    return Metric(capped / len(traces) if traces else None, "1", len(traces))


def _harness(costs: Sequence[MeasurementCost]) -> HarnessCost:
    wall_s = sum(cost.wall_s for cost in costs)
    telemetry_s = sum(cost.telemetry_wall_s or 0 for cost in costs)
    cpu: float | None = None
    if wall_s and telemetry_s:
        client_share = sum(cost.client_cpu_s for cost in costs) / wall_s
        cpu = 100 * (client_share + sum(cost.telemetry_cpu_s or 0 for cost in costs) / telemetry_s)
    client = [cost.client_max_rss_bytes for cost in costs if cost.client_max_rss_bytes is not None]
    sampler = [cost.telemetry_max_rss_bytes for cost in costs if cost.telemetry_max_rss_bytes is not None]
    return HarnessCost(
        cpu_percent_of_one_core=Metric(cpu, "%", len(costs)),
        client_max_rss_bytes=Metric(max(client) if client else None, "bytes", len(client)),
        telemetry_max_rss_bytes=Metric(max(sampler) if sampler else None, "bytes", len(sampler)),
    )
