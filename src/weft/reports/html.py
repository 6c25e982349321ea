"""What pages are made of: figures with their captions, the template, and figures as files."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from .drawing import Drawing, escape
from .raster import save_png
from .style import figure_css


@dataclass(frozen=True)
class Figure:
    """A drawing of a page.

    Args:
        name: of its file, without ending.
        caption: what it shows.
        drawing: the drawing.
    """

    name: str
    caption: str
    drawing: Drawing

    @property
    def svg(self) -> Markup:
        """The drawing as inline SVG."""
        return Markup(self.drawing.svg(f'data-name="{escape(self.name)}"'))


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Fill a template with its style sheets and script, and write it as one file.

    Args:
        path: the HTML file; its folder is made.
        template: one of this package's files.
        values: what the template shows.

    Returns:
        The path.
    """
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _asset("report.js.j2")
    text = environment.get_template(template).render(
        **values,
        csp=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        figure_css=Markup(figure_css()),
        page_css=Markup(_asset("report.css.j2")),
        script=Markup(script),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def write_figures(drawings: Sequence[tuple[str, Drawing]], folder: Path) -> None:
    """Write drawings as SVG and PNG; names that files cannot have are changed.

    Args:
        drawings: name and drawing.
        folder: where to; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for name, drawing in drawings:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "figure"
        unique, n = safe, 2
        while unique.lower() in taken:
            unique, n = f"{safe}-{n}", n + 1
        taken.add(unique.lower())
        text = drawing.svg_file()
        (folder / f"{unique}.svg").write_text(text, encoding="utf-8", newline="\n")
        save_png(drawing, folder / f"{unique}.png")


def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
