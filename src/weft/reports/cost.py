"""What all tasks together take to store, against one full copy of the base for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .axes import text_width
from .drawing import Drawing
from .numbers import bytes_text, shorten
from .records import TaskReport


@dataclass(frozen=True)
class Cost:
    """Bytes of a set of tasks.

    Args:
        base: of the base, with shared tensors that plans add.
        own: of each task, without heads.
        heads: of all heads.
        copies: of one full copy of the base per task, without heads.
    """

    base: int
    own: tuple[int, ...]
    heads: int
    copies: int

    @property
    def total(self) -> int:
        """Base, own tensors and heads."""
        return self.base + sum(self.own) + self.heads

    @property
    def copies_total(self) -> int:
        """Full copies and heads."""
        return self.copies + self.heads


def cost_of(reports: Sequence[TaskReport]) -> Cost:
    """What the tasks of one base take."""
    full = max(r.full_bytes for r in reports)
    return Cost(
        full + max(r.shared_bytes for r in reports),
        tuple(r.ledger.own_bytes for r in reports),
        sum(r.ledger.head_bytes for r in reports),
        full * len(reports),
    )


def draw_cost(cost: Cost, names: Sequence[str]) -> Drawing:
    """Two bars to one scale: what is stored, and what full copies would take.

    Args:
        cost: the bytes.
        names: the tasks' names.
    """
    width, left, thick = 860.0, 118.0, 24.0
    drawing = Drawing(
        width,
        112,
        f"{bytes_text(cost.total)} stored against {bytes_text(cost.copies_total)} in full copies.",
    )
    per_byte = (width - left - 84) / max(cost.total, cost.copies_total, 1)
    rows = [
        ("stored", [("basebox", cost.base), *(("ownbox", b) for b in cost.own)], cost.total),
        (
            f"{len(cost.own)} full " + ("copy" if len(cost.own) == 1 else "copies"),
            [("basebox", cost.copies // len(cost.own))] * len(cost.own),
            cost.copies_total,
        ),
    ]
    for i, (label, parts, total) in enumerate(rows):
        y = 6 + i * (thick + 10)
        x = left
        drawing.text(left - 10, y + thick / 2 + 4, label, "text", "end")
        for style, size in [*parts, ("headbox", cost.heads)]:
            drawing.rect(x, y, size * per_byte, thick, style)
            x += size * per_byte
        drawing.text(x + 8, y + thick / 2 + 4, bytes_text(total), "text")
    x = left
    largest = max(range(len(names)), key=lambda i: cost.own[i])
    for style, text in (
        ("basebox", f"base {bytes_text(cost.base)}"),
        (
            "ownbox",
            f"own tensors {bytes_text(sum(cost.own))}"
            + (f", most by {shorten(names[largest], 20)}" if sum(cost.own) else ""),
        ),
        ("headbox", f"heads {bytes_text(cost.heads)}"),
    ):
        drawing.rect(x, 88, 12, 12, style)
        drawing.text(x + 18, 98, text, "tick")
        x += text_width(text, 11) + 44
    return drawing
