"""How numbers are written for people: three digits, units, and the interval beside them."""

from promptai.bench.statistics import Metric

_MISSING = "–"


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; a dash for what was not measured."""
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
    """A number with its unit, scaled to what people say: ms, MiB, %."""
    if value is None:
        return _MISSING
    if unit == "s" and value < 0.9995:
        return f"{number(value * 1000)} ms"
    if unit == "s" and value >= 120:
        return f"{number(value / 60)} min"
    if unit == "bytes":
        gib = value / 1024**3
        return f"{gib:.2f} GiB" if gib >= 1 else f"{number(value / 1024**2)} MiB"
    if unit == "1":
        return f"{100 * value:.1f} %"
    return f"{number(value)} {unit}"


def metric(found: Metric) -> str:
    """A metric with its 95 % interval, as ``41.2 tokens/s (40.8 to 41.6)``."""
    text = quantity(found.value, found.unit)
    if found.value is None or found.ci95 is None:
        return text
    low, high = (quantity(bound, found.unit) for bound in found.ci95)
    return (
        f"{text} ({low.rsplit(' ', 1)[0]} to {high.rsplit(' ', 1)[0]})"
        if _same_unit(text, low, high)
        else (f"{text} ({low} to {high})")
    )


def _same_unit(*texts: str) -> bool:
    return len({text.rsplit(" ", 1)[-1] for text in texts}) == 1
