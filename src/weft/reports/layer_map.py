"""The map of layers by tasks: who owns what, and how open its gate is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weft.core.ledger import Row

from .numbers import count_text
from .records import TaskReport

ADDED_KIND = "adapter"


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
