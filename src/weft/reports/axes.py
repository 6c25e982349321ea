"""Scales, ticks and the frame of a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .drawing import Drawing

LETTER = 0.56
"""Width of an average letter over the letter size."""


@dataclass(frozen=True)
class Scale:
    """A map from values to pixels.

    Args:
        low: value at ``start``; > 0 on a log scale.
        high: value at ``end``.
        start: pixel.
        end: pixel.
        log: whether pixels follow the logarithm.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """About so many round values within the scale."""
        found = log_ticks(self.low, self.high, wanted) if self.log else []
        # A log scale over less than a decade has too few round powers.
        return found if len(found) > 2 else self._linear(min(wanted, 4) if self.log else wanted)

    def _linear(self, wanted: int) -> list[float]:
        step = nice_step((self.high - self.low) / max(wanted, 1))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def nice_step(rough: float) -> float:
    """The next 1, 2 or 5 times a power of ten that is not smaller."""
    if rough <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next((f * power for f in (1, 2, 5) if f * power >= rough * 0.999), 10 * power)


def log_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round values of a log scale: 1, 2, 5 of each decade, or fewer of them, or whole decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(found) <= wanted:
            return found
    return found[:: math.ceil(len(found) / wanted)]


def padded(
    values: Sequence[float], *, limits: tuple[float, float] | None = None
) -> tuple[float, float]:
    """The range of values with some room around it, within limits that the values keep."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.05 or 0.5
    wide = (low - room, high + room)
    if limits is not None and limits[0] <= low and high <= limits[1]:
        wide = (max(wide[0], limits[0]), min(wide[1], limits[1]))
    return wide


def tick_text(value: float, step: float) -> str:
    """A tick's label with as many decimals as its step needs."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
    return f"{value:.{decimals}f}" if decimals <= 5 else f"{value:.1e}"


def text_width(text: str, size: float) -> float:
    """About how wide the text is, in pixels."""
    return len(text) * size * LETTER


@dataclass(frozen=True)
class Frame:
    """The area of a plot with its two scales."""

    x: Scale
    y: Scale

    def grid(
        self,
        drawing: Drawing,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_text: Callable[[float], str],
        y_text: Callable[[float], str],
    ) -> None:
        """Draw grid lines, both axes and the ticks' labels."""
        left, right = min(self.x.start, self.x.end), max(self.x.start, self.x.end)
        bottom, top = self.y.start, self.y.end
        for value in y_ticks:
            y = self.y(value)
            drawing.line([(left, y), (right, y)], "grid")
            drawing.text(left - 7, y + 4, y_text(value), "tick", "end")
        for value in x_ticks:
            x = self.x(value)
            drawing.line([(x, bottom), (x, bottom + 4)], "axis")
            drawing.text(x, bottom + 17, x_text(value), "tick", "middle")
        drawing.line([(left, top), (left, bottom), (right, bottom)], "axis")
