"""The same drawings as PNG, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .drawing import SHAPES, Dots, Drawing, Line, Mark, Marker, Rects, Text
from .style import LIGHT, STYLES, Style

INCH = 100.0
"""Pixels of a drawing per inch of the picture."""

POINTS = 72.0 / INCH
"""Points per pixel, for widths and letters."""


def save_png(drawing: Drawing, path: Path, *, scale: float = 2.0) -> None:
    """Write a drawing as PNG on light paper.

    Args:
        drawing: what to draw.
        path: the file.
        scale: pixels of the file per pixel of the drawing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (drawing.width / INCH, drawing.height / INCH)
    figure = Figure(figsize=size, dpi=INCH * scale, facecolor=LIGHT["paper"])
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_xlim(0, drawing.width)
    axes.set_ylim(drawing.height, 0)
    axes.set_axis_off()
    for order, mark in enumerate(drawing.marks):
        _draw(axes, mark, order)
    # No metadata: the same drawing gives the same file.
    figure.savefig(path, metadata={"Software": None})


def _patch(style: Style) -> dict[str, Any]:
    from matplotlib.colors import to_rgba

    fill = to_rgba(LIGHT[style.fill], style.opacity) if style.fill else "none"
    edge = LIGHT[style.stroke] if style.stroke else "none"
    return {
        "facecolor": fill,
        "edgecolor": edge,
        "linewidth": style.width * POINTS if style.stroke else 0.0,
    }


def _draw(axes: Any, mark: Mark, order: int) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Circle, Polygon, Rectangle

    style = STYLES[mark.style]
    match mark:
        case Rects(boxes, _):
            shapes = [Rectangle((x, y), w, h) for x, y, w, h in boxes if w > 0 and h > 0]
            axes.add_collection(PatchCollection(shapes, zorder=order, **_patch(style)))
        case Dots(centres, radius, _):
            circles = [Circle(centre, radius) for centre in centres]
            colour = LIGHT[style.stroke or "ink"]
            axes.add_collection(PatchCollection(circles, color=colour, linewidth=0, zorder=order))
        case Line(points, _):
            dash = (0, tuple(d / style.width for d in style.dash)) if style.dash else "solid"
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=LIGHT[style.stroke or "ink"],
                linewidth=style.width * POINTS,
                linestyle=dash,
                zorder=order,
            )
        case Marker(shape, (x, y), radius, _):
            corners = [(x + radius * u, y + radius * v) for u, v in SHAPES[shape]]
            axes.add_patch(Polygon(corners, closed=True, zorder=order, **_patch(style)))
        case Text(_, _, _, _, _):
            _write(axes, mark, style, order)


def _write(axes: Any, mark: Text, style: Style, order: int) -> None:
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3 * POINTS, foreground=LIGHT["paper"])] if style.halo else []
    axes.text(
        *mark.at,
        mark.text,
        parse_math=False,
        color=LIGHT[style.fill or "ink"],
        fontsize=style.size * POINTS * 0.94,  # DejaVu Sans runs wider than the system's letters
        fontweight="bold" if style.bold else "normal",
        fontfamily="DejaVu Sans",
        ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
        va="baseline",
        rotation=-mark.turn,
        rotation_mode="anchor",
        path_effects=halo,
        zorder=order,
    )
