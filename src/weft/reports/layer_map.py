"""The map of layers by tasks: who owns what, and how open its gate is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weft.core.ledger import Row

from .axes import text_width
from .drawing import Drawing
from .numbers import count_text, percent_text, shorten, significant
from .records import TaskReport
from .style import LEVELS

ADDED_KIND = "adapter"
MARGIN = 12.0
STRONG = 3
"""The level of intensity from which letters are paper on colour."""


@dataclass(frozen=True)
class Cell:
    """One task at one site.

    Args:
        state: "own" tensors of the base, "added" ones only, or "shared".
        score: of the gate, if there is one.
        own: elements owned.
    """

    state: str
    score: float | None
    own: int


@dataclass(frozen=True)
class LayerMap:
    """Sites by tasks, in network order.

    Args:
        sites: name and kind by row.
        tasks: names by column.
        cells: by row and column; None where a task has no such site.
        fractions: own fraction by column.
    """

    sites: tuple[tuple[str, str], ...]
    tasks: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]
    fractions: tuple[float, ...]

    @property
    def open_scores(self) -> list[float]:
        """The scores of the gates that are open."""
        found = [c.score for row in self.cells for c in row if c is not None and c.state == "own"]
        return [s for s in found if s is not None]


@dataclass(frozen=True)
class Grid:
    """Where the cells of the drawn map lie, in its pixels."""

    left: float
    top: float
    width: float
    height: float


def layer_map(reports: Sequence[TaskReport], names: Sequence[str]) -> LayerMap:
    """Collect the map from ledgers.

    Args:
        reports: one per column.
        names: the columns' names.
    """
    columns = [_by_site(r.ledger.rows) for r in reports]
    kinds: dict[str, str] = {}
    for rows in columns:
        for site, found in rows.items():
            base_kind = next((r.kind for r in found if r.size), ADDED_KIND)
            if kinds.get(site, ADDED_KIND) == ADDED_KIND:
                kinds[site] = base_kind
    order = _network_order(kinds)
    return LayerMap(
        tuple((site, kinds[site]) for site in order),
        tuple(names),
        tuple(tuple(_cell(rows.get(site)) for rows in columns) for site in order),
        tuple(r.ledger.own_fraction for r in reports),
    )


def _by_site(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.site, []).append(row)
    return found


def _network_order(kinds: dict[str, str]) -> list[str]:
    """Sites of the base as they come; an added one before the first site inside its module."""
    order = [site for site, kind in kinds.items() if kind != ADDED_KIND]
    for site in (s for s, kind in kinds.items() if kind == ADDED_KIND):
        at = next((i for i, s in enumerate(order) if s.startswith(f"{site}.")), len(order))
        order.insert(at, site)
    return order


def _cell(rows: list[Row] | None) -> Cell | None:
    if rows is None:
        return None
    owned = [r for r in rows if not r.shared]
    state = "shared" if not owned else "own" if any(r.size for r in owned) else "added"
    score = next((r.score for r in rows if r.score is not None), None)
    return Cell(state, score, sum(r.own for r in owned))


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

    def bounds(self) -> list[str]:
        """The lower bound of each step, as text."""
        step = (self.high - self.low) / LEVELS
        return [significant(self.low + i * step, 2) for i in range(LEVELS)]


def draw_map(data: LayerMap) -> tuple[Drawing, Grid]:
    """Draw the map.

    Args:
        data: what to draw.

    Returns:
        The drawing, and where its cells lie.
    """
    rows, columns = len(data.sites), len(data.tasks)
    width = next(w for limit, w in ((3, 96), (6, 70), (12, 48), (22, 34), (9**9, 15)) if columns <= limit)
    height = next(h for limit, h in ((12, 26), (30, 20), (64, 16), (9**9, 12)) if rows <= limit)
    text = "name" if height < 16 else "name2"
    size = 10.0 if height < 16 else 11.5
    labels = [shorten(site or "(base)", 34) for site, _ in data.sites]
    left = MARGIN + max(text_width(label, size) for label in labels) + 14
    heads = [shorten(task, 22) for task in data.tasks]
    longest = max(text_width(head, 11) for head in heads)
    turned = longest > width - 6
    legend = 34.0
    top = legend + (longest * 0.72 + 22 if turned else 24)
    grid = Grid(left, top, float(width), float(height))
    right = left + columns * width
    bottom = top + rows * height
    tail = right + (longest * 0.72 if turned else 0)
    total = max(right + 110, tail + 20, 640)
    drawing = Drawing(
        total, bottom + 34, f"Map of {rows} layers by {columns} tasks: owned or shared."
    )
    for i, task in enumerate(heads):
        x = left + (i + 0.5) * width
        if turned:
            drawing.text(x + 3, top - 8, task, "label2", turn=-45.0)
        else:
            drawing.text(x, top - 9, task, "label2", "middle")
    _rows(drawing, data, labels, grid, text, right)
    _cells(drawing, data, grid)
    drawing.text(left - 10, bottom + 20, "own share of the base", "note", "end")
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
                boxes.setdefault("ungated", []).append(box)
            elif cell.state == "own" and cell.score is not None:
                level = intensity.level(cell.score)
                boxes.setdefault(f"o{level}", []).append(box)
                style = "cellpaper" if level >= STRONG else "cell"
                words.append((middle[0], middle[1] + 3.6, significant(cell.score, 2), style))
            elif cell.score is not None:
                shift = -14 if grid.width >= 48 and wide else 0
                rings.append((middle[0] + shift, middle[1]))
                if shift:
                    word = significant(cell.score, 2)
                    words.append((middle[0] + 6, middle[1] + 3.6, word, "cellmuted"))
            else:
                dots.append(middle)
    for style, found in sorted(boxes.items()):
        drawing.rects(found, style)
    drawing.dots(rings, radius, "ring")
    drawing.dots(rings, radius - 1.2, "hole")
    drawing.dots(dots, 1.2, "dot")
    for x, y, word, style in words if wide else ():
        drawing.text(x, y, word, style, "middle")


def _legend(drawing: Drawing, data: LayerMap) -> None:
    cells = [c for row in data.cells for c in row if c is not None]
    x, y = MARGIN, 16.0
    if data.open_scores:
        for i, bound in enumerate(Intensity(data.open_scores).bounds()):
            drawing.rect(x, y - 10, 24, 13, f"o{i + 1}")
            style = "cellpaper" if i + 1 >= STRONG else "cell"
            drawing.text(x + 12, y, bound, style, "middle")
            x += 25
        x = _entry(drawing, x + 5, y, "own, gate score from")
    if any(c.state == "own" and c.score is None for c in cells):
        drawing.rect(x, y - 10, 20, 12, "ungated")
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


def map_data(data: LayerMap, grid: Grid) -> dict[str, object]:
    """What the page needs to tell about a cell that is pointed at, as plain values."""
    return {
        "grid": [round(v, 1) for v in (grid.left, grid.top, grid.width, grid.height)],
        "sites": [[site or "(base)", kind] for site, kind in data.sites],
        "tasks": list(data.tasks),
        "cells": [
            [
                0
                if c is None
                else [
                    c.state[0],
                    count_text(c.own) if c.own else "",
                    None if c.score is None else float(f"{c.score:.3g}"),
                ]
                for c in row
            ]
            for row in data.cells
        ],
    }
