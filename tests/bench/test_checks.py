from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from promptai.bench.checks import Finding, check_target
from promptai.bench.events import Event, Opened, Session
from promptai.bench.manifest import MachineFacts, TargetFacts
from promptai.bench.statistics import Metric
from promptai.bench.trace import Cache, Trace
from promptai.device.sample import Sample
from support_runs import COST, ENGINE, FACTS, MACHINE, MODEL, make_failure, make_manifest, make_trace, talk

MIB = 1024**2
#: Forty requests one after the other, and a sample in the middle of each: a sound run.
TRACES = [make_trace(at=3.0 * n, conversation=f"c{n}") for n in range(40)]
SAMPLES = [
    Sample(
        t=3.0 * n + 1.5,
        cpu_percent=95.0,
        engine_cpu_percent=93.0,
        cpu_mhz=2400.0,
        throttled=0,
        major_faults=5,
        swap_used_bytes=0,
    )
    for n in range(40)
]
PC = replace(MACHINE, board="OptiPlex 7090")
#: Forty of a hundred conversations.
MANIFEST = make_manifest([talk(f"c{n}", "why?") for n in range(40)])
MANIFEST = replace(MANIFEST, workload=replace(MANIFEST.workload, total=100))
#: A server other than llama-server: cold prompts begin with a salt.
PLAIN = Opened(0.0, "m", None, 1.0, llama_server=False)


def metrics(n: int = 40, decode: float = 10.0, engine: float = 10.0, spread: float = 0.01) -> Mapping[str, Metric]:
    """Evidence for the checks; ``spread`` is the interval's half width as a share."""
    return {
        "ttft_s_mean": Metric(1.0, "s", n),
        "decode_tps": Metric(decode, "tokens/s", n, (decode * (1 - spread), decode * (1 + spread))),
        "engine_decode_tps": Metric(engine, "tokens/s", n),
    }


def findings(
    *,
    machine: MachineFacts = MACHINE,
    facts: TargetFacts = FACTS,
    traces: Sequence[Trace] = TRACES,
    samples: Sequence[Sample] = SAMPLES,
    cold: Mapping[str, Metric] | None = None,
    events: Sequence[Event] = (COST,),
) -> list[Finding]:
    """The findings of a sound run with the given changes."""
    seen: dict[Cache, Mapping[str, Metric]] = {"cold": cold or metrics()}
    return check_target(replace(MANIFEST, machine=machine), facts, traces, samples, seen, events)


def session(governor: str | None = "performance", kernel: str = "Linux 6.6") -> Session:
    return Session(0.0, kernel, governor)


def sampled(**fields: Any) -> list[Sample]:
    """The good samples, the later half of them changed."""
    return [*SAMPLES[:20], *(replace(sample, **fields) for sample in SAMPLES[20:])]


def paged(pages: int) -> list[Sample]:
    """The good samples, and another during which the last request reads pages from disk."""
    last = SAMPLES[-1]
    return [*SAMPLES, replace(last, t=last.t + 1, major_faults=(last.major_faults or 0) + pages)]


def answered(**fields: Any) -> list[Trace]:
    """The good requests, all of them changed."""
    return [replace(trace, **fields) for trace in TRACES]


def slowing(share: float, **later: Any) -> list[Trace]:
    """The good requests, the last 20 of which decode more slowly."""
    return [*TRACES[:20], *(replace(t, t_last=t.t_sent + 1 + 2 / share, **later) for t in TRACES[20:])]


def model(**fields: Any) -> TargetFacts:
    return replace(FACTS, model=replace(MODEL, **fields))


def engine(**fields: Any) -> TargetFacts:
    return replace(FACTS, engine=replace(ENGINE, **fields))


FIRES = [
    pytest.param("failures", {"traces": [*TRACES, make_failure("EngineDied: gone")]}, "1 of 41 requests", id="failure"),
    pytest.param("cold-cache-hits", {"traces": answered(cached_tokens=5)}, "40 cold requests", id="cold-hits"),
    pytest.param(
        "not-deterministic",
        {"traces": [*TRACES, replace(TRACES[0], repeat=1, text_sha256="other")]},
        "1 of 40 prompts",
        id="other-answer",
    ),
    pytest.param("clocks-disagree", {"cold": metrics(engine=10.6)}, "10.0 tokens/s", id="clocks"),
    pytest.param("implausible", {"cold": metrics(decode=30, engine=30)}, "2.97 times", id="too-fast"),
    pytest.param("implausible", {"cold": metrics(decode=5, engine=5)}, "0.50 times", id="too-slow"),
    pytest.param("throttled", {"samples": sampled(throttled=0b0001)}, "under-voltage in 50 %", id="under-voltage"),
    pytest.param("throttled", {"samples": sampled(throttled=0b0010)}, "capped clock in 50 %", id="capped-clock"),
    pytest.param("throttled", {"samples": sampled(throttled=0b0100)}, "throttling in 50 %", id="throttling"),
    pytest.param("throttled", {"samples": sampled(throttled=0b1000)}, "soft temperature limit", id="soft-limit"),
    pytest.param(
        "throttled", {"samples": sampled(throttled=0b100 << 16)}, "between two samples", id="throttled-briefly"
    ),
    pytest.param(
        "telemetry", {"events": [replace(COST, telemetry_error="disk full")]}, "early (disk full)", id="telemetry-died"
    ),
    pytest.param(
        "sessions-differ", {"events": [session(), session("ondemand")]}, "ondemand and performance", id="new-governor"
    ),
    pytest.param(
        "sessions-differ", {"events": [session(kernel="Linux 6.12")]}, "Linux 6.12 and Linux 6.6", id="new-kernel"
    ),
    pytest.param("paging", {"samples": paged(2001)}, "2,001 pages", id="paging"),
    pytest.param("swapping", {"samples": sampled(swap_used_bytes=65 * MIB)}, "65 MiB", id="swapping"),
    pytest.param("background-load", {"samples": sampled(engine_cpu_percent=73.0)}, "12 %", id="background"),
    pytest.param("clock", {"samples": sampled(cpu_mhz=1500.0)}, "from 1500 to 2400 MHz", id="clock"),
    pytest.param("drift", {"traces": slowing(0.8)}, "slower", id="slowing-down"),
    pytest.param("drift", {"traces": slowing(1.25)}, "faster", id="speeding-up"),
    pytest.param("few-values", {"cold": metrics(n=19)}, "only 19 cold requests", id="few"),
    pytest.param("wide-interval", {"cold": metrics(spread=0.08)}, "±8 %", id="wide"),
]
EXPLAINS = [
    pytest.param("simd", {"facts": engine(missing_features=("DOTPROD",))}, "DOTPROD", id="simd"),
    pytest.param("capped", {"traces": answered(finish_reason="length")}, "token limit", id="capped"),
    pytest.param("synthetic", {"facts": model(synthetic=True)}, "random", id="synthetic"),
]


@pytest.mark.parametrize(("check", "evidence", "words"), FIRES)
def test_reports_a_warning_with_numbers_and_a_remedy(check: str, evidence: dict[str, Any], words: str) -> None:
    """One cause, one finding."""
    found = findings(**evidence)

    assert [(check, True)] == [(finding.check, finding.serious) for finding in found]
    assert words in found[0].message
    assert found[0].action


@pytest.mark.parametrize(("check", "evidence", "words"), EXPLAINS)
def test_reports_an_explanation_as_a_note(check: str, evidence: dict[str, Any], words: str) -> None:
    found = findings(**evidence)

    assert [(check, False)] == [(finding.check, finding.serious) for finding in found]
    assert words in found[0].message


@pytest.mark.parametrize(
    "evidence",
    [
        pytest.param({}, id="sound"),
        pytest.param({"samples": []}, id="no-telemetry"),
        pytest.param({"samples": [Sample(t=sample.t) for sample in SAMPLES]}, id="a-board-without-sensors"),
        pytest.param({"samples": [*SAMPLES, Sample(t=1000.0, throttled=0b1111, cpu_mhz=600.0)]}, id="after-the-end"),
        pytest.param({"samples": [replace(s, throttled=0b1111 << 16) for s in SAMPLES]}, id="throttled-long-ago"),
        pytest.param({"samples": paged(1000)}, id="a-thousand-pages"),
        pytest.param({"samples": sampled(swap_used_bytes=64 * MIB)}, id="swap-of-64-mib"),
        pytest.param({"samples": [replace(s, swap_used_bytes=900 * MIB) for s in SAMPLES]}, id="old-swap"),
        pytest.param({"samples": sampled(cpu_mhz=2200.0)}, id="clock-wobble"),
        pytest.param({"samples": sampled(engine_cpu_percent=77.0)}, id="background-of-ten-percent"),
        pytest.param({"cold": metrics(engine=10.4)}, id="clocks-within-five-percent"),
        pytest.param({"cold": metrics(spread=0.05)}, id="interval-of-five-percent"),
        pytest.param({"cold": metrics(n=20)}, id="twenty-values"),
        pytest.param({"traces": slowing(0.97)}, id="three-percent-slower"),
        pytest.param({"traces": slowing(0.5, prompt_tokens=1000)}, id="slower-because-longer"),
        pytest.param({"traces": answered(cache="warm", cached_tokens=50)}, id="warm-hits"),
        pytest.param({"machine": PC, "cold": metrics(decode=30, engine=30)}, id="fast-but-not-a-pi"),
        pytest.param(
            {"facts": model(file_bytes=10**8), "cold": metrics(decode=300, engine=300)}, id="fast-because-small"
        ),
        pytest.param({"facts": replace(FACTS, model=None, engine=None)}, id="a-running-server"),
        pytest.param({"events": [session(), session()]}, id="two-sessions-alike"),
        pytest.param(
            {"facts": TargetFacts("m", url="http://pi:8080"), "events": [session(), session("ondemand")]},
            id="a-new-governor-here-and-a-server-elsewhere",
        ),
    ],
)
def test_a_sound_run_has_no_findings(evidence: dict[str, Any]) -> None:
    assert findings(**evidence) == []


def test_pages_read_while_an_engine_reloads_do_not_count() -> None:
    """Between two requests the other target ran, and the warm-up read this one's weights again."""
    counts = (10, 10, 60_000, 60_000)
    samples = [Sample(t=t, major_faults=faults) for t, faults in zip((1.0, 2.0, 100.5, 101.5), counts, strict=True)]

    assert findings(traces=[make_trace(), make_trace(at=100.0)], samples=samples) == []


def test_a_server_without_timings_gets_a_note_on_prefill() -> None:
    found = findings(traces=answered(prompt_ms=None))

    assert [(finding.check, finding.serious) for finding in found] == [("no-timings", False)]


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param({}, id="a-gateway-that-passes-timings-through"),
        pytest.param({"cached_tokens": 100, "prompt_tokens": 900}, id="a-template-that-is-cached-before-the-salt"),
    ],
)
def test_a_server_that_cannot_disable_its_cache_gets_a_note_on_salted_prompts(answers: dict[str, Any]) -> None:
    """Recognised by its dialect, not its fields. The text before the salt is the same in every prompt."""
    found = findings(traces=answered(**answers), events=[PLAIN])

    assert [(finding.check, finding.serious) for finding in found] == [("salted", False)]


def test_warns_of_a_salted_prompt_found_in_a_cache() -> None:
    found = findings(traces=answered(cached_tokens=600, prompt_tokens=900), events=[PLAIN])

    assert [finding.check for finding in found] == ["cold-cache-hits", "salted"]
    assert "cache_prompt" not in found[0].action  # the client does not send it to this server


def test_salted_prompts_do_not_count_as_repeated() -> None:
    """Each pass has another salt. Warm prompts have none, and are compared."""
    again = [replace(t, repeat=1, text_sha256="other") for t in TRACES]
    warm = [replace(t, cache="warm") for t in (*TRACES, *again)]

    assert "not-deterministic" not in {f.check for f in findings(traces=[*TRACES, *again], events=[PLAIN])}
    assert "not-deterministic" in {f.check for f in findings(traces=warm, events=[PLAIN])}


@pytest.mark.parametrize(
    ("total", "words"), [(100, "play more conversations"), (40, "all 40 conversations")], ids=["a-part", "all"]
)
def test_a_wide_interval_calls_for_more_conversations_not_repeats(total: int, words: str) -> None:
    """Repeats stay within their conversation; the differences between conversations make the interval wide."""
    manifest = replace(MANIFEST, workload=replace(MANIFEST.workload, total=total))
    found = check_target(manifest, FACTS, TRACES, SAMPLES, {"cold": metrics(spread=0.08)}, [])

    assert words in found[0].action
    assert "--repeats" not in found[0].action


def test_groups_failures_by_kind_with_a_remedy_each() -> None:
    long, lost = make_failure("ContextExceeded: 900 > 512"), make_failure("EngineDied: gone")
    found = findings(traces=[*TRACES, lost, long, long])

    assert [finding.message for finding in found] == [
        "2 of 43 requests failed (ContextExceeded)",
        "1 of 43 requests failed (EngineDied)",
    ]
    assert "--context" in found[0].action
    assert "--resume" in found[1].action


def test_warnings_come_before_notes() -> None:
    found = findings(facts=model(synthetic=True), traces=[*answered(finish_reason="length"), make_failure()])

    assert [(f.check, f.serious) for f in found] == [("failures", True), ("capped", False), ("synthetic", False)]


def test_a_target_without_answers_gets_only_the_warning_of_failures() -> None:
    nothing = {name: Metric(None, "s", 0) for name in metrics()}
    found = findings(traces=[make_failure()], cold=nothing)

    assert [finding.check for finding in found] == ["failures", "few-values"]
