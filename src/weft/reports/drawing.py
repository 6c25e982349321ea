"""A drawing: a list of marks in pixels, written as SVG here and as PNG in `raster`."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .style import figure_css

XY = tuple[float, float]


def _polar(corners: int, turn: float, radius: float = 1.0, inner: float | None = None) -> list[XY]:
    radii = [radius] if inner is None else [radius, inner]
    total = corners * len(radii)
    return [
        (
            radii[i % len(radii)] * math.sin(turn + 2 * math.pi * i / total),
            -radii[i % len(radii)] * math.cos(turn + 2 * math.pi * i / total),
        )
        for i in range(total)
    ]


_W = 0.36
_PLUS = [
    *[(-_W, -1.0), (_W, -1.0), (_W, -_W), (1.0, -_W), (1.0, _W), (_W, _W)],
    *[(_W, 1.0), (-_W, 1.0), (-_W, _W), (-1.0, _W), (-1.0, -_W), (-_W, -_W)],
]
SHAPES: dict[str, list[XY]] = {
    "circle": _polar(24, 0.0, 0.95),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _polar(3, 0.0, 1.2),
    "diamond": _polar(4, 0.0, 1.2),
    "down": _polar(3, math.pi, 1.2),
    "plus": _PLUS,
    "star": _polar(5, 0.0, 1.3, 0.55),
    "cross": [((x - y) * 0.75, (x + y) * 0.75) for x, y in _PLUS],
}


@dataclass(frozen=True)
class Rects:
    """Rectangles (x, y, width, height) of one style."""

    boxes: tuple[tuple[float, float, float, float], ...]
    style: str


@dataclass(frozen=True)
class Dots:
    """Round dots of one style's stroke."""

    centres: tuple[XY, ...]
    radius: float
    style: str


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: tuple[XY, ...]
    style: str


@dataclass(frozen=True)
class Marker:
    """One of `SHAPES`; its title shows when pointed at."""

    shape: str
    at: XY
    radius: float
    style: str
    title: str = ""


@dataclass(frozen=True)
class Text:
    """One line of text; ``anchor`` is start, middle or end, ``turn`` in degrees."""

    at: XY
    text: str
    style: str
    anchor: str = "start"
    turn: float = 0.0


Mark = Rects | Dots | Line | Marker | Text


@dataclass
class Drawing:
    """Marks on a paper of a size in pixels.

    Args:
        width: of the paper.
        height: of the paper.
        label: what the drawing shows, for those who cannot see it.
        marks: from back to front.
    """

    width: float
    height: float
    label: str
    marks: list[Mark] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, style: str) -> None:
        """Add one rectangle."""
        self.marks.append(Rects(((x, y, width, height),), style))

    def rects(self, boxes: Iterable[tuple[float, float, float, float]], style: str) -> None:
        """Add rectangles of one style; nothing if there are none."""
        if found := tuple(boxes):
            self.marks.append(Rects(found, style))

    def dots(self, centres: Iterable[XY], radius: float, style: str) -> None:
        """Add round dots of one style; nothing if there are none."""
        if found := tuple(centres):
            self.marks.append(Dots(found, radius, style))

    def line(self, points: Sequence[XY], style: str) -> None:
        """Add a line."""
        self.marks.append(Line(tuple(points), style))

    def marker(self, shape: str, at: XY, radius: float, style: str, title: str = "") -> None:
        """Add one marker."""
        self.marks.append(Marker(shape, at, radius, style, title))

    def text(
        self, x: float, y: float, text: str, style: str, anchor: str = "start", turn: float = 0.0
    ) -> None:
        """Add a line of text."""
        self.marks.append(Text((x, y), text, style, anchor, turn))

    def place(self, other: Drawing, x: float, y: float) -> None:
        """Add all marks of another drawing, moved."""
        self.marks += [_moved(mark, x, y) for mark in other.marks]

    def svg(self, extra: str = "") -> str:
        """The drawing as an ``<svg>`` element for a page that holds `figure_css`.

        Args:
            extra: attributes of the element, escaped already.
        """
        size = f"{number(self.width)} {number(self.height)}"
        return (
            f'<svg class="fig" viewBox="0 0 {size}" width="{number(self.width)}" '
            f'height="{number(self.height)}" role="img" aria-label="{escape(self.label)}" {extra}>'
            + "".join(_svg(mark) for mark in self.marks)
            + "</svg>"
        )

    def svg_file(self) -> str:
        """The drawing as an SVG file of its own that follows the reader's light or dark theme."""
        body = self.svg('xmlns="http://www.w3.org/2000/svg"')
        head, _, rest = body.partition(">")
        paper = '<rect class="paper" width="100%" height="100%"/>'
        return f"{head}><style>{escape(figure_css())}</style>{paper}{rest}\n"


def number(value: float) -> str:
    """A coordinate with at most one decimal."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def escape(text: str) -> str:
    """Text for HTML and XML; characters that XML cannot hold are replaced."""
    clean = "".join(c if c >= " " and c not in "\ufffe\uffff" else "\ufffd" for c in text)
    return html.escape(clean.encode("utf-8", "replace").decode())


def _moved(mark: Mark, dx: float, dy: float) -> Mark:
    match mark:
        case Rects(boxes, style):
            return Rects(tuple((x + dx, y + dy, w, h) for x, y, w, h in boxes), style)
        case Dots(centres, radius, style):
            return Dots(tuple((x + dx, y + dy) for x, y in centres), radius, style)
        case Line(points, style):
            return Line(tuple((x + dx, y + dy) for x, y in points), style)
        case Marker(shape, (x, y), radius, style, title):
            return Marker(shape, (x + dx, y + dy), radius, style, title)
        case Text((x, y), text, style, anchor, turn):
            return Text((x + dx, y + dy), text, style, anchor, turn)


def _path(points: Iterable[XY]) -> str:
    return "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)


def _svg(mark: Mark) -> str:
    n = number
    match mark:
        case Rects(boxes, style):
            d = "".join(
                f"M{n(x)} {n(y)}h{n(w)}v{n(h)}h{n(-w)}z" for x, y, w, h in boxes if w > 0 and h > 0
            )
            return f'<path class="{style}" d="{d}"/>' if d else ""
        case Dots(centres, radius, style):
            d = "".join(f"M{n(x)} {n(y)}h0" for x, y in centres)
            width = f"stroke-width:{n(2 * radius)}"
            return f'<path class="pts {style}" style="{width}" d="{d}"/>'
        case Line(points, style):
            return f'<path class="{style}" d="{_path(points)}"/>'
        case Marker(shape, (x, y), radius, style, title):
            d = _path((x + radius * u, y + radius * v) for u, v in SHAPES[shape]) + "z"
            inside = f"<title>{escape(title)}</title>" if title else ""
            return f'<path class="{style}" d="{d}">{inside}</path>'
        case Text((x, y), text, style, anchor, turn):
            at = f'x="{n(x)}" y="{n(y)}"'
            if anchor != "start":
                at += f' text-anchor="{anchor}"'
            if turn:
                at += f' transform="rotate({n(turn)} {n(x)} {n(y)})"'
            return f'<text class="{style}" {at}>{escape(text)}</text>'
