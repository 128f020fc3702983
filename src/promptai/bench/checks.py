"""Say when a result should not be believed, which check failed, and what to do about it.

A table looks the same whether the board was throttling, swapping or measured
twice. Each check here is a plain function over what was recorded, with its limit
and the reason for the limit beside it. A finding does not hide a number; it
stands next to it. Pure.

The idea of naming the failed check and the remedy is pyperf's; the limits are ours.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import msgspec

from promptai.bench.events import Event, MeasurementCost, Opened, Session
from promptai.bench.manifest import Manifest, TargetFacts
from promptai.bench.resources import samples_during
from promptai.bench.statistics import MIN_FOR_PERCENTILE, Metric
from promptai.bench.trace import Cache, Trace
from promptai.device.sample import Sample


class Finding(msgspec.Struct, frozen=True):
    """
    One thing that a reader must know.

    Attributes:
        check: The check's name, stable, for scripts.
        message: What was seen, with numbers.
        action: What to do next.
        serious: False for what explains a number rather than doubting it.
    """

    check: str
    message: str
    action: str
    serious: bool = True


class Evidence(msgspec.Struct, frozen=True):
    """Everything a check may look at: one target's requests, and the samples taken meanwhile."""

    manifest: Manifest
    facts: TargetFacts
    traces: list[Trace]
    during: list[Sample]
    metrics: Mapping[Cache, Mapping[str, Metric]]
    events: Sequence[Event]

    @property
    def answered(self) -> list[Trace]:
        """Requests without an error."""
        return [trace for trace in self.traces if trace.error is None]

    @property
    def salted(self) -> bool:
        """Whether cold prompts began with a salt, because the server is no llama-server."""
        opened = [event for event in self.events if isinstance(event, Opened) and event.target == self.facts.name]
        return any(event.llama_server is False for event in opened)


def check_target(
    manifest: Manifest,
    facts: TargetFacts,
    traces: Sequence[Trace],
    samples: Sequence[Sample],
    metrics: Mapping[Cache, Mapping[str, Metric]],
    events: Sequence[Event],
) -> list[Finding]:
    """Run every check on one target; serious findings come first."""
    evidence = Evidence(manifest, facts, list(traces), samples_during(traces, samples), metrics, events)
    found = [finding for check in _CHECKS for finding in check(evidence)]
    return sorted(found, key=lambda finding: not finding.serious)


def _failures(seen: Evidence) -> Iterator[Finding]:
    kinds = Counter((trace.error or "").partition(":")[0] for trace in seen.traces if trace.error is not None)
    for kind, count in kinds.most_common():
        action = (
            "give a larger --context, or leave the long conversations out"
            if kind == "ContextExceeded"
            else "see the errors in traces.jsonl and the engine's log, then go on with --resume"
        )
        yield Finding("failures", f"{count} of {len(seen.traces)} requests failed ({kind})", action)


def _telemetry(seen: Evidence) -> Iterator[Finding]:
    error = next((e.telemetry_error for e in seen.events if isinstance(e, MeasurementCost) and e.telemetry_error), None)
    if error is not None:
        yield Finding(
            "telemetry",
            f"telemetry ended early: {error}",
            "memory, CPU and heat are missing or cover a part of the run; measure again",
        )


def _sessions_differ(seen: Evidence) -> Iterator[Finding]:
    machine, sessions = seen.manifest.machine, [event for event in seen.events if isinstance(event, Session)]
    kernels = {machine.kernel, *(session.kernel for session in sessions)}
    governors = {machine.cpu.governor or "none", *(session.governor or "none" for session in sessions)}
    for what, values in (("kernel", kernels), ("CPU governor", governors)):
        if seen.facts.here and sessions and len(values) > 1:
            yield Finding(
                "sessions-differ",
                f"the run was resumed with another {what}: {' and '.join(sorted(values))}",
                "figures of both are mixed; start a new run",
            )


def _few_values(seen: Evidence) -> Iterator[Finding]:
    for cache, metrics in seen.metrics.items():
        n = metrics["ttft_s_mean"].n
        if n < MIN_FOR_PERCENTILE:
            yield Finding(
                "few-values",
                f"only {n} {cache} requests: no percentiles, and intervals are rough",
                "play more conversations; repeats help percentiles, not intervals",
            )


def _wide_interval(seen: Evidence) -> Iterator[Finding]:
    # 5 % is what two quantisations or two engines often differ by: beyond it they cannot be told apart.
    workload = seen.manifest.workload
    remedy = "play more conversations, and keep other programs off the machine"
    if len(workload.selected) == workload.total:
        remedy = f"all {workload.total} conversations were played: take less for noise, or play a larger --workload"
    for cache, metrics in seen.metrics.items():
        decode = metrics["decode_tps"]
        if decode.value and decode.ci95 is not None:
            half = (decode.ci95[1] - decode.ci95[0]) / 2 / decode.value
            if half > 0.05:
                yield Finding(
                    "wide-interval",
                    f"{cache} decode rate is known to +-{100 * half:.0f} % only",
                    remedy,
                )


def _drift(seen: Evidence) -> Iterator[Finding]:
    # Each rate is compared with the mean of its own kind, because long prompts decode slower anyway.
    alike: dict[tuple[Cache, int], list[float]] = {}
    rated = [(trace, rate) for trace in sorted(seen.answered, key=lambda t: t.t_sent) if (rate := trace.decode_tps)]
    for trace, rate in rated:
        alike.setdefault(_kind(trace), []).append(rate)
    relative = [rate * len(same) / sum(same) for trace, rate in rated if (same := alike[_kind(trace)])]
    third = len(relative) // 3
    if third < 10:
        return
    change = sum(relative[-third:]) / sum(relative[:third]) - 1
    if abs(change) > 0.05:
        yield Finding(
            "drift",
            f"decode was {abs(change):.0%} {'slower' if change < 0 else 'faster'} in the last third than in the first",
            "look at temperature, clock and background load over time; cool the board and measure again",
        )


def _kind(trace: Trace) -> tuple[Cache, int]:
    """Requests of one kind should decode alike: same cache setting, prompt length within a factor of two."""
    return trace.cache, (trace.prompt_tokens or 0).bit_length()


def _throttled(seen: Evidence) -> Iterator[Finding]:
    # Raspberry Pi bits: 0 under-voltage, 1 frequency capped, 2 throttled, 3 soft temperature limit;
    # 16 higher, the same since boot, which is why only a change counts.
    names = {0: "under-voltage", 1: "capped clock", 2: "throttling", 3: "soft temperature limit"}
    flags = [sample.throttled for sample in seen.during if sample.throttled is not None]
    for bit, name in names.items():
        share = sum(flag >> bit & 1 for flag in flags) / len(flags) if flags else 0
        remedy = f"{'use the 27 W supply' if bit == 0 else 'cool the board'} and measure again"
        if share:
            yield Finding("throttled", f"{name} during {share:.0%} of the samples", remedy)
        elif flags and flags[-1] >> (bit + 16) & 1 and not flags[0] >> (bit + 16) & 1:
            yield Finding("throttled", f"{name} happened between two samples", remedy)


def _clock(seen: Evidence) -> Iterator[Finding]:
    clocks = [sample.cpu_mhz for sample in seen.during if sample.cpu_mhz is not None]
    # 10 %: governors step in larger strides; smaller wobble is turbo bookkeeping.
    if clocks and min(clocks) < 0.9 * max(clocks):
        yield Finding(
            "clock",
            f"the CPU clock went from {max(clocks):.0f} down to {min(clocks):.0f} MHz while requests ran",
            "set the governor to performance and check cooling",
        )


def _memory_pressure(seen: Evidence) -> Iterator[Finding]:
    swap = [sample.swap_used_bytes for sample in seen.during if sample.swap_used_bytes is not None]
    # Weights are paged in during the warm-up. A fault costs a board about a millisecond.
    growth = sum(max(0, after - before) for before, after in _neighbours(seen.during, lambda s: s.major_faults))
    if growth > 1000:
        yield Finding(
            "paging",
            f"the engine read {growth:,} pages from the disk while answering: weights do not stay in memory",
            "use a smaller model or quantisation, or close other programs",
        )
    if swap and max(swap) - swap[0] > 64 * 1024**2:
        yield Finding(
            "swapping",
            f"swap grew by {(max(swap) - swap[0]) / 1024**2:.0f} MiB while answering",
            "use a smaller model or --context",
        )


def _neighbours(samples: Sequence[Sample], read: Callable[[Sample], int | None]) -> Iterator[tuple[int, int]]:
    """
    Pairs of readings one sampling step apart.

    Across a longer gap another target may have run, or the engine was loaded again.
    """
    for before, after in pairwise(samples):
        first, second = read(before), read(after)
        if first is not None and second is not None and after.t - before.t < 2.5:
            yield first, second


def _background(seen: Evidence) -> Iterator[Finding]:
    others = [
        sample.cpu_percent - sample.engine_cpu_percent
        for sample in seen.during
        if sample.cpu_percent is not None and sample.engine_cpu_percent is not None
    ]
    # The client and telemetry are in this figure too, but take about one percent of one core.
    if len(others) >= 3 and sum(others) / len(others) > 10:
        yield Finding(
            "background-load",
            f"other programs used {sum(others) / len(others):.0f} % of all cores while requests ran",
            "stop them and measure again",
        )


def _clocks_disagree(seen: Evidence) -> Iterator[Finding]:
    for cache, metrics in seen.metrics.items():
        client, engine = metrics["decode_tps"].value, metrics["engine_decode_tps"].value
        if client and engine and abs(client / engine - 1) > 0.05:
            yield Finding(
                "clocks-disagree",
                f"{cache} decode is {client:.1f} tokens/s by the client's clock and {engine:.1f} by the engine's",
                "something between them delays the stream: a proxy, a network, or a busy client",
            )


def _cold_hits(seen: Evidence) -> Iterator[Finding]:
    # Before the salt stands what the template says first, a default system message for one: a few dozen tokens.
    allowed = 128 if seen.salted else 0
    hits = sum(trace.cache == "cold" and (trace.cached_tokens or 0) > allowed for trace in seen.answered)
    if hits:
        yield Finding(
            "cold-cache-hits",
            f"{hits} cold requests took tokens from a cache: their prefill is not cold",
            "the server knows prompts by more than their beginning; restart it before each run"
            if seen.salted
            else "the server ignores cache_prompt=false; measure the engine itself",
        )


def _not_deterministic(seen: Evidence) -> Iterator[Finding]:
    texts: dict[tuple[Cache, str, int], set[str]] = {}
    for trace in seen.answered:
        # A salted prompt is another one each time.
        if trace.text_sha256 is not None and not (seen.salted and trace.cache == "cold"):
            texts.setdefault((trace.cache, trace.conversation, trace.turn), set()).add(trace.text_sha256)
    different = sum(len(hashes) > 1 for hashes in texts.values())
    if different:
        yield Finding(
            "not-deterministic",
            f"{different} of {len(texts)} prompts got different answers when repeated with the same seed",
            "expected with several slots; with one slot the engine is at fault",
        )


def _salted(seen: Evidence) -> Iterator[Finding]:
    if seen.salted and "cold" in seen.metrics:
        yield Finding(
            "salted",
            "the server cannot switch its cache off: each cold prompt began with a salt of about ten tokens",
            "compare cold figures with those of a llama-server only roughly",
            serious=False,
        )


def _no_timings(seen: Evidence) -> Iterator[Finding]:
    if seen.answered and all(trace.prompt_ms is None for trace in seen.answered):
        yield Finding(
            "no-timings",
            "the server does not tell its timings: prefill cannot be told from waiting",
            "measure the llama-server behind it to get prefill rates",
            serious=False,
        )


def _implausible(seen: Evidence) -> Iterator[Finding]:
    # Dense models on a stock Pi 5 decode at 10.1 GB/s / file size (sd 3.8 % over 15 rows of the
    # Edge-LLM leaderboard, December 2024). A published table once was off by a factor of 30.
    model, decode, board = seen.facts.model, seen.metrics.get("cold", {}).get("decode_tps"), seen.manifest.machine.board
    if model is None or decode is None or not decode.value or not board.startswith("Raspberry Pi 5"):
        return
    ratio = decode.value * model.file_bytes / 10.1e9
    # Files below 0.2 GB are not bound by memory, so the law says nothing about them.
    if model.file_bytes > 2e8 and not 0.6 <= ratio <= 1.3:
        yield Finding(
            "implausible",
            f"decode is {ratio:.2f} times what a Raspberry Pi 5's memory bandwidth allows a dense model of this size",
            "below: throttling, swapping or a wrong number of threads; above: a mixture of experts",
        )


def _simd(seen: Evidence) -> Iterator[Finding]:
    engine = seen.facts.engine
    if engine is not None and engine.missing_features:
        yield Finding(
            "simd",
            f"the CPU has {', '.join(engine.missing_features)}, which this engine does not use",
            "a llama-server built for this machine is faster: promptai engine build",
            serious=False,
        )


def _capped(seen: Evidence) -> Iterator[Finding]:
    answered = seen.answered
    capped = sum(trace.finish_reason == "length" for trace in answered)
    if answered and capped == len(answered):
        yield Finding(
            "capped",
            "every answer was cut at the token limit: latency is that of the limit",
            "compare latencies only with runs of the same --max-tokens",
            serious=False,
        )


def _synthetic(seen: Evidence) -> Iterator[Finding]:
    if seen.facts.model is not None and seen.facts.model.synthetic:
        yield Finding(
            "synthetic",
            "the weights are random: speed and memory are real, the text is noise",
            "do not read anything into the answers",
            serious=False,
        )


_CHECKS: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    _failures,
    _telemetry,
    _sessions_differ,
    _cold_hits,
    _not_deterministic,
    _clocks_disagree,
    _implausible,
    _throttled,
    _memory_pressure,
    _background,
    _clock,
    _drift,
    _few_values,
    _wide_interval,
    _salted,
    _no_timings,
    _simd,
    _capped,
    _synthetic,
)
