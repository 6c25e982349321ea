"""Drawing how alike tasks are, as a matrix."""

from __future__ import annotations

from .axes import text_width
from .drawing import Drawing
from .map_drawing import STRONG
from .numbers import shorten
from .similarity import Similarity
from .style import LEVELS

WIDTHS = ((8, 62), (16, 44), (28, 30), (1 << 30, 12))
"""Up to so many tasks, the side of a cell across; numbers fit until the last."""

MARGIN = 12.0


def draw_matrix(found: Similarity) -> Drawing:
    """Cells of similarity; one colour for likeness, another and a stroke for opposition.

    Args:
        found: in the order in which tasks are to stand.
    """
    count = len(found.tasks)
    width = float(next(w for limit, w in WIDTHS if count <= limit))
    height = min(width, 26.0)
    names = [shorten(task, 22) for task in found.tasks]
    longest = max(text_width(name, 11.5) for name in names)
    left = MARGIN + longest + 12
    turned = longest > width - 6
    top = 34 + (longest * 0.87 + 14 if turned else 22)
    right = left + count * width
    tail = longest * 0.5 if turned else 0.0
    size = (max(right + tail + MARGIN, 460.0), top + count * height + 12)
    drawing = Drawing(*size, f"Similarity of {count} tasks in what they own.")
    for i, name in enumerate(names):
        x = left + (i + 0.5) * width
        if turned:
            drawing.text(x + 3, top - 8, name, "name2", turn=-60.0)
        else:
            drawing.text(x, top - 8, name, "name2", "middle")
        drawing.text(left - 9, top + (i + 0.5) * height + 4, name, "name2", "end")
    for i, row in enumerate(found.values):
        for j, value in enumerate(row):
            x, y = left + j * width, top + i * height
            _cell(drawing, value, (x + 1, y + 1, width - 2, height - 2), numbers=width >= 30)
    _legend(drawing)
    return drawing


def level(value: float) -> int:
    """The step of intensity of a likeness, from 0 (none) to `LEVELS`."""
    return min(LEVELS, int(abs(value) * LEVELS + 0.5))


def _cell(
    drawing: Drawing, value: float, box: tuple[float, float, float, float], *, numbers: bool
) -> None:
    x, y, width, height = box
    step = level(value)
    style = f"o{step}" if value > 0 else f"n{step}"
    if step:
        drawing.rect(x, y, width, height, style)
    if value < 0 and step and not numbers:
        drawing.line([(x, y + height), (x + width, y)], "hole")
    if numbers:
        letters = "cellpaper" if step >= STRONG else "cell" if step else "cellmuted"
        text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")
        drawing.text(x + width / 2, y + height / 2 + 3.6, text, letters, "middle")


def _legend(drawing: Drawing) -> None:
    x = MARGIN
    drawing.text(x, 16, "opposite", "tick")
    x += text_width("opposite", 11) + 8
    for value in (-1.0, -0.5, 0.0, 0.5, 1.0):
        _cell(drawing, value, (x, 5, 40, 15), numbers=True)
        x += 42
    drawing.text(x + 6, 16, "same layers, same direction", "tick")
