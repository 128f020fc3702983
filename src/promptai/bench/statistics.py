"""Metrics with their uncertainty, from traces only.

Three mistakes are common in published tables of this field: a mean of rates presented as
throughput, turns of one conversation counted as independent samples, and a p99 of a dozen
requests. Here rates are sums divided by sums (a mean of rates is named ``mean_of_*``), intervals come
from leaving out whole *conversations*, and a percentile needs twenty values.

Runs are small: five to fifty conversations. At that size a percentile bootstrap, which this
module once used, covers 82 to 93 % instead of 95, and its memory grows with requests times
resamples. The jackknife with Student's t covers more at less cost.

Pure: the same traces give the same summary, byte for byte.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from promptai.bench.trace import Trace

MIN_FOR_PERCENTILE = 20
#: Fewer conversations do not show how much conversations differ.
MIN_FOR_INTERVAL = 5
#: Expected conversations beyond a percentile: five conversations suffice for the median, fifty for the 95th.
_MIN_BEYOND = 2.5

Floats = NDArray[np.float64]


class Metric(msgspec.Struct, frozen=True):
    """
    One reported number.

    Attributes:
        value: ``None``: not measured; never 0 in its place.
        unit: ``s``, ``tokens/s``, ``bytes``, ``%``, ``1`` (a ratio) …
        n: Number of values behind it.
        ci95: 95 % interval over conversations; ``None`` with fewer than five of them (percentiles need more), or
            where none is defined.
    """

    value: float | None
    unit: str
    n: int
    ci95: tuple[float, float] | None = None


class Bucket(msgspec.Struct, frozen=True):
    """
    Requests of similar prompt length.

    Attributes:
        low, high: Range of prompt tokens, including ``low`` but not ``high``; ``None``: unlimited.
        rated: Number of requests with each rate, by metric name.
        cv: Coefficient of variation of each rate within the bucket, by metric name.
        mean: Mean of each rate over the bucket's requests, by metric name.
    """

    low: int
    high: int | None
    n: int
    rated: dict[str, int]
    mean: dict[str, float | None]
    cv: dict[str, float | None]


BUCKET_EDGES = (0, 128, 256, 512, 1024, 2048)
_CV_OF: dict[str, Callable[[Trace], float | None]] = {
    "prefill_tps": lambda trace: trace.prefill_tps,
    "decode_tps": lambda trace: trace.decode_tps,
    "total_tps": lambda trace: trace.total_tps,
}


def latency_metrics(name: str, traces: Sequence[Trace], value: Callable[[Trace], float | None]) -> dict[str, Metric]:
    """Return mean, median, 95th percentile and maximum of a duration in seconds, as ``NAME_mean`` and so on."""
    values, clusters = _collect(traces, value)
    if not values.size:
        return {f"{name}_{what}": Metric(None, "s", 0) for what in ("mean", "p50", "p95", "max")}
    n = int(values.size)
    ones = np.ones_like(values)
    return {
        f"{name}_mean": Metric(float(values.mean()), "s", n, _ratio_interval(values, ones, clusters)),
        f"{name}_p50": _percentile(values, clusters, 50),
        f"{name}_p95": _percentile(values, clusters, 95),
        f"{name}_max": Metric(float(values.max()), "s", n),
    }


def rate_metric(
    traces: Sequence[Trace], count: Callable[[Trace], int | None], seconds: Callable[[Trace], float | None]
) -> Metric:
    """Return a throughput in tokens/s: sum of counts / sum of seconds, over traces with both."""
    counts, times, names = [], [], []
    for trace in traces:
        tokens, duration = count(trace), seconds(trace)
        if tokens is not None and duration is not None and duration > 0:
            counts.append(float(tokens))
            times.append(duration)
            names.append(trace.conversation)
    if not counts:
        return Metric(None, "tokens/s", 0)
    num, den, clusters = np.array(counts), np.array(times), _cluster_index(names)
    return Metric(float(num.sum() / den.sum()), "tokens/s", len(counts), _ratio_interval(num, den, clusters))


def mean_metric(traces: Sequence[Trace], value: Callable[[Trace], float | None], unit: str) -> Metric:
    """Return the arithmetic mean over traces with the value."""
    values, clusters = _collect(traces, value)
    if not values.size:
        return Metric(None, unit, 0)
    return Metric(float(values.mean()), unit, int(values.size), _ratio_interval(values, np.ones_like(values), clusters))


def buckets(traces: Sequence[Trace]) -> list[Bucket]:
    """Group requests by prompt length, with mean and CV of each rate; empty groups are omitted."""
    found = []
    for low, high in zip(BUCKET_EDGES, (*BUCKET_EDGES[1:], None), strict=True):
        inside = [
            trace
            for trace in traces
            if trace.prompt_tokens is not None
            and trace.prompt_tokens >= low
            and (high is None or trace.prompt_tokens < high)
        ]
        if inside:
            values = {name: _present(rate(trace) for trace in inside) for name, rate in _CV_OF.items()}
            found.append(
                Bucket(
                    low=low,
                    high=high,
                    n=len(inside),
                    rated={name: int(v.size) for name, v in values.items()},
                    mean={name: float(v.mean()) if v.size else None for name, v in values.items()},
                    cv={name: coefficient_of_variation(v) for name, v in values.items()},
                )
            )
    return found


def cv_metrics(traces: Sequence[Trace], grouped: Sequence[Bucket]) -> dict[str, Metric]:
    """
    Return the steadiness of each rate, the paper's measure: sample standard deviation / mean of per-prompt throughput.

    ``*_cv_within``: mean of the buckets' own CV, weighted by requests: steadiness at a given length.
    ``*_cv_across``: CV of the bucket means: how much the prompt length changes the rate.
    ``*_cv_all``: CV over all prompts, the paper's figure as far as the paper defines it.
    """
    result: dict[str, Metric] = {}
    for name, rate in _CV_OF.items():
        values = _present(rate(trace) for trace in traces)
        inside = [(b.cv[name], b.rated[name]) for b in grouped]
        known = [(cv, n) for cv, n in inside if cv is not None]
        weight = sum(n for _, n in known)
        within = sum(cv * n for cv, n in known) / weight if weight else None
        means = _present(b.mean[name] for b in grouped)
        result[f"{name}_cv_within"] = Metric(within, "1", weight)
        result[f"{name}_cv_across"] = Metric(coefficient_of_variation(means), "1", int(means.size))
        result[f"{name}_cv_all"] = Metric(coefficient_of_variation(values), "1", int(values.size))
    return result


def coefficient_of_variation(values: Floats) -> float | None:
    """Sample standard deviation (n - 1) / mean; ``None`` for fewer than two values or a mean of 0."""
    if values.size < 2 or values.mean() == 0:
        return None
    return float(values.std(ddof=1) / values.mean())


def _collect(traces: Sequence[Trace], value: Callable[[Trace], float | None]) -> tuple[Floats, NDArray[np.intp]]:
    pairs = [(v, trace.conversation) for trace in traces if (v := value(trace)) is not None]
    return np.array([v for v, _ in pairs], dtype=np.float64), _cluster_index([name for _, name in pairs])


def _present(values: Iterable[float | None]) -> Floats:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def _cluster_index(names: Sequence[str]) -> NDArray[np.intp]:
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.intp)


def _ratio_interval(num: Floats, den: Floats, clusters: NDArray[np.intp]) -> tuple[float, float] | None:
    """
    Interval of sum(num) / sum(den), both positive: delete-one-cluster jackknife of its logarithm, Student's t.

    The logarithm keeps a duration or a rate above 0 and suits their skew.
    """
    count = int(clusters.max()) + 1
    # For each cluster, the sums over all the others.
    nums, dens = num.sum() - np.bincount(clusters, num, count), den.sum() - np.bincount(clusters, den, count)
    if count < MIN_FOR_INTERVAL or nums.min() <= 0 or dens.min() <= 0:
        return None
    value, factor = num.sum() / den.sum(), math.exp(t975(count - 1) * _jackknife_error(np.log(nums / dens)))
    return float(value / factor), float(value * factor)


def _percentile(values: Floats, clusters: NDArray[np.intp], percent: int) -> Metric:
    """
    Return a percentile, interpolated as in NumPy, with Woodruff's interval; ``None`` below twenty values.

    The share of values at or below the percentile is a mean with a known error. The values at the two ends of that
    share's interval bound the percentile.
    """
    n = int(values.size)
    if n < MIN_FOR_PERCENTILE:
        return Metric(None, "s", n)
    share, value = percent / 100, float(np.percentile(values, percent))
    count = int(clusters.max()) + 1
    if count * min(share, 1 - share) < _MIN_BEYOND:
        return Metric(value, "s", n)
    below, sizes = np.bincount(clusters, values <= value, count), np.bincount(clusters, minlength=count)
    half = t975(count - 1) * _jackknife_error((below.sum() - below) / (n - sizes))
    low, high = np.quantile(values, [max(0.0, share - half), min(1.0, share + half)])
    return Metric(value, "s", n, (float(low), float(high)))


def _jackknife_error(without_one: Floats) -> float:
    """Standard error of a figure, from its values without each cluster in turn."""
    count = without_one.size
    return math.sqrt((count - 1) / count * float(((without_one - without_one.mean()) ** 2).sum()))


def t975(freedom: int) -> float:
    """97.5 % point of Student's t for at least 4 degrees of freedom, within 0.0008 (Abramowitz and Stegun 26.7.5)."""
    z, v = 1.959963985, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
