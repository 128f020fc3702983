"""Series stay few whatever clients send, and say what happened and what is."""

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from promptai.gateway.metrics import FleetSample, Metrics, ReplicaSample, RequestRecord

FLEET = [("pi-1", "tiny"), ("pi-2", "tiny"), ("pi-2", "small")]


def values(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """The samples of one series by the values of its labels, in alphabetical order of the labels."""
    text, _ = metrics.render()
    return {
        tuple(value for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == name
    }


def of_fleet(now: FleetSample | None = None) -> Metrics:
    metrics = Metrics(lambda: now or FleetSample())
    metrics.set_fleet(FLEET)
    return metrics


def outcome(model: str = "tiny", replica: str = "pi-1", status: int = 200, **fields: Any) -> RequestRecord:
    return RequestRecord(model=model, replica=replica, status=status, **fields)


def test_names_that_are_not_in_the_fleet_become_unknown() -> None:
    metrics = of_fleet()
    for number in range(50):
        metrics.observe_request(outcome(f"model-{number}", f"replica-{number}", status=404, prompt_tokens=1, ttft_s=1))
    metrics.observe_request(outcome("small", "pi-1"))  # pi-1 has no such model
    metrics.observe_request(outcome(status=99_999))
    metrics.observe_retry("whatever")

    assert values(metrics, "promptai_requests_total") == {
        ("unknown", "unknown", "404"): 50.0,
        ("small", "unknown", "200"): 1.0,
        ("tiny", "pi-1", "unknown"): 1.0,
    }
    assert values(metrics, "promptai_tokens_total") == {("prompt", "unknown"): 50.0}
    assert values(metrics, "promptai_retries_total") == {("other",): 1.0}


def test_a_replica_that_leaves_takes_its_series_along() -> None:
    metrics = of_fleet()
    for replica, model in FLEET:
        metrics.observe_request(
            outcome(model, replica, prompt_tokens=1, ttft_s=1.0, queue_s=1.0, decode_s_per_token=0.1, saved_s=1.0)
        )
    metrics.set_fleet([("pi-1", "tiny")])
    metrics.observe_request(outcome("tiny", "pi-2", status=502))

    text = metrics.render()[0].decode()
    assert not re.search("pi-2|small", text)
    assert values(metrics, "promptai_requests_total") == {
        ("tiny", "pi-1", "200"): 1.0,
        ("tiny", "unknown", "502"): 1.0,
    }


def test_a_replica_that_stays_keeps_its_counts() -> None:
    metrics = of_fleet()
    metrics.observe_request(outcome(saved_s=2.5))
    metrics.set_fleet([*FLEET, ("pi-3", "tiny")])

    assert values(metrics, "promptai_prefill_seconds_saved_total") == {("tiny", "pi-1"): 2.5}


def test_a_request_counts_with_all_that_is_known_of_it() -> None:
    metrics = of_fleet()
    metrics.observe_request(
        outcome(
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


def test_what_is_not_known_of_a_request_is_not_counted() -> None:
    metrics = of_fleet()
    metrics.observe_request(outcome(status=499))

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
def test_buckets_reach_as_far_as_a_board_is_slow(name: str, first: str, last: str) -> None:
    metrics = of_fleet()
    metrics.observe_request(outcome(ttft_s=1.0, queue_s=1.0, decode_s_per_token=1.0))

    bounds = sorted({float(labels[0]) for labels in values(metrics, name)})
    assert (bounds[0], bounds[-2], bounds[-1]) == (float(first), float(last), float("inf"))


def test_what_is_true_now_is_asked_at_every_scrape_and_not_before() -> None:
    asked: list[int] = []

    def now() -> FleetSample:
        asked.append(len(asked))
        return FleetSample({"tiny": asked[-1]})

    metrics = Metrics(now)
    assert asked == []
    assert [values(metrics, "promptai_queue_depth")[("tiny",)] for _ in range(2)] == [0.0, 1.0]


def test_replicas_show_their_slots_and_their_breaker() -> None:
    one = ReplicaSample(replica="pi-1", model="tiny", slots=4, busy=3, up=True, breaker="trial")
    two = ReplicaSample(replica="pi-2", model="tiny", slots=2, busy=0, up=False, breaker="open")
    metrics = of_fleet(FleetSample({"tiny": 5}, (one, two)))

    assert values(metrics, "promptai_slots") == {("tiny", "pi-1"): 4.0, ("tiny", "pi-2"): 2.0}
    assert values(metrics, "promptai_slots_busy") == {("tiny", "pi-1"): 3.0, ("tiny", "pi-2"): 0.0}
    assert values(metrics, "promptai_replica_up") == {("tiny", "pi-1"): 1.0, ("tiny", "pi-2"): 0.0}
    assert values(metrics, "promptai_breaker_state") == {("pi-1",): 1.0, ("pi-2",): 2.0}
    assert values(metrics, "promptai_queue_depth") == {("tiny",): 5.0}


def test_retries_and_continuations_are_counted_by_their_reason() -> None:
    metrics = of_fleet()
    metrics.observe_retry("died")
    metrics.observe_continuation("ids")
    metrics.observe_continuation("text")

    assert values(metrics, "promptai_retries_total") == {("died",): 1.0}
    assert values(metrics, "promptai_continuations_total") == {("ids",): 1.0, ("text",): 1.0}


def test_names_of_models_cannot_break_the_format() -> None:
    name = 'a"b\\c\nd{}'
    metrics = Metrics()
    metrics.set_fleet([("r", name)])
    metrics.observe_request(outcome(name, "r"))

    assert values(metrics, "promptai_requests_total") == {(name, "r", "200"): 1.0}


def test_two_gateways_in_one_process_do_not_share_counts() -> None:
    first, second = of_fleet(), of_fleet()
    first.observe_request(outcome())

    assert values(second, "promptai_requests_total") == {}


def test_the_gateways_own_memory_is_told_and_nothing_of_when_a_series_was_made() -> None:
    metrics = of_fleet()
    metrics.observe_request(outcome(ttft_s=1.0))
    text, kind = metrics.render()

    assert values(metrics, "process_resident_memory_bytes")[()] > 1e6
    assert b"_created" not in text
    assert kind.startswith("text/plain; version=")
