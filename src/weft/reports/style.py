"""How figures look: two palettes and one table of styles, for SVG and PNG alike."""

from __future__ import annotations

from dataclasses import dataclass

SERIES = 7
"""Series colours, after Okabe and Ito, darkened or lightened until they stand out on the paper."""

_LIGHT_SERIES = ("#0072b2", "#d55e00", "#00805f", "#b0428a", "#b07800", "#2f8fc9", "#4d4d4d")
_DARK_SERIES = ("#5cb4f0", "#ff8d4f", "#2fc99d", "#e59bc8", "#f2b93b", "#a5d8f7", "#c9cdd2")

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2128",
    "muted": "#59636e",
    "faint": "#e2e6eb",
    "axis": "#8b949e",
    "band": "#f1f4f8",
    "own": "#0b4f9c",
    "base": "#b6bec8",
    "added": "#9a3d00",
} | {f"c{i}": colour for i, colour in enumerate(_LIGHT_SERIES)}

DARK = {
    "paper": "#14181e",
    "ink": "#e6eaf0",
    "muted": "#a0abb8",
    "faint": "#2c333d",
    "axis": "#6d7886",
    "band": "#1c222b",
    "own": "#79b8ff",
    "base": "#56616f",
    "added": "#ffa267",
} | {f"c{i}": colour for i, colour in enumerate(_DARK_SERIES)}

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'


@dataclass(frozen=True)
class Style:
    """One kind of mark; colours are names of the palette.

    Args:
        fill: colour of its area, or of its letters.
        stroke: colour of its outline or line.
        width: of the line, in pixels.
        dash: lengths of dash and gap.
        opacity: of the fill.
        size: of letters, in pixels; 0 for marks without letters.
        bold: heavy letters.
        halo: letters keep a margin of paper around them.
    """

    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    dash: tuple[float, float] | None = None
    opacity: float = 1.0
    size: float = 0.0
    bold: bool = False
    halo: bool = False

    def css(self) -> str:
        """The declarations of this style."""
        parts = [f"fill:var(--{self.fill})" if self.fill else "fill:none"]
        if self.opacity < 1.0:
            parts.append(f"fill-opacity:{self.opacity}")
        if self.stroke:
            parts += [f"stroke:var(--{self.stroke})", f"stroke-width:{self.width:g}"]
        if self.dash:
            parts.append("stroke-dasharray:{:g} {:g}".format(*self.dash))
        if self.size:
            parts.append(f"font-size:{self.size:g}px")
        if self.bold:
            parts.append("font-weight:600")
        if self.halo:
            parts.append("paint-order:stroke;stroke:var(--paper);stroke-width:3px")
        return ";".join(parts)


LEVELS = 4
"""Steps of intensity for the score of an open gate; letters on the upper two are paper."""

STYLES: dict[str, Style] = {
    "paper": Style(fill="paper"),
    "grid": Style(stroke="faint"),
    "axis": Style(stroke="axis"),
    "band": Style(fill="band"),
    "edge": Style(stroke="axis", dash=(2, 3)),
    "front": Style(stroke="ink", width=1.4, dash=(5, 4)),
    "copy": Style(stroke="muted", dash=(2, 3)),
    "leader": Style(stroke="muted", width=0.8),
    "text": Style(fill="ink", size=12),
    "title": Style(fill="ink", size=13, bold=True),
    "label": Style(fill="ink", size=12, halo=True),
    "label2": Style(fill="ink", size=11, halo=True),
    "tick": Style(fill="muted", size=11),
    "note": Style(fill="muted", size=10),
    "name": Style(fill="ink", size=10),
    "name2": Style(fill="ink", size=11.5),
    "cell": Style(fill="ink", size=10),
    "cellpaper": Style(fill="paper", size=10),
    "cellmuted": Style(fill="muted", size=10),
    "o1": Style(fill="own", stroke="own", opacity=0.25),
    "o2": Style(fill="own", stroke="own", opacity=0.5),
    "o3": Style(fill="own", stroke="own", opacity=0.8),
    "o4": Style(fill="own", stroke="own"),
    "n1": Style(fill="added", stroke="added", opacity=0.25),
    "n2": Style(fill="added", stroke="added", opacity=0.5),
    "n3": Style(fill="added", stroke="added", opacity=0.8),
    "n4": Style(fill="added", stroke="added"),
    "ungated": Style(fill="own", opacity=0.45),
    "added": Style(fill="added", stroke="added"),
    "ring": Style(stroke="muted"),
    "hole": Style(stroke="paper"),
    "dot": Style(stroke="axis"),
    "share": Style(fill="base"),
    "basebox": Style(fill="base", stroke="paper"),
    "ownbox": Style(fill="own", stroke="paper"),
    "headbox": Style(fill="paper", stroke="muted"),
    "cursor": Style(stroke="ink", width=2.0),
}
for _i in range(SERIES):
    STYLES[f"m{_i}"] = Style(fill=f"c{_i}", stroke="paper", width=1.2)
    STYLES[f"h{_i}"] = Style(fill="paper", stroke=f"c{_i}", width=1.8)
    STYLES[f"l{_i}"] = Style(stroke=f"c{_i}", width=1.8)
    STYLES[f"d{_i}"] = Style(stroke=f"c{_i}", width=1.8, dash=(5, 3))
    STYLES[f"e{_i}"] = Style(stroke=f"c{_i}", width=1.4)
    STYLES[f"s{_i}"] = Style(fill=f"c{_i}", opacity=0.35)


def variables(palette: dict[str, str]) -> str:
    """A palette as CSS variables."""
    return ";".join(f"--{name}:{colour}" for name, colour in palette.items())


def figure_css() -> str:
    """The style sheet of figures: palettes for light, dark and print, and a rule per style."""
    rules = "".join(f".fig .{name}{{{style.css()}}}" for name, style in STYLES.items())
    return (
        f":root{{{variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}"
        f".fig text{{font-family:{FONT};stroke-linejoin:round}}.fig path{{stroke-linejoin:round}}"
        f".fig .pts{{stroke-linecap:round}}{rules}"
    )
