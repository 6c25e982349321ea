"""Tasks as the list and the page show them; read from the bank's documents, never loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weft.core.ledger import Ledger
from weft.errors import WeftError

from .answers import plain
from .server import Server

log = logging.getLogger("weft.serving")


def lines(server: Server, names: Sequence[str]) -> list[dict[str, Any]]:
    """Tasks in brief; one that cannot be read is listed with its problem."""
    resident, pinned = frozenset(server.resident), server.pinned
    return [_line(server, name, name in resident, name in pinned) for name in names]


def _line(server: Server, name: str, resident: bool, pinned: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": name,
        "resident": resident,
        "pinned": pinned,
        "problem": None,
        **dict.fromkeys(("method", "kind", "classes", "own_parameters")),
        **dict.fromkeys(("own_fraction", "own_bytes", "head_bytes")),
        "metrics": {},
    }
    try:
        summary = server.summary(name)
    except WeftError as error:
        log.error("%s: %s", name, error)  # with paths, which are nobody else's business
        return {**found, "problem": "Its bundle cannot be read."}
    kept = ("own_parameters", "own_fraction", "own_bytes", "head_bytes")
    return {
        **found,
        **{key: summary.ledger[key] for key in kept},
        "method": summary.method,
        "kind": summary.kind,
        "classes": None if summary.classes is None else len(summary.classes),
        "metrics": plain(summary.metrics),
    }


def detail(server: Server, name: str) -> dict[str, Any]:
    """A task with its classes, and what it owns layer by layer."""
    found = {**lines(server, [name])[0], "class_names": None, "layers": []}
    if found["problem"] is None:
        try:
            classes = server.summary(name).classes
            layers = layers_of(server.ledger(name))
        except WeftError as error:
            log.error("%s: %s", name, error)
            return {**found, "problem": "Its bundle cannot be read."}
        found["class_names"] = None if classes is None else list(classes)
        found["layers"] = layers
    return found


@dataclass
class _Sum:
    kind: str
    size: int = 0
    own: int = 0


def layers_of(ledger: Ledger) -> list[dict[str, Any]]:
    """By layer, elements of the base and elements that the task owns."""
    sums: dict[str, _Sum] = {}
    for row in ledger.rows:
        layer = sums.setdefault(row.site, _Sum(row.kind))
        layer.size += row.size
        layer.own += row.own
    return [
        {"site": site, "kind": layer.kind, "size": layer.size, "own": layer.own}
        for site, layer in sums.items()
    ]
