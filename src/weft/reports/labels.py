"""Labels beside markers, placed so that they cover neither markers nor each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .axes import text_width
from .drawing import XY, Drawing
from .numbers import shorten

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

_SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
_DISTANCES = (11.0, 16.0, 24.0, 36.0, 54.0, 74.0)


@dataclass(frozen=True)
class Item:
    """A text and the point that it names."""

    text: str
    at: XY


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _box(at: XY, side: tuple[int, int], distance: float, width: float, height: float) -> Box:
    across = distance * (0.75 if side[1] and side[0] else 1.0)
    x = at[0] + side[0] * across
    y = at[1] + side[1] * (distance if not side[0] else distance * 0.8)
    left = x if side[0] > 0 else x - width if side[0] < 0 else x - width / 2
    top = y - height / 2
    return (left, top, left + width, top + height)


def place_labels(
    drawing: Drawing, items: Sequence[Item], obstacles: Sequence[Box], area: Box, size: float
) -> None:
    """Write every label where it overlaps least, the nearer the better.

    Args:
        drawing: to write into.
        items: texts and their points; crowded texts get a leader to their point.
        obstacles: boxes to keep free.
        area: to stay in.
        size: of the letters, in pixels.
    """
    taken = list(obstacles)
    for item in items:
        text = shorten(item.text, 28)
        width, height = text_width(text, size), size * 1.15
        best: tuple[float, Box, float, int] | None = None
        for distance in _DISTANCES:
            for rank, side in enumerate(_SIDES):
                box = _box(item.at, side, distance, width, height)
                inside = overlap(box, area) / (width * height)
                cost = 4 * sum(overlap(box, other) for other in taken) + (1 - inside) * 2000
                cost += distance * 0.8 + rank * 0.5
                if best is None or cost < best[0]:
                    best = (cost, box, distance, side[0])
        assert best is not None
        _, box, distance, across = best
        taken.append(box)
        if distance > 20:
            near = (
                min(max(item.at[0], box[0]), box[2]),
                min(max(item.at[1], box[1] + 2), box[3] - 2),
            )
            away = math.dist(item.at, near)
            start = 7 / max(away, 7)
            first = (
                item.at[0] + (near[0] - item.at[0]) * start,
                item.at[1] + (near[1] - item.at[1]) * start,
            )
            drawing.line([first, near], "leader")
        style = "label" if size >= 12 else "label2"
        # Anchored at the side of the point, so that letters of another width stay close to it.
        x, anchor = {
            1: (box[0], "start"),
            0: ((box[0] + box[2]) / 2, "middle"),
            -1: (box[2], "end"),
        }[across]
        drawing.text(x, box[3] - height * 0.22, text, style, anchor)
