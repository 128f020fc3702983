"""Effects of requests on the machine: telemetry samples joined to the requests that ran meanwhile.

"CPU %" in a table means little without its denominator and its window. Here it is 0-100 of *all*
usable cores, and only samples within a request count: a board that waits for the next prompt is
idle, not half busy. Memory is split as the kernel splits it, because weights mapped from the file
(page cache) can be dropped and anonymous memory cannot.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence

from promptai.bench.statistics import Metric
from promptai.bench.trace import Trace
from promptai.device.sample import Sample


def samples_during(traces: Iterable[Trace], samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples taken during a request; ``samples`` must be in order of time."""
    times = [sample.t for sample in samples]
    chosen: set[int] = set()
    for trace in traces:
        chosen.update(range(bisect_left(times, trace.t_sent), bisect_right(times, trace.t_end)))
    return [samples[index] for index in sorted(chosen)]


def resource_metrics(traces: Sequence[Trace], samples: Sequence[Sample]) -> dict[str, Metric]:
    """CPU, memory, temperature, clock and power during requests; ``None``: not measured."""
    during = samples_during(traces, samples)
    return {
        "cpu_percent": _mean(during, lambda s: s.cpu_percent, "%"),
        "engine_cpu_percent": _mean(during, lambda s: s.engine_cpu_percent, "%"),
        "memory_anon_bytes": _peak(during, lambda s: s.engine_anon_bytes, "bytes"),
        "memory_file_bytes": _peak(during, lambda s: s.engine_file_bytes, "bytes"),
        "memory_rss_bytes": _peak(during, lambda s: s.engine_rss_bytes, "bytes"),
        "available_bytes_min": _least(during, lambda s: s.available_bytes, "bytes"),
        "swap_used_bytes": _peak(during, lambda s: s.swap_used_bytes, "bytes"),
        "temperature_c_max": _peak(during, lambda s: s.temperature_c, "°C"),
        "cpu_mhz": _mean(during, lambda s: s.cpu_mhz, "MHz"),
        "watts": _mean(during, lambda s: s.watts, "W"),
        "joules_per_token": _joules_per_token(traces, during),
    }


def _joules_per_token(traces: Sequence[Trace], during: Sequence[Sample]) -> Metric:
    """Mean power times the seconds with a request in progress / generated tokens; idle power included."""
    watts = [sample.watts for sample in during if sample.watts is not None]
    counted = [trace for trace in traces if trace.generated_tokens is not None]
    seconds = busy_seconds(counted)
    tokens = sum(trace.generated_tokens or 0 for trace in counted)
    if not watts or not tokens:
        return Metric(None, "J/token", 0)
    return Metric(sum(watts) / len(watts) * seconds / tokens, "J/token", len(watts))


def busy_seconds(traces: Iterable[Trace]) -> float:
    """Seconds with at least one request in progress; overlaps count once."""
    total, end = 0.0, float("-inf")
    for trace in sorted(traces, key=lambda t: t.t_sent):
        total += max(0.0, trace.t_end - max(end, trace.t_sent))
        end = max(end, trace.t_end)
    return total


def _values(samples: Iterable[Sample], field: Callable[[Sample], float | None]) -> list[float]:
    return [value for sample in samples if (value := field(sample)) is not None]


def _mean(samples: Iterable[Sample], field: Callable[[Sample], float | None], unit: str) -> Metric:
    values = _values(samples, field)
    return Metric(sum(values) / len(values) if values else None, unit, len(values))


def _peak(samples: Iterable[Sample], field: Callable[[Sample], float | None], unit: str) -> Metric:
    values = _values(samples, field)
    return Metric(max(values) if values else None, unit, len(values))


def _least(samples: Iterable[Sample], field: Callable[[Sample], float | None], unit: str) -> Metric:
    values = _values(samples, field)
    return Metric(min(values) if values else None, unit, len(values))
