"""Numbers for people: 1.6 MB, 38.4 %, 2.2 M."""

from __future__ import annotations

import math

GAP = "\u00a0"
"""Between a number and its unit: a space that does not break a line."""


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where it stays short."""
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 7:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - size, 0)}f}"


def scaled(value: float, units: tuple[str, ...]) -> str:
    """A number in the largest unit, each a thousand times the one before, that leaves it >= 1."""
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value /= 1000.0
        step += 1
    if step == 0:
        text = f"{value:.0f}" if value == round(value) else significant(value, 2)
    else:
        text = f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"
    return f"{text}{GAP}{units[step]}" if units[step] else text


def count_text(value: float) -> str:
    """A count: 950, 12.3 k, 2.2 M."""
    return scaled(value, ("", "k", "M", "G", "T"))


def bytes_text(value: float) -> str:
    """A size, in decimal units: 950 B, 12.3 kB, 1.6 MB."""
    return scaled(value, ("B", "kB", "MB", "GB", "TB"))


def percent_text(fraction: float) -> str:
    """A fraction in percent: 0 %, < 0.1 %, 38.4 %, 100 %."""
    if not math.isfinite(fraction):
        return "not finite"
    if fraction == 0 or abs(fraction - 1) < 5e-5:
        return f"{fraction * 100:.0f}{GAP}%"
    if 0 < fraction < 0.0005:
        return f"< 0.1{GAP}%"
    return f"{fraction * 100:.1f}{GAP}%"


def is_share(metric: str) -> bool:
    """Whether the metric is a share of one, to be shown in percent."""
    return "accuracy" in metric.lower()


def metric_text(metric: str, value: float) -> str:
    """The value of a metric: percent for accuracies in [0, 1], else three significant digits."""
    if not math.isfinite(value):
        return "not finite"
    if is_share(metric) and 0.0 <= value <= 1.0:
        return percent_text(value)
    return significant(value)


def spread_text(metric: str, spread: float | None) -> str:
    """The spread beside a mean: `` ± 0.4`` in points of percent for accuracies, or nothing."""
    if spread is None:
        return ""
    return f" ± {spread * 100:.1f}" if is_share(metric) else f" ± {significant(spread, 2)}"


def shorten(text: str, longest: int) -> str:
    """The text with its middle left out if it is longer than so many characters."""
    if len(text) <= longest:
        return text
    tail = (longest - 1) * 2 // 3
    return f"{text[: longest - 1 - tail]}…{text[-tail:]}"
