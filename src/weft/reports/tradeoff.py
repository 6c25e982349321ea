"""Score against owned bytes: methods with mean and spread, or the tasks themselves."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .axes import Frame, Scale, nice_step, padded, tick_text
from .compare import Summary, pareto_front
from .drawing import SHAPES, XY, Drawing
from .labels import Box, Item, place_labels
from .numbers import bytes_text, is_share, metric_text, percent_text, shorten, spread_text
from .style import SERIES

TICK_ROOM = 44.0
"""Pixels between the label of zero bytes, left of the break, and the next one."""
LEFT, RIGHT, TOP, BOTTOM = 62.0, 24.0, 44.0, 52.0
ZERO = 44.0
"""Room for the column of those that own nothing, which a log axis cannot hold."""


@dataclass(frozen=True)
class Place:
    """One marker: a method over its seeds, or a task.

    Args:
        name: its label.
        size: own bytes.
        score: its height.
        runs: (own bytes, score) of single runs, shown faintly if there are several.
        spread: half the height of its bar.
        size_spread: half the width of its bar.
        on_front: whether it is on the Pareto front; None where there is no front.
        title: what it says when pointed at.
    """

    name: str
    size: float
    score: float
    runs: tuple[XY, ...] = ()
    spread: float | None = None
    size_spread: float | None = None
    on_front: bool | None = None
    title: str = ""


def method_places(
    summaries: Sequence[Summary], front: Collection[str] | None = None
) -> list[Place]:
    """Markers of methods that have at least one complete seed.

    Args:
        summaries: of one metric.
        front: names of the methods on the Pareto front, where other scores than these decide it.
    """
    if front is None:
        front = {s.method for s in pareto_front(summaries)}
    return [
        Place(
            s.method,
            s.own_bytes,
            s.score,
            s.runs,
            s.spread,
            s.bytes_spread,
            s.method in front,
            f"{s.method}: {metric_text(s.metric, s.score)}{spread_text(s.metric, s.spread)}, "
            f"{bytes_text(s.own_bytes)} per task ({percent_text(s.own_fraction)})",
        )
        for s in summaries
        if s.runs
    ]


def draw_tradeoff(
    places: Sequence[Place],
    metric: str,
    *,
    higher_is_better: bool = True,
    copy: float | None = None,
    task: str = "",
    width: float = 860.0,
    height: float = 440.0,
) -> Drawing:
    """Score against owned bytes on a log axis.

    Args:
        places: what to mark; the front is drawn through those that are on it.
        metric: name of the score.
        higher_is_better: direction of the score.
        copy: bytes of one full copy of the base, to mark.
        task: whose scores these are, for the heading.
        width: of the drawing.
        height: of the drawing.
    """
    drawing = Drawing(width, height, f"{metric} against owned bytes per task.")
    if not places:
        drawing.text(width / 2, height / 2, "no complete runs", "tick", "middle")
        return drawing
    frame, zero = _frame(places, metric, copy, width, height)
    x_of = _Across(frame, zero)
    heading = f"{shorten(task, 20)}: {metric}" if task else metric
    _axes(drawing, frame, zero, (heading, metric), higher_is_better, height)
    obstacles: list[Box] = []
    if copy is not None and frame.x.low <= copy <= frame.x.high:
        x = frame.x(copy)
        drawing.line([(x, TOP), (x, height - BOTTOM)], "copy")
        drawing.text(x - 4, TOP - 6, "one full copy", "note", "end")
        obstacles.append((x - 0.5, TOP, x + 0.5, height - BOTTOM))
    line = _front(drawing, frame, x_of, places, width)
    items: list[Item] = []
    obstacles += line
    shapes = list(SHAPES)
    small = 5.5 if width > 500 else 4.5
    for i, place in enumerate(places):
        at = (x_of(place.size), frame.y(place.score))
        if len(place.runs) > 1:
            for size, score in place.runs:
                drawing.marker(
                    shapes[i % len(shapes)], (x_of(size), frame.y(score)), 2.6, f"s{i % SERIES}"
                )
        obstacles += _bars(drawing, frame, x_of, place, i)
        obstacles.append((at[0] - 7, at[1] - 7, at[0] + 7, at[1] + 7))
        items.append(Item(place.name, at))
    for i, place in enumerate(places):
        style = "h" if place.on_front is False else "m"
        at = items[i].at
        drawing.marker(shapes[i % len(shapes)], at, small, f"{style}{i % SERIES}", place.title)
    area = (LEFT, TOP, width - 4, height - BOTTOM)
    place_labels(drawing, items, obstacles, area, 12.0 if width > 500 else 11.0)
    return drawing


def _frame(
    places: Sequence[Place], metric: str, copy: float | None, width: float, height: float
) -> tuple[Frame, float | None]:
    sizes = [p.size for p in places if p.size > 0]
    sizes += [s for p in places for s, _ in p.runs if s > 0]
    low, high = (min(sizes), max(sizes)) if sizes else (1e3, 1e6)
    if copy is not None and high < copy <= high * 20:
        high = copy
    room = max(high / low, 4.0) ** 0.06
    scores = [v for p in places for v in (p.score - (p.spread or 0), p.score + (p.spread or 0))]
    scores += [s for p in places for _, s in p.runs]
    bounds = padded(scores, limits=(0.0, 1.0) if is_share(metric) else None)
    zero = LEFT + ZERO / 2 if any(p.size <= 0 for p in places) else None
    start = LEFT + (ZERO if zero is not None else 0.0)
    return (
        Frame(
            Scale(low / room, high * room**2, start, width - RIGHT, log=True),
            Scale(*bounds, height - BOTTOM, TOP),
        ),
        zero,
    )


@dataclass(frozen=True)
class _Across:
    """The pixel of a size, zero included."""

    frame: Frame
    zero: float | None

    def __call__(self, size: float) -> float:
        if size <= 0:
            return self.zero if self.zero is not None else self.frame.x.start
        return max(self.frame.x(size), self.frame.x.start)


def _axes(
    drawing: Drawing,
    frame: Frame,
    zero: float | None,
    names: tuple[str, str],
    higher_is_better: bool,
    height: float,
) -> None:
    bottom = height - BOTTOM
    wide = frame.x.end - frame.x.start
    heading, metric = names
    step = nice_step((frame.y.high - frame.y.low) / 5)
    share = is_share(metric)

    def y_text(value: float) -> str:
        return tick_text(value * 100, step * 100) if share else tick_text(value, step)

    outer = Frame(Scale(0, 1, LEFT, frame.x.end), frame.y)
    outer.grid(drawing, [], frame.y.ticks(5), str, y_text)
    ticks = frame.x.ticks(max(3, int(wide / 62)))
    if zero is not None:
        ticks = [t for t in ticks if frame.x(t) - zero > TICK_ROOM]
    Frame(frame.x, Scale(0, 1, bottom, bottom)).grid(
        drawing, ticks, [], lambda v: bytes_text(v).replace(".0", ""), str
    )
    if zero is not None:
        drawing.line([(zero, bottom), (zero, bottom + 4)], "axis")
        drawing.text(zero, bottom + 17, bytes_text(0), "tick", "middle")
        for x in (frame.x.start - 3, frame.x.start + 1):
            drawing.line([(x - 3, bottom + 5), (x + 3, bottom - 5)], "axis")
    middle = (LEFT + frame.x.end) / 2
    drawing.text(
        middle, height - 10, "own bytes per task, without head (log scale)", "tick", "middle"
    )
    unit = " (%)" if share else ""
    hint = "" if higher_is_better else ", lower is better"
    drawing.text(8, 16, f"{heading}{unit}{hint}", "title")


def _bars(drawing: Drawing, frame: Frame, x_of: _Across, place: Place, series: int) -> list[Box]:
    x, y = x_of(place.size), frame.y(place.score)
    style = f"e{series % SERIES}"
    boxes: list[Box] = []
    if place.spread:
        above, below = frame.y(place.score + place.spread), frame.y(place.score - place.spread)
        drawing.line([(x, above), (x, below)], style)
        for end in (above, below):
            drawing.line([(x - 4, end), (x + 4, end)], style)
        boxes.append((x - 4, min(above, below), x + 4, max(above, below)))
    if place.size_spread and place.size > 0:
        low = x_of(max(place.size - place.size_spread, 0.0) or frame.x.low)
        high = min(x_of(place.size + place.size_spread), frame.x.end)
        drawing.line([(low, y), (high, y)], style)
        for end in (low, high):
            drawing.line([(end, y - 4), (end, y + 4)], style)
        boxes.append((low, y - 4, high, y + 4))
    return boxes


def _front(
    drawing: Drawing, frame: Frame, x_of: _Across, places: Sequence[Place], width: float
) -> list[Box]:
    """Draw the best score that each budget buys, as steps; return what labels should avoid."""
    front = sorted((p for p in places if p.on_front), key=lambda p: (p.size, p.score))
    if not front or not all(math.isfinite(p.score) for p in front):
        return []
    points: list[XY] = []
    for place in front:
        x, y = x_of(place.size), frame.y(place.score)
        if points:
            points.append((x, points[-1][1]))
        points.append((x, y))
    points.append((frame.x.end, points[-1][1]))
    drawing.line(points, "front")
    key = width - RIGHT - 132
    drawing.line([(key, 12), (key + 26, 12)], "front")
    drawing.text(key + 32, 16, "Pareto front", "tick")
    return [
        (min(a[0], b[0]) - 3, min(a[1], b[1]) - 3, max(a[0], b[0]) + 3, max(a[1], b[1]) + 3)
        for a, b in pairwise(points)
    ]
