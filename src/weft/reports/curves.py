"""Training curves of a task: loss, score and open gates over its epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from .axes import LETTER, Frame, Scale, nice_step, padded, text_width, tick_text
from .drawing import Drawing
from .numbers import is_share, metric_text, percent_text, significant
from .records import TaskReport

WIDTH, HEIGHT = 372.0, 214.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 48.0, 38.0
Series = tuple[str, str, list[float | None]]
"""A legend's text, a line style, and a value per epoch."""


def value_of(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a row, or None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def phases_of(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    """The phases of a history: name, first and last row."""
    found: list[tuple[str, int, int]] = []
    rows = enumerate(str(row.get("phase") or "") for row in history)
    for name, group in groupby(rows, key=lambda item: item[1]):
        places = [i for i, _ in group]
        found.append((name, places[0], places[-1]))
    return found


def epochs_of(history: Sequence[Mapping[str, Any]]) -> list[float]:
    """The epoch of every row; counted from 1 where rows do not say or do not increase."""
    said = [value_of(row, "epoch") for row in history]
    numbers = [e for e in said if e is not None]
    rising = all(a < b for a, b in pairwise(numbers))
    if len(numbers) == len(said) and rising:
        return numbers
    return [float(i + 1) for i in range(len(history))]


def _validation(row: Mapping[str, Any], metric: str) -> float | None:
    scores = row.get("val")
    return value_of(scores, metric) if isinstance(scores, Mapping) else None


def score_name(report: TaskReport) -> str | None:
    """Which validation score the history shows: that of the primary metric, or its first one."""
    seen: list[str] = []
    for row in report.history:
        scores = row.get("val")
        if isinstance(scores, Mapping):
            seen += [name for name in scores if name not in seen and name != "loss"]
    primary = report.primary[0] if report.primary else ""
    return next((name for name in seen if primary.endswith(name)), next(iter(seen), None))


def draw_curves(report: TaskReport) -> dict[str, Drawing]:
    """The panels of a task that its history can fill.

    Args:
        report: of the task.

    Returns:
        Drawings by "loss", "score" and "gates", fewer where the history lacks them.
    """
    history = report.history
    panels: dict[str, Drawing] = {}
    train = [value_of(row, "loss") for row in history]
    validation = [_validation(row, "loss") for row in history]
    lines: list[Series] = [("training", "l0", train), ("validation", "d1", validation)]
    if drawn := _panel(report, "Loss", lines, significant):
        panels["loss"] = drawn
    if metric := score_name(report):
        scores = [_validation(row, metric) for row in history]
        limits = (0.0, 1.0) if is_share(metric) else None
        title = metric[:1].upper() + metric[1:]
        if drawn := _panel(
            report,
            title,
            [("validation", "d1", scores)],
            lambda v: metric_text(metric, v),
            limits,
            percent=is_share(metric),
        ):
            panels["score"] = drawn
    gates = max((value_of(row, "gates") or 0.0 for row in history), default=0.0)
    if gates:
        opened = [value_of(row, "open_gates") for row in history]
        title = f"Open gates of {gates:.0f}"
        drawn = _panel(
            report, title, [("open", "l2", opened)], lambda v: f"{v:.0f}", fixed=(0, gates)
        )
    else:
        owned = [value_of(row, "own_fraction") for row in history]
        drawn = _panel(
            report, "Own share", [("owned", "l2", owned)], percent_text, (0.0, 1.0), percent=True
        )
    if drawn:
        panels["gates"] = drawn
    return panels


def _panel(
    report: TaskReport,
    title: str,
    series: Sequence[Series],
    say: Any,
    limits: tuple[float, float] | None = None,
    *,
    fixed: tuple[float, float] | None = None,
    percent: bool = False,
) -> Drawing | None:
    series = [s for s in series if any(v is not None for v in s[2])]
    if not series:
        return None
    values = [v for _, _, found in series for v in found if v is not None]
    epochs = epochs_of(report.history)
    log = fixed is None and limits is None and min(values) > 0 and max(values) > 40 * min(values)
    if log:
        title += " (log)"
    drawing = Drawing(WIDTH, HEIGHT, f"{title} of {report.name} by epoch.")
    low, high = fixed or (
        (min(values) * 0.9, max(values) * 1.1) if log else padded(values, limits=limits)
    )
    if not log and limits is None and 0 <= min(values) < max(values) / 2:
        low = 0.0
    half = 0.5 if len(epochs) == 1 else 0.0
    frame = Frame(
        Scale(epochs[0] - half, epochs[-1] + half, LEFT, WIDTH - RIGHT),
        Scale(low, high, HEIGHT - BOTTOM, TOP, log),
    )
    _phases(drawing, report, epochs, frame.x)
    y_ticks = frame.y.ticks(5)
    step = nice_step((high - low) / 5)
    # Whole epochs only.
    across = nice_step(max((epochs[-1] - epochs[0]) / 6, 1))
    first = math.ceil(epochs[0] / across)
    x_ticks = [i * across for i in range(first, math.floor(epochs[-1] / across) + 1)] or epochs[:1]

    def y_text(value: float) -> str:
        if percent:
            return f"{tick_text(value * 100, step * 100)}\u00a0%"
        return significant(value, 2) if log else tick_text(value, step)

    frame.grid(drawing, x_ticks, y_ticks, lambda v: f"{v:.0f}", y_text)
    drawing.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "epoch", "tick", "middle")
    for _, style, found in series:
        _line(drawing, frame, epochs, found, style)
    _heading(drawing, title, series, say)
    return drawing


def _line(
    drawing: Drawing,
    frame: Frame,
    epochs: Sequence[float],
    values: Sequence[float | None],
    style: str,
) -> None:
    for there, group in groupby(zip(epochs, values, strict=True), key=lambda p: p[1] is not None):
        if not there:
            continue
        points = [(frame.x(x), frame.y(y)) for x, y in group if y is not None]
        if len(points) > 1:
            drawing.line(points, style)
        else:
            drawing.marker("circle", points[0], 3, f"m{style[1:]}")


def _phases(drawing: Drawing, report: TaskReport, epochs: Sequence[float], scale: Scale) -> None:
    phases = phases_of(report.history)
    if not any(name for name, _, _ in phases):
        return
    for i, (name, first, last) in enumerate(phases):
        start = scale.start if i == 0 else scale((epochs[first - 1] + epochs[first]) / 2)
        end = scale.end if i == len(phases) - 1 else scale((epochs[last] + epochs[last + 1]) / 2)
        if i % 2:
            drawing.rect(start, TOP - 16, end - start, HEIGHT - BOTTOM - TOP + 16, "band")
        if i:
            drawing.line([(start, TOP - 16), (start, HEIGHT - BOTTOM)], "edge")
        fits = int((end - start - 6) / (10 * LETTER))
        if fits >= min(len(name), 4):
            shown = name if len(name) <= fits else f"{name[: fits - 1]}…"
            drawing.text(start + 4, TOP - 5, shown, "note")


def _heading(drawing: Drawing, title: str, series: Sequence[Series], say: Any) -> None:
    drawing.text(8, 16, title, "title")
    x = WIDTH - RIGHT
    for name, style, found in reversed(series):
        last = next(v for v in reversed(found) if v is not None)
        text = f"{name} {say(last)}"
        x -= text_width(text, 11)
        drawing.text(x, 16, text, "tick")
        drawing.line([(x - 24, 12), (x - 6, 12)], style)
        x -= 36


def draw_task(report: TaskReport) -> Drawing | None:
    """All panels of a task side by side, under its name, for a file of its own."""
    panels = list(draw_curves(report).values())
    if not panels:
        return None
    drawing = Drawing(WIDTH * len(panels), HEIGHT + 30, f"Training of {report.name}.")
    drawing.text(8, 20, f"{report.name} ({report.method})", "title")
    for i, panel in enumerate(panels):
        drawing.place(panel, WIDTH * i, 30)
    return drawing
