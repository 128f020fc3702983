"""Draw the figures of a run as Vega-Lite charts; the only module that draws.

Each figure answers a question of the paper: the length of prompts, the speed of prefill and decode,
the breakdown of latency, the use of the machine, the steadiness of rates. Data is thinned before
it is embedded: a run of a day would otherwise make a page of 100 MB.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import altair as alt
import msgspec
import vl_convert

from promptai.bench.statistics import BUCKET_EDGES
from promptai.bench.summary import CacheSummary, RecordedRun, Summary
from promptai.bench.trace import Trace
from promptai.device.sample import Sample

_MIB = 1024**2
_MOST_POINTS = 1500
_WIDTH = 700
_COLUMN = _WIDTH / 3 - 30
_RATES = ["prefill", "decode", "total"]
_COLOURS = alt.Scale(domain=["cold", "warm"], range=["#3b6fb6", "#e08a2e"])
_SIZES = [f"{low}–{high - 1}" for low, high in pairwise(BUCKET_EDGES)] + [f"{BUCKET_EDGES[-1]}+"]
VEGA_LITE = "v" + ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])

Row = dict[str, Any]
Series = dict[str, Callable[[Sample], float | None]]
T = TypeVar("T")


class Figure(msgspec.Struct, frozen=True):
    """
    One figure.

    Attributes:
        name: Name used for files and anchors.
        title: The question that it answers, as a heading.
        caption: How to read the figure.
        spec: Vega-Lite with inline data.
    """

    name: str
    title: str
    caption: str
    spec: dict[str, Any]


def draw(run: RecordedRun, summary: Summary) -> list[Figure]:
    """Return every figure for which the run has data."""
    found = [_prompt_lengths(run), _throughput(summary), _latency(summary), _first_token(run)]
    # Telemetry of this machine describes only targets on this machine.
    samples = run.samples if any(target.here for target in run.manifest.targets) else []
    found += [_steadiness(run, summary), _memory(samples), _cpu(samples), _heat(samples)]
    return [figure for figure in found if figure is not None]


def to_svg(figure: Figure) -> str:
    """Render the figure as SVG, without network access."""
    return str(vl_convert.vegalite_to_svg(figure.spec, vl_version=VEGA_LITE, allowed_base_urls=[]))


def to_png(figure: Figure) -> bytes:
    """Render the figure as PNG, at twice the size for sharp print."""
    return bytes(vl_convert.vegalite_to_png(figure.spec, vl_version=VEGA_LITE, scale=2, allowed_base_urls=[]))


def javascript() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, so the page needs no network."""
    return str(vl_convert.javascript_bundle(vl_version=VEGA_LITE))  # type: ignore[call-arg]  # its stub is wrong


def _figure(name: str, title: str, caption: str, chart: Any) -> Figure:
    return Figure(name, title, caption, chart.to_dict())


def _data(rows: list[Row]) -> alt.InlineData:
    return alt.InlineData(values=rows)


def _legend(run: RecordedRun) -> alt.Legend | None:
    """Return a legend of targets; ``None`` for a single target."""
    return alt.Legend() if len(run.manifest.targets) > 1 else None


def _good(run: RecordedRun) -> list[Trace]:
    return [trace for trace in run.traces if trace.error is None]


def _prompt_lengths(run: RecordedRun) -> Figure | None:
    rows: list[Row] = [
        {"target": t.target, "conversation": t.conversation, "turn": t.turn + 1, "tokens": t.prompt_tokens}
        for t in _good(run)
        if t.prompt_tokens is not None and t.cache == run.manifest.protocol.caches[0] and t.repeat == 0
    ]
    if not rows:
        return None
    lines = (
        alt.Chart(_data(rows))
        .mark_line(point=alt.OverlayMarkDef(size=18), opacity=0.55, strokeWidth=1.2)
        .encode(
            x=alt.X("turn:O", title="user turn", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("tokens:Q", title="prompt tokens, including history"),
            detail="conversation:N",
            color=alt.Color("target:N", title=None, legend=_legend(run)),
            tooltip=["conversation:N", "turn:O", "tokens:Q"],
        )
        .properties(width=_WIDTH, height=240)
    )
    return _figure(
        "prompt-lengths",
        "How long were the prompts?",
        "One line per conversation: tokens of the whole prompt at each user turn, by the model's own tokenizer.",
        lines,
    )


def _parts(summary: Summary) -> list[tuple[str, str, CacheSummary]]:
    return [
        (target.name, cache, part)
        for target in summary.targets
        for cache, part in (("cold", target.cold), ("warm", target.warm))
        if part is not None
    ]


def _throughput(summary: Summary) -> Figure | None:
    rows: list[Row] = []
    for target, cache, part in _parts(summary):
        for name in _RATES:
            found = part.metrics[f"{name}_tps"]
            if found.value is not None:
                low, high = found.ci95 or (None, None)
                rows.append(
                    {
                        "target": target,
                        "cache": cache,
                        "rate": name,
                        "tps": found.value,
                        "low": low,
                        "high": high,
                        "n": found.n,
                    }
                )
    if not rows:
        return None
    base = alt.Chart().encode(
        y=alt.Y("target:N", title=None, axis=alt.Axis(labelLimit=160)), yOffset=alt.YOffset("cache:N")
    )
    bars = base.mark_bar().encode(
        x=alt.X("tps:Q", title="tokens/s"),
        color=alt.Color("cache:N", title="KV cache", scale=_COLOURS, legend=alt.Legend(orient="top")),
        tooltip=[
            "target:N",
            "cache:N",
            alt.Tooltip("tps:Q", format=",.2f"),
            alt.Tooltip("low:Q", format=",.2f"),
            alt.Tooltip("high:Q", format=",.2f"),
            "n:Q",
        ],
    )
    whiskers = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q").transform_filter("isValid(datum.low)")
    chart = (
        alt.layer(bars, whiskers, data=_data(rows))
        .properties(width=_COLUMN, height=alt.Step(24))
        .facet(column=alt.Column("rate:N", title=None, sort=_RATES))
        .resolve_scale(x="independent")
    )
    return _figure(
        "throughput",
        "How fast is it?",
        "Sum of tokens / sum of seconds, with 95 % intervals over conversations. Each column has its own scale.",
        chart,
    )


def _latency(summary: Summary) -> Figure | None:
    rows: list[Row] = []
    for target, cache, part in _parts(summary):
        whole, first = part.metrics["latency_s_mean"].value, part.metrics["ttft_s_mean"].value
        if whole is not None and first is not None:
            where = {"where": f"{target}, {cache}"}
            rows.append(where | {"part": "until the first token (prefill)", "seconds": first, "order": 0})
            rows.append(where | {"part": "answering (decode)", "seconds": whole - first, "order": 1})
    if not rows:
        return None
    chart = (
        alt.Chart(_data(rows))
        .mark_bar()
        .encode(
            y=alt.Y("where:N", title=None, axis=alt.Axis(labelLimit=220)),
            x=alt.X("seconds:Q", title="mean seconds per request"),
            color=alt.Color(
                "part:N",
                title=None,
                scale=alt.Scale(
                    domain=["until the first token (prefill)", "answering (decode)"],
                    range=["#7b5ea7", "#4c9f70"],
                ),
                legend=alt.Legend(orient="top", labelLimit=300),
            ),
            order="order:Q",
            tooltip=["where:N", "part:N", alt.Tooltip("seconds:Q", format=",.4f")],
        )
        .properties(width=_WIDTH, height=alt.Step(30))
    )
    return _figure(
        "latency",
        "Where does the time go?",
        "Mean seconds per request on the client's clock, split at the first token.",
        chart,
    )


def _first_token(run: RecordedRun) -> Figure | None:
    rows: list[Row] = [
        {
            "cache": t.cache,
            "target": t.target,
            "tokens": t.prompt_tokens,
            "ttft": t.ttft_s,
            "cached": t.cached_tokens,
        }
        for t in thin(_good(run))
        if t.prompt_tokens is not None and t.ttft_s is not None
    ]
    if not rows:
        return None
    chart = (
        alt.Chart(_data(rows))
        .mark_point(filled=True, opacity=0.6, size=28)
        .encode(
            x=alt.X("tokens:Q", title="prompt tokens"),
            y=alt.Y("ttft:Q", title="seconds until the first token"),
            color=alt.Color("cache:N", title="KV cache", scale=_COLOURS),
            shape=alt.Shape("target:N", title=None, legend=_legend(run)),
            tooltip=["target:N", "cache:N", "tokens:Q", "cached:Q", alt.Tooltip("ttft:Q", format=",.4f")],
        )
        .properties(width=_WIDTH, height=240)
    )
    return _figure(
        "first-token",
        "How long until the first token?",
        "One point per request. Cold, the wait grows with the whole prompt; warm, only with its new part.",
        chart,
    )


def _steadiness(run: RecordedRun, summary: Summary) -> Figure | None:
    rows: list[Row] = [
        {
            "target": target,
            "cache": cache,
            "rate": rate,
            "size": _SIZES[BUCKET_EDGES.index(bucket.low)],
            "mean": bucket.mean[f"{rate}_tps"],
            "cv": bucket.cv[f"{rate}_tps"],
            "n": bucket.n,
        }
        for target, cache, part in _parts(summary)
        for bucket in part.buckets
        for rate in _RATES
        if bucket.mean[f"{rate}_tps"] is not None
    ]
    if not rows:
        return None
    legend = alt.Legend(orient="top")

    def panel(y: alt.Y, height: int) -> alt.FacetChart:
        lines: alt.FacetChart = (
            alt.Chart(_data(rows))
            .mark_line(point=True)
            .encode(
                x=alt.X("size:O", title="prompt tokens", sort=_SIZES, axis=alt.Axis(labelAngle=-40)),
                y=y,
                color=alt.Color("cache:N", title="KV cache", scale=_COLOURS, legend=legend),
                strokeDash=alt.StrokeDash("target:N", title=None, legend=_legend(run)),
                tooltip=["target:N", "cache:N", "size:O", "mean:Q", alt.Tooltip("cv:Q", format=".1%"), "n:Q"],
            )
            .properties(width=_COLUMN, height=height)
            .facet(column=alt.Column("rate:N", title=None, sort=_RATES))
            .resolve_scale(y="independent")
        )
        return lines

    means = panel(alt.Y("mean:Q", title="tokens/s", scale=alt.Scale(zero=True)), 180)
    spread = panel(alt.Y("cv:Q", title="CV at this length", axis=alt.Axis(format="%")), 110)
    return _figure(
        "steadiness",
        "How steady is it across prompt lengths?",
        "Above: the mean of per-prompt rates by prompt length. Below: their coefficient of variation at that length, "
        "sample standard deviation / mean; undefined for a single request.",
        alt.vconcat(means, spread),
    )


def _memory(samples: Sequence[Sample]) -> Figure | None:
    series: Series = {
        "anonymous (KV cache, buffers)": lambda s: _mib(s.engine_anon_bytes),
        "mapped weights (page cache)": lambda s: _mib(s.engine_file_bytes),
    }
    mark = alt.MarkDef("area", opacity=0.75)
    y = alt.Y("value:Q", title="engine memory, MiB", stack="zero")
    chart = _over_time(samples, series, mark, y, ["#b65c5c", "#8fb3a6"])
    return (
        None
        if chart is None
        else _figure(
            "memory", "How much memory does it use?", "The engine's process tree, sampled once per second.", chart
        )
    )


def _cpu(samples: Sequence[Sample]) -> Figure | None:
    series: Series = {
        "the whole machine": lambda s: s.cpu_percent,
        "the engine": lambda s: s.engine_cpu_percent,
    }
    y = alt.Y("value:Q", title="% of all cores", scale=alt.Scale(domain=[0, 100]))
    chart = _over_time(samples, series, alt.MarkDef("line", strokeWidth=1.4), y, ["#9aa5b1", "#3b6fb6"])
    return (
        None
        if chart is None
        else _figure(
            "cpu",
            "How busy is the processor?",
            "100 % means that every core is busy. Gaps between engines are idle.",
            chart,
        )
    )


def _heat(samples: Sequence[Sample]) -> Figure | None:
    y = alt.Y("value:Q", title="°C", scale=alt.Scale(zero=False))
    series: Series = {"processor": lambda s: s.temperature_c}
    chart = _over_time(samples, series, alt.MarkDef("line", strokeWidth=1.4), y, ["#b65c5c"])
    return None if chart is None else _figure("temperature", "Does it get hot?", "The processor's temperature.", chart)


def _over_time(
    samples: Sequence[Sample], series: Series, mark: alt.MarkDef, y: alt.Y, colours: list[str]
) -> alt.Chart | None:
    """Chart several readings over time; ``None`` if this machine has none of them."""
    rows: list[Row] = [
        {"t": sample.t, "kind": kind, "value": value}
        for sample in thin(samples)
        for kind, read in series.items()
        if (value := read(sample)) is not None
    ]
    if not rows:
        return None
    colour = alt.Color(
        "kind:N",
        title=None,
        legend=alt.Legend(orient="top", labelLimit=300) if len(series) > 1 else None,
        scale=alt.Scale(domain=list(series), range=colours),
    )
    tooltip = [alt.Tooltip("kind:N"), alt.Tooltip("value:Q", format=",.1f"), alt.Tooltip("t:Q", format=",.0f")]
    chart: alt.Chart = (
        alt.Chart(_data(rows), mark=mark)
        .encode(x=alt.X("t:Q", title="seconds since the start of the run"), y=y, color=colour, tooltip=tooltip)
        .properties(width=_WIDTH, height=170)
    )
    return chart


def _mib(size: int | None) -> float | None:
    return None if size is None else size / _MIB


def thin(items: Sequence[T]) -> list[T]:
    """Return at most ``_MOST_POINTS`` items, evenly spaced."""
    step = max(1, -(-len(items) // _MOST_POINTS))
    return list(items[::step])
