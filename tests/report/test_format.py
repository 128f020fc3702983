import pytest

from promptai.bench.statistics import Metric
from promptai.report.format import metric, number, quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.12345, "0.123"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (123.45, "123"),
        (1234567.0, "1,234,567"),
        (-12.345, "-12.3"),
        (9.999, "10.0"),
        (99.96, "100"),
    ],
)
def test_formats_three_significant_digits_and_thousands_separators(value: float | None, text: str) -> None:
    assert text == number(value)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        pytest.param(None, "s", "–", id="not-measured"),
        pytest.param(0.0123, "s", "12.3 ms", id="milliseconds"),
        pytest.param(1.0, "s", "1.00 s", id="seconds"),
        pytest.param(119.0, "s", "119 s", id="still-seconds"),
        pytest.param(120.0, "s", "2.00 min", id="minutes"),
        pytest.param(0.0, "bytes", "0 MiB", id="no-bytes"),
        pytest.param(1536 * 1024, "bytes", "1.50 MiB", id="mebibytes"),
        pytest.param(3 * 1024**3 // 2, "bytes", "1.50 GiB", id="gibibytes"),
        pytest.param(0.0456, "1", "4.6 %", id="ratio"),
        pytest.param(98.76, "%", "98.8 %", id="percent"),
        pytest.param(1234.5, "tokens/s", "1,234 tokens/s", id="rate"),
        pytest.param(61.04, "°C", "61.0 °C", id="temperature"),
    ],
)
def test_scales_a_quantity_to_a_readable_unit(value: float | None, unit: str, text: str) -> None:
    assert text == quantity(value, unit)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        pytest.param(Metric(None, "tokens/s", 0), "–", id="not-measured"),
        pytest.param(Metric(None, "s", 3, (1.0, 2.0)), "–", id="not-measured-whatever-the-interval"),
        pytest.param(Metric(41.2, "tokens/s", 3), "41.2 tokens/s", id="no-interval"),
        pytest.param(Metric(41.2, "tokens/s", 9, (40.8, 41.6)), "41.2 tokens/s (40.8 to 41.6)", id="interval"),
        pytest.param(Metric(0.95, "s", 9, (0.9, 1.1)), "950 ms (900 to 1,100)", id="units-differ"),
        pytest.param(Metric(0.5, "1", 9, (0.4, 0.6)), "50.0 % (40.0 to 60.0)", id="ratio"),
    ],
)
def test_formats_an_interval_beside_its_value(found: Metric, text: str) -> None:
    assert text == metric(found)
