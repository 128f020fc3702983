"""Report why a result may not be trustworthy: the failed check, the numbers, and the remedy.

A table looks the same whether the board throttled, swapped or was measured twice. Each check is a
plain function over the recorded data, with its limit and the reason for the limit beside it. A
finding does not hide a number; it stands next to it. Pure.

Naming the failed check and the remedy is pyperf's idea; the limits are our own.
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
    A reason to distrust a number, or an explanation of it.

    Attributes:
        check: The check's name, stable for scripts.
        message: The observation, with numbers.
        action: The remedy.
        serious: True for a warning, which calls a number into question; False for a note, which explains it.
    """

    check: str
    message: str
    action: str
    serious: bool = True


class Evidence(msgspec.Struct, frozen=True):
    """The data of one target: its requests, and the samples taken during them."""

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
        """Whether cold prompts began with a salt, because the server is not a llama-server."""
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
    """Run every check on one target; warnings come before notes."""
    evidence = Evidence(manifest, facts, list(traces), samples_during(traces, samples), metrics, events)
    found = [finding for check in _CHECKS for finding in check(evidence)]
    return sorted(found, key=lambda finding: not finding.serious)


def _failures(seen: Evidence) -> Iterator[Finding]:
    kinds = Counter((trace.error or "").partition(":")[0] for trace in seen.traces if trace.error is not None)
    for kind, count in kinds.most_common():
        action = (
            "use a larger --context, or remove the long conversations"
            if kind == "ContextExceeded"
            else "see the errors in traces.jsonl and the engine's log, then continue with --resume"
        )
        yield Finding("failures", f"{count} of {len(seen.traces)} requests failed ({kind})", action)


def _telemetry(seen: Evidence) -> Iterator[Finding]:
    error = next((e.telemetry_error for e in seen.events if isinstance(e, MeasurementCost) and e.telemetry_error), None)
    if error is not None:
        yield Finding(
            "telemetry",
            f"telemetry ended early ({error})",
            "memory, CPU and temperature are missing or incomplete; measure again",
        )


def _sessions_differ(seen: Evidence) -> Iterator[Finding]:
    machine, sessions = seen.manifest.machine, [event for event in seen.events if isinstance(event, Session)]
    kernels = {machine.kernel, *(session.kernel for session in sessions)}
    governors = {machine.cpu.governor or "none", *(session.governor or "none" for session in sessions)}
    for what, values in (("kernel", kernels), ("CPU governor", governors)):
        if seen.facts.here and sessions and len(values) > 1:
            yield Finding(
                "sessions-differ",
                f"the run was resumed with a different {what} ({' and '.join(sorted(values))})",
                "the figures mix both; start a new run",
            )


def _few_values(seen: Evidence) -> Iterator[Finding]:
    for cache, metrics in seen.metrics.items():
        n = metrics["ttft_s_mean"].n
        if n < MIN_FOR_PERCENTILE:
            yield Finding(
                "few-values",
                f"only {n} {cache} requests, so there are no percentiles and intervals are rough",
                "play more conversations; repeats improve percentiles, not intervals",
            )


def _wide_interval(seen: Evidence) -> Iterator[Finding]:
    # Two quantisations or two engines often differ by 5 %; a wider interval cannot separate them.
    workload = seen.manifest.workload
    remedy = "play more conversations, and keep other programs off the machine"
    if len(workload.selected) == workload.total:
        remedy = (
            f"all {workload.total} conversations were played; treat smaller differences as noise, "
            "or use a larger --workload"
        )
    for cache, metrics in seen.metrics.items():
        decode = metrics["decode_tps"]
        if decode.value and decode.ci95 is not None:
            half = (decode.ci95[1] - decode.ci95[0]) / 2 / decode.value
            if half > 0.05:
                yield Finding(
                    "wide-interval",
                    f"the {cache} decode rate is only accurate to ±{100 * half:.0f} %",
                    remedy,
                )


def _drift(seen: Evidence) -> Iterator[Finding]:
    # Each rate is compared with the mean of similar requests, because decoding is slower after long prompts.
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
        direction = "slower" if change < 0 else "faster"
        yield Finding(
            "drift",
            f"decode was {100 * abs(change):.0f} % {direction} in the last third of the run than in the first",
            "check temperature, clock and background load over time; cool the board and measure again",
        )


def _kind(trace: Trace) -> tuple[Cache, int]:
    """Group requests that should decode alike: same cache setting, prompt length within a factor of two."""
    return trace.cache, (trace.prompt_tokens or 0).bit_length()


def _throttled(seen: Evidence) -> Iterator[Finding]:
    # Raspberry Pi bits: 0 under-voltage, 1 frequency capped, 2 throttled, 3 soft temperature limit; plus 16: the
    # same since boot, so only a change counts.
    names = {0: "under-voltage", 1: "capped clock", 2: "throttling", 3: "soft temperature limit"}
    flags = [sample.throttled for sample in seen.during if sample.throttled is not None]
    for bit, name in names.items():
        share = sum(flag >> bit & 1 for flag in flags) / len(flags) if flags else 0
        remedy = f"{'use the 27 W power supply' if bit == 0 else 'cool the board'} and measure again"
        if share:
            yield Finding("throttled", f"{name} in {100 * share:.0f} % of the samples", remedy)
        elif flags and flags[-1] >> (bit + 16) & 1 and not flags[0] >> (bit + 16) & 1:
            yield Finding("throttled", f"{name} occurred between two samples", remedy)


def _clock(seen: Evidence) -> Iterator[Finding]:
    clocks = [sample.cpu_mhz for sample in seen.during if sample.cpu_mhz is not None]
    # Governors change the clock in steps of more than 10 %; smaller changes are turbo bookkeeping.
    if clocks and min(clocks) < 0.9 * max(clocks):
        yield Finding(
            "clock",
            f"the CPU clock ranged from {min(clocks):.0f} to {max(clocks):.0f} MHz during requests",
            "set the governor to performance and check the cooling",
        )


def _memory_pressure(seen: Evidence) -> Iterator[Finding]:
    swap = [sample.swap_used_bytes for sample in seen.during if sample.swap_used_bytes is not None]
    # The warm-up has paged the weights in. On a board a major fault costs about a millisecond.
    growth = sum(max(0, after - before) for before, after in _neighbours(seen.during, lambda s: s.major_faults))
    if growth > 1000:
        yield Finding(
            "paging",
            f"the engine read {growth:,} pages from disk during requests, so the weights do not stay in memory",
            "use a smaller model or quantisation, or stop other programs",
        )
    if swap and max(swap) - swap[0] > 64 * 1024**2:
        yield Finding(
            "swapping",
            f"swap grew by {(max(swap) - swap[0]) / 1024**2:.0f} MiB during requests",
            "use a smaller model or a smaller --context",
        )


def _neighbours(samples: Sequence[Sample], read: Callable[[Sample], int | None]) -> Iterator[tuple[int, int]]:
    """
    Yield pairs of readings one sampling step apart.

    A longer gap may contain another target, or a new load of the engine.
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
    # This includes the client and telemetry, about 1 % of one core.
    if len(others) >= 3 and sum(others) / len(others) > 10:
        yield Finding(
            "background-load",
            f"other programs used {sum(others) / len(others):.0f} % of all cores during requests",
            "stop them and measure again",
        )


def _clocks_disagree(seen: Evidence) -> Iterator[Finding]:
    for cache, metrics in seen.metrics.items():
        client, engine = metrics["decode_tps"].value, metrics["engine_decode_tps"].value
        if client and engine and abs(client / engine - 1) > 0.05:
            yield Finding(
                "clocks-disagree",
                f"{cache} decode is {client:.1f} tokens/s by the client's clock but {engine:.1f} by the engine's",
                "look for a delay between engine and client (a proxy, the network or a busy client)",
            )


def _cold_hits(seen: Evidence) -> Iterator[Finding]:
    # The template puts text before the salt, such as a default system message: a few dozen tokens.
    allowed = 128 if seen.salted else 0
    hits = sum(trace.cache == "cold" and (trace.cached_tokens or 0) > allowed for trace in seen.answered)
    if hits:
        yield Finding(
            "cold-cache-hits",
            f"{hits} cold requests reused cached tokens, so their prefill was not cold",
            "the server caches more than prompt prefixes; restart it before each run"
            if seen.salted
            else "the server ignores cache_prompt=false; measure the engine itself",
        )


def _not_deterministic(seen: Evidence) -> Iterator[Finding]:
    texts: dict[tuple[Cache, str, int], set[str]] = {}
    for trace in seen.answered:
        # A salted prompt differs each time.
        if trace.text_sha256 is not None and not (seen.salted and trace.cache == "cold"):
            texts.setdefault((trace.cache, trace.conversation, trace.turn), set()).add(trace.text_sha256)
    different = sum(len(hashes) > 1 for hashes in texts.values())
    if different:
        yield Finding(
            "not-deterministic",
            f"{different} of {len(texts)} prompts gave different answers with the same seed",
            "this is expected with several slots; with one slot it is a fault of the engine",
        )


def _salted(seen: Evidence) -> Iterator[Finding]:
    if seen.salted and "cold" in seen.metrics:
        yield Finding(
            "salted",
            "the server cannot disable its cache, so each cold prompt began with a salt of about ten tokens",
            "cold figures compare only roughly with those of a llama-server",
            serious=False,
        )


def _no_timings(seen: Evidence) -> Iterator[Finding]:
    if seen.answered and all(trace.prompt_ms is None for trace in seen.answered):
        yield Finding(
            "no-timings",
            "the server reports no timings, so prefill and waiting cannot be separated",
            "for prefill rates, measure the llama-server behind it",
            serious=False,
        )


def _implausible(seen: Evidence) -> Iterator[Finding]:
    # Dense models on a stock Pi 5 decode at 10.1 GB/s / file size (sd 3.8 % over 15 rows of the
    # Edge-LLM leaderboard, December 2024). A published table was once off by a factor of 30.
    model, decode, board = seen.facts.model, seen.metrics.get("cold", {}).get("decode_tps"), seen.manifest.machine.board
    if model is None or decode is None or not decode.value or not board.startswith("Raspberry Pi 5"):
        return
    ratio = decode.value * model.file_bytes / 10.1e9
    # Models in files below 0.2 GB are not bound by memory bandwidth, so the rule does not apply.
    if model.file_bytes > 2e8 and not 0.6 <= ratio <= 1.3:
        yield Finding(
            "implausible",
            f"decode is {ratio:.2f} times a Raspberry Pi 5's memory-bandwidth limit for a dense model of this size",
            "too low: throttling, swapping or a wrong number of threads; too high: a mixture of experts",
        )


def _simd(seen: Evidence) -> Iterator[Finding]:
    engine = seen.facts.engine
    if engine is not None and engine.missing_features:
        yield Finding(
            "simd",
            f"this engine does not use {', '.join(engine.missing_features)}, which the CPU supports",
            "build a faster llama-server for this machine: promptai engine build",
            serious=False,
        )


def _capped(seen: Evidence) -> Iterator[Finding]:
    answered = seen.answered
    capped = sum(trace.finish_reason == "length" for trace in answered)
    if answered and capped == len(answered):
        yield Finding(
            "capped",
            "every answer reached the token limit, so latency reflects the limit",
            "compare latencies only between runs with the same --max-tokens",
            serious=False,
        )


def _synthetic(seen: Evidence) -> Iterator[Finding]:
    if seen.facts.model is not None and seen.facts.model.synthetic:
        yield Finding(
            "synthetic",
            "the weights are random, so speed and memory are real but the text is noise",
            "ignore the answers",
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
