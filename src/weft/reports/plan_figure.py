"""Drawing score against budget: the plan beside the best single method at each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .axes import Frame, Scale, nice_step, padded, text_width, tick_text
from .drawing import XY, Drawing
from .numbers import bytes_text, is_share, metric_text, spread_text

LEFT, RIGHT, TOP, BOTTOM = 62.0, 24.0, 58.0, 52.0
ZERO = 44.0
"""Room for a budget of nothing, which a log axis cannot hold."""


@dataclass(frozen=True)
class Choice:
    """What one way of choosing gives at one budget.

    Args:
        bytes: that it takes, for all tasks together.
        val: mean score over tasks and seeds on validation, by which it was chosen.
        test: likewise on test.
        spread: standard deviation of ``test`` over seeds; None for a single seed.
        said: what it is, for people.
    """

    bytes: float
    val: float
    test: float
    spread: float | None
    said: str


@dataclass(frozen=True)
class Budget:
    """One budget.

    Args:
        bytes: for all tasks together.
        plan: the best mixture of methods.
        single: the best method for all tasks; None if none fits.
    """

    bytes: float
    plan: Choice
    single: Choice | None


def draw_plan(
    budgets: Sequence[Budget],
    metric: str,
    *,
    higher_is_better: bool = True,
    chosen: float | None = None,
    of: str = "mean of all tasks",
    width: float = 860.0,
    height: float = 360.0,
) -> Drawing:
    """Test scores of plan and best single method against the budget, on a log axis.

    Args:
        budgets: the points; one of 0 bytes stands at the left end.
        metric: name of the score.
        higher_is_better: direction of the score.
        chosen: bytes of the budget to mark.
        of: what of the tasks' scores is drawn.
        width: of the drawing.
        height: of the drawing.
    """
    drawing = Drawing(width, height, f"{metric} against the budget of all tasks together.")
    sizes = sorted({b.bytes for b in budgets if b.bytes > 0} | ({chosen} if chosen else set()))
    low, high = (sizes[0], sizes[-1]) if sizes else (1e3, 1e6)
    room = max(high / low, 4.0) ** 0.06
    choices = [c for b in budgets for c in (b.plan, b.single) if c is not None]
    scores = [c.test + side * (c.spread or 0.0) for c in choices for side in (-1, 1)]
    share = is_share(metric)
    start = LEFT + (ZERO if any(b.bytes <= 0 for b in budgets) else 0.0)
    frame = Frame(
        Scale(low / room, high * room, start, width - RIGHT, log=True),
        Scale(*padded(scores, limits=(0.0, 1.0) if share else None), height - BOTTOM, TOP),
    )
    step = nice_step((frame.y.high - frame.y.low) / 5)

    def y_text(value: float) -> str:
        return tick_text(value * 100, step * 100) if share else tick_text(value, step)

    outer = Frame(Scale(0, 1, LEFT, width - RIGHT), frame.y)
    outer.grid(drawing, [], frame.y.ticks(5), str, y_text)
    ticks = [t for t in frame.x.ticks(max(3, int(width / 80))) if frame.x(t) > start + 24]
    bottom = height - BOTTOM
    Frame(frame.x, Scale(0, 1, bottom, bottom)).grid(
        drawing, ticks, [], lambda v: bytes_text(v).replace(".0", ""), str
    )
    if start > LEFT:
        drawing.text(LEFT + ZERO / 2, bottom + 17, bytes_text(0), "tick", "middle")
        for x in (start - 3, start + 1):
            drawing.line([(x - 3, bottom + 5), (x + 3, bottom - 5)], "axis")
    drawing.text(8, 16, _heading(metric, of, share, higher_is_better), "title")
    drawing.text(
        (LEFT + width - RIGHT) / 2,
        height - 10,
        "budget for what all tasks own together (log scale)",
        "tick",
        "middle",
    )
    if chosen:
        x = frame.x(chosen)
        drawing.line([(x, TOP), (x, height - BOTTOM)], "copy")
        text = f"shown above: {bytes_text(chosen)}"
        right = x + text_width(text, 10) + 4 > width - RIGHT
        drawing.text(x - 4 if right else x + 4, TOP - 6, text, "note", "end" if right else "start")
    singles = [(b.bytes, b.single) for b in budgets if b.single is not None]
    _series(drawing, frame, singles, metric, ("d1", "e1", "h1", "square"), 4.0)
    plans = [(b.bytes, b.plan) for b in budgets]
    _series(drawing, frame, plans, metric, ("l0", "e0", "m0", "circle"), -4.0)
    _key(drawing, width)
    return drawing


def _heading(metric: str, of: str, share: bool, higher_is_better: bool) -> str:
    unit = " (%)" if share else ""
    hint = "" if higher_is_better else ", lower is better"
    return f"{metric}, {of}{unit}{hint}"


def _series(
    drawing: Drawing,
    frame: Frame,
    points: Sequence[tuple[float, Choice]],
    metric: str,
    styles: tuple[str, str, str, str],
    shift: float,
) -> None:
    """Markers with bars, moved a little so that two series do not cover each other."""
    line, bar, marker, shape = styles
    places: list[XY] = [
        ((frame.x(size) if size > 0 else LEFT + ZERO / 2) + shift, frame.y(choice.test))
        for size, choice in points
    ]
    for before, after in pairwise(places):
        drawing.line([before, after], line)
    for (x, y), (size, choice) in zip(places, points, strict=True):
        if choice.spread:
            above, below = (frame.y(choice.test + side * choice.spread) for side in (1, -1))
            drawing.line([(x, above), (x, below)], bar)
            for end in (above, below):
                drawing.line([(x - 3, end), (x + 3, end)], bar)
        said = f"{metric_text(metric, choice.test)}{spread_text(metric, choice.spread)}"
        title = f"{bytes_text(size)}: {choice.said}, {said}, takes {bytes_text(choice.bytes)}"
        drawing.marker(shape, (x, y), 5.0, marker, title)


def _key(drawing: Drawing, width: float) -> None:
    x, y = width - RIGHT, 16.0
    for text, line, shape, marker in (
        ("best single method", "d1", "square", "h1"),
        ("plan: a method for each task", "l0", "circle", "m0"),
    ):
        x -= text_width(text, 11)
        drawing.text(x, y, text, "tick")
        drawing.line([(x - 32, y - 4), (x - 6, y - 4)], line)
        drawing.marker(shape, (x - 19, y - 4), 4.5, marker)
        x -= 52
