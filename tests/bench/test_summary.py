from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from promptai.bench.events import Opened
from promptai.bench.glossary import METRICS
from promptai.bench.manifest import TargetFacts
from promptai.bench.recorder import Recorder
from promptai.bench.statistics import Metric
from promptai.bench.summary import SCHEMA, RecordedRun, Summary, read_run, summarize, write_summary
from promptai.bench.trace import Cache, Trace
from promptai.device.sample import Sample
from promptai.errors import RunError
from support_runs import COST, FACTS, MODEL, make_failure, make_manifest, make_run, make_trace, talk, write_run

#: Two conversations, three user turns: three requests per pass.
TALKS = [talk("a", "one", "two", "three"), talk("b", "four")]
COLD = [
    make_trace(conversation="a", turn=0, generated_tokens=11),  # 10 steps in 2 s
    make_trace(conversation="a", turn=1, at=3, generated_tokens=41),  # 40 steps in 2 s
    make_trace(conversation="b", turn=0, at=6, t_last=11.0, t_end=11.0, generated_tokens=11),  # 10 steps in 4 s
]


def a_run(*traces: Trace, caches: tuple[Cache, ...] = ("cold",), repeats: int = 1) -> RecordedRun:
    """A run of the two conversations, cold by default."""
    return RecordedRun("run", make_manifest(TALKS, caches=caches, repeats=repeats), list(traces), [], [])


def cold(summary: Summary) -> dict[str, Metric]:
    """The metrics of the first target."""
    part = summary.targets[0].cold
    assert part is not None
    return part.metrics


def test_rejects_a_directory_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        read_run(tmp_path)


def test_rejects_a_run_without_requests(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="contains no request yet") as error:
        read_run(write_run(tmp_path, a_run()))

    assert "--resume" in error.value.hint


def test_summarises_a_run_without_telemetry(tmp_path: Path) -> None:
    write_run(tmp_path, make_run())
    (tmp_path / "telemetry.jsonl").unlink()

    metrics = cold(summarize(read_run(tmp_path)))

    assert metrics["cpu_percent"].value is None
    assert metrics["decode_tps"].value is not None


def test_a_run_is_named_by_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``promptai report .`` in the run's directory."""
    monkeypatch.chdir(write_run(tmp_path / "2026-11-20_m_pi5", make_run()))

    assert read_run(Path()).directory == "2026-11-20_m_pi5"


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    run = make_run()

    assert run == read_run(write_run(tmp_path / run.directory, run))


def test_derives_metrics_from_raw_lines() -> None:
    """Computed by hand: 60 steps in 8 s, three prompts of 100 tokens in 0.5 s each."""
    metrics = cold(summarize(a_run(*COLD)))

    assert metrics["decode_tps"] == Metric(60 / 8, "tokens/s", 3)
    assert metrics["mean_of_decode_tps"] == Metric((5 + 20 + 2.5) / 3, "tokens/s", 3)
    assert metrics["engine_decode_tps"] == Metric(10.0, "tokens/s", 3)
    assert metrics["prefill_tps"] == Metric(200.0, "tokens/s", 3)
    assert metrics["total_tps"] == Metric((300 + 11 + 41 + 11) / (3 + 3 + 5), "tokens/s", 3)
    assert metrics["ttft_s_mean"] == Metric(1.0, "s", 3)
    assert metrics["latency_s_mean"] == Metric(11 / 3, "s", 3)
    assert metrics["generated_tokens_mean"] == Metric(21.0, "tokens", 3)
    assert metrics["capped_share"] == Metric(0.0, "1", 3)


def test_cold_and_warm_are_never_mixed() -> None:
    warm = [replace(t, cache="warm", cached_tokens=60, prompt_n=40, prompt_ms=100.0) for t in COLD]
    target = summarize(a_run(*COLD, *warm, caches=("cold", "warm"))).targets[0]

    parts = [part for part in (target.cold, target.warm) if part is not None]
    assert pytest.approx([200.0, 400.0]) == [part.metrics["prefill_tps"].value for part in parts]
    assert pytest.approx([0.0, 0.6]) == [part.metrics["cached_share"].value for part in parts]


def test_summarises_each_target_separately() -> None:
    facts = [replace(FACTS, name=name) for name in ("m", "fast", "absent")]
    run = replace(a_run(*COLD, make_trace(target="fast", t_last=2.0)), manifest=make_manifest(TALKS, facts))
    m, fast, absent = summarize(run).targets

    assert [target.cold.answered for target in (m, fast) if target.cold] == [3, 1]
    assert (absent.name, absent.cold, absent.warm, absent.findings) == ("absent", None, None, [])


def test_a_repeated_request_counts_as_its_last_attempt(tmp_path: Path) -> None:
    with Recorder(write_run(tmp_path, a_run(COLD[0], repeats=2))) as recorder:
        recorder.append(make_failure(conversation="a", turn=1), "")
        recorder.append(make_failure(conversation="b", turn=0), "")
    with Recorder(tmp_path) as resumed:
        resumed.append(COLD[1], "two")

    part = summarize(read_run(tmp_path)).targets[0].cold

    assert part is not None
    assert (part.planned, part.answered, part.failed) == (6, 2, 1)
    assert part.metrics["decode_tps"] == Metric(50 / 4, "tokens/s", 2)


@pytest.mark.parametrize(
    ("protocol", "complete"),
    [({}, True), ({"repeats": 2}, False), ({"caches": ("cold", "warm")}, False)],
    ids=["all-played", "second-pass-missing", "warm-missing"],
)
def test_a_run_is_complete_once_every_request_is_answered(protocol: dict[str, Any], complete: object) -> None:
    assert summarize(a_run(*COLD, **protocol)).complete is complete


@pytest.mark.parametrize(
    ("failure", "complete"),
    [("ContextExceeded: 900 > 512", True), ("EngineDied: gone", False)],
    ids=["outgrew-the-context", "engine-died"],
)
def test_a_conversation_that_exceeds_the_context_is_complete(failure: str, complete: object) -> None:
    """A resume would repeat accidental failures, but not requests that cannot succeed."""
    assert summarize(a_run(COLD[0], make_failure(failure, turn=1), COLD[2])).complete is complete


def test_a_repeated_request_does_not_replace_another(tmp_path: Path) -> None:
    write_run(tmp_path, a_run(make_failure(), COLD[0], COLD[1]))

    assert summarize(read_run(tmp_path)).complete is False


def test_load_time_is_the_mean_over_engines_started_here() -> None:
    events = [Opened(0, "m", 2.0, 1.0), Opened(9, "m", 4.0, 1.0), Opened(5, "m", None, 1.0), Opened(7, "other", 99, 1)]

    assert Metric(3.0, "s", 2) == summarize(replace(a_run(*COLD), events=events)).targets[0].load_s


def test_the_cost_of_measuring_includes_client_and_telemetry() -> None:
    """1 s of 100 s for the client, 0.5 of 100 for the sampler; the larger memory of two sessions."""
    summary = summarize(replace(a_run(*COLD), events=[COST, replace(COST, client_max_rss_bytes=70_000_000)]))

    assert Metric(1.5, "%", 2) == summary.harness.cpu_percent_of_one_core
    assert Metric(70_000_000, "bytes", 2) == summary.harness.client_max_rss_bytes
    assert summary.energy_source == "pmic_rails"


def test_an_unknown_cost_is_none() -> None:
    silent = replace(COST, telemetry_cpu_s=None, telemetry_wall_s=None, telemetry_max_rss_bytes=None)
    summary = summarize(replace(a_run(*COLD), events=[replace(silent, energy_source=None)]))

    assert summary.harness.cpu_percent_of_one_core.value is None
    assert summary.harness.telemetry_max_rss_bytes.value is None
    assert summary.energy_source is None


def test_events_of_a_run_lead_to_findings() -> None:
    """A server other than llama-server, and telemetry that ended early."""
    events = [Opened(0, "m", None, 1.0, llama_server=False), replace(COST, telemetry_error="disk full")]
    found = summarize(replace(a_run(*COLD), events=events)).targets[0].findings

    assert {"salted", "telemetry"} <= {finding.check for finding in found}


def test_sorts_telemetry_of_overlapping_sessions_by_time(tmp_path: Path) -> None:
    """A run whose second session began at 0 again, as in older versions."""
    write_run(tmp_path, replace(a_run(*COLD), samples=[Sample(t=t) for t in (1.0, 90.0, 2.0, 3.0)]))

    assert [sample.t for sample in read_run(tmp_path).samples] == [1.0, 2.0, 3.0, 90.0]


def test_synthetic_weights_are_marked_and_get_a_note() -> None:
    facts = replace(FACTS, model=replace(MODEL, synthetic=True))
    target = summarize(replace(a_run(*COLD), manifest=make_manifest(TALKS, [facts]))).targets[0]

    assert target.synthetic
    assert "synthetic" in {finding.check for finding in target.findings}


def test_telemetry_counts_only_for_the_requests_it_overlaps() -> None:
    samples = [Sample(t=1.0, cpu_percent=50.0), Sample(t=100.0, cpu_percent=90.0)]
    warm = make_trace(cache="warm", at=99.0)
    target = summarize(replace(a_run(COLD[0], warm, caches=("cold", "warm")), samples=samples)).targets[0]

    assert [part.metrics["cpu_percent"].value for part in (target.cold, target.warm) if part] == [50.0, 90.0]


@pytest.mark.parametrize(
    ("url", "cpu"), [("http://127.0.0.1:8080", 50.0), ("http://pi:8080", None)], ids=["here", "elsewhere"]
)
def test_telemetry_of_this_machine_does_not_count_for_another(url: str, cpu: float | None) -> None:
    run = replace(a_run(COLD[0]), samples=[Sample(t=1.0, cpu_percent=50.0, throttled=1)])
    target = summarize(replace(run, manifest=make_manifest(TALKS, [TargetFacts("m", url=url)]))).targets[0]

    assert target.cold is not None
    assert target.cold.metrics["cpu_percent"].value == cpu
    assert ("throttled" in {finding.check for finding in target.findings}) is (cpu is not None)


def test_the_glossary_defines_exactly_the_metrics_of_a_summary() -> None:
    assert set(METRICS) == set(cold(summarize(make_run())))


def test_a_written_summary_reads_back_unchanged(tmp_path: Path) -> None:
    summary = summarize(make_run())

    data = write_summary(tmp_path, summary).read_bytes()

    assert summary == msgspec.json.decode(data, type=Summary)
    assert msgspec.json.decode(data)["schema"] == SCHEMA == 1
    assert data.endswith(b"}\n")


def test_the_same_lines_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run()

    once, again = (write_summary(tmp_path, summarize(run)).read_bytes() for _ in range(2))

    assert once == again
