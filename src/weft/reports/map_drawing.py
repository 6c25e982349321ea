"""Drawing the map of layers by tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .axes import text_width
from .drawing import Drawing
from .layer_map import Grid, LayerMap
from .numbers import percent_text, shorten
from .style import LEVELS

MARGIN = 12.0
ALL = 1 << 30
WIDTHS = ((3, (96, 170)), (6, (70, 130)), (12, (48, 84)), (24, (34, 34)), (ALL, (15, 15)))
"""Up to so many columns, the least and the greatest width of each."""

HEIGHTS = ((12, 26), (30, 20), (64, 16), (128, 14), (ALL, 12))
"""Up to so many rows, the height of each."""

FOOT = "own share of the base"
STRONG = 3
"""The level of intensity from which letters are paper on colour."""


class Intensity:
    """How strong an open gate of a score is shown, in steps.

    Args:
        scores: all open ones.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        self.low, self.high = (min(scores), max(scores)) if scores else (0.0, 0.0)

    def level(self, score: float) -> int:
        """The step, from 1 to `LEVELS`."""
        if self.high <= self.low:
            return LEVELS
        return min(LEVELS, 1 + int((score - self.low) / (self.high - self.low) * LEVELS))

    def text(self, score: float) -> str:
        """A score with as many decimals as tell the steps apart."""
        step = (self.high - self.low) / LEVELS
        decimals = -math.floor(math.log10(step)) if step > 0 else 2
        return f"{score:.{min(max(decimals, 2), 5)}f}"

    def bounds(self) -> list[str]:
        """The lower bound of each step, as text; a single one where all scores are equal."""
        step = (self.high - self.low) / LEVELS
        if step <= 0:
            return [self.text(self.high)]
        return [self.text(self.low + i * step) for i in range(LEVELS)]


def draw_map(data: LayerMap) -> tuple[Drawing, Grid]:
    """Draw the map.

    Args:
        data: what to draw.

    Returns:
        The drawing, and where its cells lie.
    """
    rows, columns = len(data.sites), len(data.tasks)
    heads = [shorten(task, 22) for task in data.tasks]
    longest = max(text_width(head, 11) for head in heads)
    # Few columns grow with their names, so that these stay level.
    narrow, wide = next(w for limit, w in WIDTHS if columns <= limit)
    width = min(max(narrow, longest + 12), wide) if longest + 12 <= wide else narrow
    height = next(h for limit, h in HEIGHTS if rows <= limit)
    text = "name" if height < 16 else "name2"
    size = 10.0 if height < 16 else 11.5
    labels = [shorten(site or "(base)", 34) for site, _ in data.sites]
    widest = max((text_width(label, size) for label in labels), default=0)
    left = MARGIN + max(widest, text_width(FOOT, 10)) + 14
    turned = longest > width - 6
    legend = 34.0
    top = legend + (longest * 0.87 + 22 if turned else 24)
    grid = Grid(left, top, float(width), float(height))
    right = left + columns * width
    bottom = top + rows * height
    tail = right + (longest * 0.5 if turned else 0)
    total = max(right + 110, tail + 20, 640)
    drawing = Drawing(
        total, bottom + 34, f"Map of {rows} layers by {columns} tasks: owned or shared."
    )
    for i, task in enumerate(heads):
        x = left + (i + 0.5) * width
        if turned:
            drawing.text(x + 3, top - 8, task, "name2", turn=-60.0)
        else:
            drawing.text(x, top - 9, task, "name2", "middle")
    _rows(drawing, data, labels, grid, text, right)
    _cells(drawing, data, grid)
    drawing.text(left - 10, bottom + 20, FOOT, "note", "end")
    if width >= 34:
        for i, fraction in enumerate(data.fractions):
            drawing.text(
                left + (i + 0.5) * width, bottom + 20, percent_text(fraction), "note", "middle"
            )
    _legend(drawing, data)
    return drawing, grid


def _rows(
    drawing: Drawing, data: LayerMap, labels: Sequence[str], grid: Grid, text: str, right: float
) -> None:
    drawing.text(right + 14, grid.top - 9, "owned by", "note")
    before = ""
    for i, label in enumerate(labels):
        y = grid.top + i * grid.height
        block = _block(data.sites[i][0])
        if block != before or i == 0:
            drawing.line([(MARGIN, y), (right + 80, y)], "grid")
        before = block
        drawing.text(grid.left - 10, y + grid.height / 2 + 4, label, text, "end")
        owners = sum(c is not None and c.state != "shared" for c in data.cells[i])
        thick = min(grid.height - 4, 8)
        drawing.rect(
            right + 14,
            y + (grid.height - thick) / 2,
            36 * owners / len(data.tasks),
            thick,
            "share",
        )
        at = right + 56
        drawing.text(at, y + grid.height / 2 + 4, f"{owners}/{len(data.tasks)}", "note")


def _block(site: str) -> str:
    """The block that a site belongs to: "blocks.3" of "blocks.3.0.conv"."""
    parts = site.split(".")
    return ".".join(parts[:2] if len(parts) > 2 and parts[1].isdigit() else parts[:1])


def _cells(drawing: Drawing, data: LayerMap, grid: Grid) -> None:
    intensity = Intensity(data.open_scores)
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    rings: list[tuple[float, float]] = []
    dots: list[tuple[float, float]] = []
    words: list[tuple[float, float, str, str]] = []
    wide = grid.width >= 34 and grid.height >= 14
    apart = grid.width >= 48 and wide
    radius = min(grid.height * 0.24, 4.0)
    for i, row in enumerate(data.cells):
        for j, cell in enumerate(row):
            if cell is None:
                continue
            x, y = grid.left + j * grid.width, grid.top + i * grid.height
            middle = (x + grid.width / 2, y + grid.height / 2)
            box = (x + 1.5, y + 1.5, grid.width - 3, grid.height - 3)
            if cell.state == "added":
                drawing.marker("diamond", middle, grid.height * 0.36, "added")
            elif cell.state == "own" and cell.score is None:
                thin = (box[0], y + grid.height * 0.34, box[2], grid.height * 0.32)
                boxes.setdefault("ungated", []).append(thin)
            elif cell.state == "own" and cell.score is not None:
                level = intensity.level(cell.score)
                boxes.setdefault(f"o{level}", []).append(box)
                style = "cellpaper" if level >= STRONG else "cell"
                words.append((middle[0], middle[1] + 3.6, intensity.text(cell.score), style))
            elif cell.score is not None:
                word = intensity.text(cell.score)
                shift = -2 - text_width(word, 10) / 2 if apart else 0.0
                rings.append((middle[0] + shift, middle[1]))
                if apart:
                    words.append((middle[0] + 6, middle[1] + 3.6, word, "cellmuted"))
            else:
                dots.append(middle)
    for style, found in sorted(boxes.items()):
        drawing.rects(found, style)
    drawing.dots(rings, radius, "ring")
    drawing.dots(rings, radius - 1.2, "hole")
    drawing.dots(dots, 1.2, "dot")
    for x, y, word, style in words if wide else ():
        if text_width(word, 10) > grid.width - 8:
            continue
        drawing.text(x, y, word, style, "middle")


def _legend(drawing: Drawing, data: LayerMap) -> None:
    cells = [c for row in data.cells for c in row if c is not None]
    x, y = MARGIN, 16.0
    if data.open_scores:
        bounds = Intensity(data.open_scores).bounds()
        box = max(text_width(bound, 10) for bound in bounds) + 8
        for level, bound in enumerate(bounds, LEVELS + 1 - len(bounds)):
            drawing.rect(x, y - 10, box, 13, f"o{level}")
            style = "cellpaper" if level >= STRONG else "cell"
            drawing.text(x + box / 2, y, bound, style, "middle")
            x += box + 2
        x = _entry(drawing, x + 5, y, "own, gate score from")
    if any(c.state == "own" and c.score is None for c in cells):
        drawing.rect(x, y - 6.5, 20, 5, "ungated")
        x = _entry(drawing, x + 26, y, "own, no gate")
    if any(c.state == "added" for c in cells):
        drawing.marker("diamond", (x + 6, y - 4), 5, "added")
        x = _entry(drawing, x + 17, y, "added for the task")
    if any(c.state == "shared" and c.score is not None for c in cells):
        drawing.dots([(x + 5, y - 4)], 4.0, "ring")
        drawing.dots([(x + 5, y - 4)], 2.8, "hole")
        x = _entry(drawing, x + 14, y, "shared, gate closed")
    if any(c.state == "shared" and c.score is None for c in cells):
        drawing.dots([(x + 4, y - 4)], 1.2, "dot")
        x = _entry(drawing, x + 11, y, "shared")
    drawing.width = max(drawing.width, x)


def _entry(drawing: Drawing, x: float, y: float, text: str) -> float:
    drawing.text(x, y, text, "tick")
    return x + text_width(text, 11) + 16
