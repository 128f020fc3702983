"""Format numbers for people: three significant digits, units, and intervals."""

from collections.abc import Sequence

from promptai.bench.statistics import Metric

_MISSING = "–"
_MIB = 1024**2
_GIB = 1024**3


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; a dash for ``None``."""
    if value is None:
        return _MISSING
    if value == 0:
        return "0"
    magnitude = abs(float(f"{value:.3g}"))  # rounded first: 9.999 is 10.0, not 10.00
    if magnitude >= 100:
        return f"{value:,.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    if magnitude >= 1:
        return f"{value:.2f}"
    return f"{value:.3g}"


def quantity(value: float | None, unit: str) -> str:
    """Format a number with its unit, scaled to a readable one: ms, MiB, %."""
    if value is None:
        return _MISSING
    factor, label = _scale(unit, value)
    return f"{_scaled(value, factor, label)} {label}"


def metric(found: Metric) -> str:
    """Format a metric with its 95 % interval: ``41.2 tokens/s (40.8 to 41.6)``."""
    if found.value is None or found.ci95 is None:
        return quantity(found.value, found.unit)
    factor, label = _scale(found.unit, found.value)
    low, high = (_scaled(bound, factor, label) for bound in found.ci95)
    return f"{_scaled(found.value, factor, label)} {label} ({low} to {high})"


def row(metrics: Sequence[Metric]) -> tuple[str, list[str]]:
    """
    Format metrics of one kind: their common unit, and each as ``41.2 (40.8–41.6)``.

    The unit suits the largest value, so numbers of one row compare at a glance.
    """
    values = [found.value for found in metrics if found.value is not None]
    factor, label = _scale(metrics[0].unit, max(values, default=0.0))
    texts = []
    for found in metrics:
        text = _MISSING if found.value is None else _scaled(found.value, factor, label)
        if found.ci95 is not None:
            text += " ({}–{})".format(*(_scaled(bound, factor, label) for bound in found.ci95))
        texts.append(text)
    return label, texts


def _scale(unit: str, value: float) -> tuple[float, str]:
    """Return the factor and the unit in which a value of this size is shown."""
    if unit == "s" and value < 0.9995:
        return 1000, "ms"
    if unit == "s" and value >= 120:
        return 1 / 60, "min"
    if unit == "bytes":
        return (1 / _GIB, "GiB") if value >= _GIB else (1 / _MIB, "MiB")
    return (100, "%") if unit == "1" else (1, unit)


def _scaled(value: float, factor: float, label: str) -> str:
    if label == "GiB":
        return f"{value * factor:.2f}"
    return f"{value * factor:.1f}" if label == "%" and factor == 100 else number(value * factor)
