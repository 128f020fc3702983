"""Metrics count events, show the current state, and have few series whatever clients send."""

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from promptai.gateway.metrics import FleetSample, Metrics, ReplicaSample, RequestRecord

FLEET = [("pi-1", "tiny"), ("pi-2", "tiny"), ("pi-2", "small")]


def values(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Return the samples of one series by its label values, in alphabetical order of the labels."""
    text, _ = metrics.render()
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name
    }


def fleet_metrics(sample: FleetSample | None = None) -> Metrics:
    metrics = Metrics(lambda: sample or FleetSample())
    metrics.set_fleet(FLEET)
    return metrics


def record(model: str = "tiny", replica: str = "pi-1", status: int = 200, **fields: Any) -> RequestRecord:
    return RequestRecord(model=model, replica=replica, status=status, **fields)


def test_names_outside_the_fleet_become_unknown() -> None:
    metrics = fleet_metrics()
    for number in range(50):
        metrics.observe_request(record(f"model-{number}", f"replica-{number}", status=404, prompt_tokens=1, ttft_s=1))
    metrics.observe_request(record("small", "pi-1"))  # pi-1 has no such model
    metrics.observe_request(record(status=99_999))
    metrics.observe_retry("whatever")

    assert values(metrics, "promptai_requests_total") == {
        ("unknown", "unknown", "404"): 50.0,
        ("small", "unknown", "200"): 1.0,
        ("tiny", "pi-1", "unknown"): 1.0,
    }
    assert values(metrics, "promptai_tokens_total") == {("prompt", "unknown"): 50.0}
    assert values(metrics, "promptai_retries_total") == {("other",): 1.0}


def test_removes_the_series_of_a_replica_that_leaves() -> None:
    metrics = fleet_metrics()
    for replica, model in FLEET:
        metrics.observe_request(
            record(model, replica, prompt_tokens=1, ttft_s=1.0, queue_s=1.0, decode_s_per_token=0.1, saved_s=1.0)
        )
    metrics.set_fleet([("pi-1", "tiny")])
    metrics.observe_request(record("tiny", "pi-2", status=502))

    text = metrics.render()[0].decode()
    assert not re.search("pi-2|small", text)
    assert values(metrics, "promptai_requests_total") == {
        ("tiny", "pi-1", "200"): 1.0,
        ("tiny", "unknown", "502"): 1.0,
    }


def test_a_replica_that_stays_keeps_its_counts() -> None:
    metrics = fleet_metrics()
    metrics.observe_request(record(saved_s=2.5))
    metrics.set_fleet([*FLEET, ("pi-3", "tiny")])

    assert values(metrics, "promptai_prefill_seconds_saved_total") == {("tiny", "pi-1"): 2.5}


def test_counts_all_known_values_of_a_request() -> None:
    metrics = fleet_metrics()
    metrics.observe_request(
        record(
            prompt_tokens=100,
            cached_tokens=80,
            generated_tokens=7,
            ttft_s=3.0,
            queue_s=0.2,
            decode_s_per_token=0.12,
            saved_s=4.0,
        )
    )

    assert values(metrics, "promptai_tokens_total") == {
        ("prompt", "tiny"): 100.0,
        ("cached", "tiny"): 80.0,
        ("generated", "tiny"): 7.0,
    }
    for name, total in (("ttft_seconds", 3.0), ("queue_seconds", 0.2), ("decode_seconds_per_token", 0.12)):
        assert values(metrics, f"promptai_{name}_sum") == {("tiny", "pi-1"): total}
        assert values(metrics, f"promptai_{name}_count") == {("tiny", "pi-1"): 1.0}


def test_does_not_count_unknown_values() -> None:
    metrics = fleet_metrics()
    metrics.observe_request(record(status=499))

    assert values(metrics, "promptai_requests_total") == {("tiny", "pi-1", "499"): 1.0}
    assert values(metrics, "promptai_ttft_seconds_count") == {}
    assert values(metrics, "promptai_tokens_total") == {}


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("promptai_ttft_seconds_bucket", "0.1", "600.0"),
        ("promptai_queue_seconds_bucket", "0.1", "600.0"),
        ("promptai_decode_seconds_per_token_bucket", "0.005", "5.0"),
    ],
)
def test_histogram_buckets_cover_the_speed_of_boards(name: str, first: str, last: str) -> None:
    metrics = fleet_metrics()
    metrics.observe_request(record(ttft_s=1.0, queue_s=1.0, decode_s_per_token=1.0))

    bounds = sorted({float(labels[0]) for labels in values(metrics, name)})
    assert (bounds[0], bounds[-2], bounds[-1]) == (float(first), float(last), float("inf"))


def test_reads_the_current_state_at_every_scrape() -> None:
    samples: list[int] = []

    def sample() -> FleetSample:
        samples.append(len(samples))
        return FleetSample({"tiny": samples[-1]})

    metrics = Metrics(sample)
    assert samples == []
    assert [values(metrics, "promptai_queue_depth")[("tiny",)] for _ in range(2)] == [0.0, 1.0]


def test_exports_slots_and_breakers_of_replicas() -> None:
    first = ReplicaSample(replica="pi-1", model="tiny", slots=4, busy=3, up=True, breaker="trial")
    second = ReplicaSample(replica="pi-2", model="tiny", slots=2, busy=0, up=False, breaker="open")
    metrics = fleet_metrics(FleetSample({"tiny": 5}, (first, second)))

    assert values(metrics, "promptai_slots") == {("tiny", "pi-1"): 4.0, ("tiny", "pi-2"): 2.0}
    assert values(metrics, "promptai_slots_busy") == {("tiny", "pi-1"): 3.0, ("tiny", "pi-2"): 0.0}
    assert values(metrics, "promptai_replica_up") == {("tiny", "pi-1"): 1.0, ("tiny", "pi-2"): 0.0}
    assert values(metrics, "promptai_breaker_state") == {("pi-1",): 1.0, ("pi-2",): 2.0}
    assert values(metrics, "promptai_queue_depth") == {("tiny",): 5.0}


def test_counts_retries_by_reason_and_continuations_by_source() -> None:
    metrics = fleet_metrics()
    metrics.observe_retry("died")
    metrics.observe_continuation("ids")
    metrics.observe_continuation("text")

    assert values(metrics, "promptai_retries_total") == {("died",): 1.0}
    assert values(metrics, "promptai_continuations_total") == {("ids",): 1.0, ("text",): 1.0}


def test_escapes_model_names() -> None:
    name = 'a"b\\c\nd{}'
    metrics = Metrics()
    metrics.set_fleet([("r", name)])
    metrics.observe_request(record(name, "r"))

    assert values(metrics, "promptai_requests_total") == {(name, "r", "200"): 1.0}


def test_two_gateways_in_one_process_do_not_share_counters() -> None:
    first, second = fleet_metrics(), fleet_metrics()
    first.observe_request(record())

    assert values(second, "promptai_requests_total") == {}


def test_exports_process_memory_but_no_creation_times() -> None:
    metrics = fleet_metrics()
    metrics.observe_request(record(ttft_s=1.0))
    text, kind = metrics.render()

    assert values(metrics, "process_resident_memory_bytes")[()] > 1e6
    assert b"_created" not in text
    assert kind.startswith("text/plain; version=")
