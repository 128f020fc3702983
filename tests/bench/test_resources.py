import pytest

from promptai.bench.resources import resource_metrics, samples_during
from promptai.bench.statistics import Metric
from promptai.device.sample import Sample
from support_runs import make_trace

#: Requests from 0 to 3 s and from 10 to 13 s, 20 tokens each.
REQUESTS = [make_trace(generated_tokens=20), make_trace(at=10.0, generated_tokens=20)]


def test_a_machine_without_sensors_has_no_values() -> None:
    """``None``, never 0: a temperature of 0 would make a hot board look cool."""
    metrics = resource_metrics(REQUESTS, [Sample(t=1.0), Sample(t=11.0)])

    assert {(None, 0)} == {(metric.value, metric.n) for metric in metrics.values()}


def test_samples_outside_requests_do_not_count() -> None:
    metrics = resource_metrics(REQUESTS, [Sample(t=5.0, cpu_percent=1.0, temperature_c=90.0, watts=3.0)])

    assert {(None, 0)} == {(metric.value, metric.n) for metric in metrics.values()}


@pytest.mark.parametrize("tokens", [None, 0], ids=["not-told", "none-generated"])
def test_energy_per_token_needs_tokens(tokens: int | None) -> None:
    metrics = resource_metrics([make_trace(generated_tokens=tokens)], [Sample(t=1.0, watts=5.0)])

    assert Metric(None, "J/token", 0) == metrics["joules_per_token"]


def test_a_request_with_unknown_tokens_adds_no_energy() -> None:
    """Its seconds must not count for the tokens of the others."""
    requests = [REQUESTS[0], make_trace(at=10.0, generated_tokens=None)]
    metrics = resource_metrics(requests, [Sample(t=1.0, watts=5.0), Sample(t=11.0, watts=5.0)])

    assert pytest.approx(5.0 * 3 / 20) == metrics["joules_per_token"].value


def test_a_second_shared_by_two_requests_counts_once() -> None:
    """Two concurrent answers in 3 s at 5 W take 15 J, not 30."""
    side_by_side = [make_trace(generated_tokens=20), make_trace(conversation="b", generated_tokens=20)]
    metrics = resource_metrics(side_by_side, [Sample(t=1.0, watts=5.0)])

    assert pytest.approx(5.0 * 3 / 40) == metrics["joules_per_token"].value


def test_samples_between_sending_and_end_count_once() -> None:
    overlapping = [*REQUESTS, make_trace(at=2.0)]
    samples = [Sample(t=t) for t in (-0.1, 0.0, 2.5, 5.0, 5.1, 9.9, 10.0, 13.0, 13.1)]

    assert [sample.t for sample in samples_during(overlapping, samples)] == [0.0, 2.5, 5.0, 10.0, 13.0]


def test_means_peaks_and_minima_cover_the_requests() -> None:
    samples = [
        Sample(t=1.0, cpu_percent=80.0, engine_anon_bytes=100, available_bytes=900, temperature_c=60.0, watts=4.0),
        Sample(t=5.0, cpu_percent=0.0, engine_anon_bytes=999, available_bytes=1, temperature_c=99.0, watts=1.0),
        Sample(t=11.0, cpu_percent=90.0, engine_anon_bytes=300, available_bytes=700, temperature_c=62.0, watts=6.0),
        Sample(t=12.0),
    ]

    found = resource_metrics(REQUESTS, samples)

    assert {
        "cpu_percent": Metric(85.0, "%", 2),
        "memory_anon_bytes": Metric(300, "bytes", 2),
        "available_bytes_min": Metric(700, "bytes", 2),
        "temperature_c_max": Metric(62.0, "°C", 2),
        "watts": Metric(5.0, "W", 2),
        "joules_per_token": Metric(5.0 * 6 / 40, "J/token", 2),
    } == {name: metric for name, metric in found.items() if metric.value is not None}
