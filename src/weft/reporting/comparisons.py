"""A comparison as its page shows it, read from its folder or its table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.comparing import Fleet, open_fleet
from weft.comparing.cells import FAILURE
from weft.comparing.files import get_json
from weft.errors import DataError
from weft.reports import Point
from weft.reports.compared import Compared, Owned

from .methods_text import bibtex, paragraph
from .owned import owned_by
from .planned import planned

if TYPE_CHECKING:
    import pandas as pd

Rows = list[dict[str, Any]]


def read_compared(source: str | Path | pd.DataFrame, budget: int | str | None) -> Compared:
    """Read a comparison.

    Args:
        source: its folder, or its table.
        budget: whose plan is shown; as for `weft.plan`.

    Raises:
        DataError: there are no results.
        PlanError: nothing fits the budget.
        ConfigError: the budget is none.
    """
    fleet = open_fleet(source) if isinstance(source, (str, Path)) else None
    frame = source if fleet is None else fleet.table()
    assert not isinstance(frame, (str, Path))
    if frame.empty:
        raise DataError("No cell of the comparison is finished. Run weft compare first.")
    rows = _plain(frame)
    tasks = tuple(dict.fromkeys(row["task"] for row in rows))
    if fleet is not None:
        tasks = tuple(task for task in fleet.comparison.tasks if task in tasks)
    made, no_answer, left_out = planned(frame, fleet, budget)
    seeds = tuple(sorted({int(row["seed"]) for row in rows}))
    picked = {} if made is None else {t: p.label for p in made.plan.chosen.picks for t in p.tasks}
    owned: tuple[Owned, ...] = ()
    no_owned = "Bundles are kept in the folder of a comparison; this is a table of one."
    if fleet is not None:
        owned, no_owned = owned_by(fleet, [] if made is None else made.shown())
    unfinished = [] if fleet is None else [cell for cell in fleet.cells if not cell.finished]
    return Compared(
        tasks=tasks,
        seeds=seeds,
        base=_base_name(fleet),
        base_bytes=int(rows[0]["base_bytes"]),
        base_parameters=int(rows[0].get("base_parameters") or 0),
        tests=_shown_points(rows),
        vals=_points(rows, "val"),
        rows=_table(rows, tasks, picked),
        answer=None if made is None else made.answer(),
        no_answer=no_answer,
        owned=owned,
        no_owned=no_owned,
        curves={} if fleet is None else _curves(fleet, tasks),
        paragraph=paragraph(rows, tasks, seeds, fleet),
        bibtex=bibtex(rows),
        failed={cell.name: _reason(cell.file(FAILURE)) for cell in unfinished
                if cell.file(FAILURE).is_file()},
        missing=len(unfinished),
        left_out=left_out,
    )  # fmt: skip


def _plain(frame: pd.DataFrame) -> Rows:
    """The rows of a table with None for what is missing."""
    columns = frame.astype(object)
    found: Rows = columns.where(frame.notna(), None).to_dict("records")
    return found


def _base_name(fleet: Fleet | None) -> str:
    if fleet is None:
        return ""
    kind, _, name = fleet.comparison.base.name.partition(":")
    return name.rpartition("/")[2] if kind == "python" else name


def _reason(file: Path) -> str:
    found = get_json(file)
    return str(found["reason"]) if found is not None else "unknown"


# -------------------------------------------------------------------- figures


def _shown_points(rows: Rows) -> tuple[Point, ...]:
    """Test scores, and validation scores of the tasks that have no test data."""
    tests = _points(rows, "test")
    tested = {point.task for point in tests}
    return (*tests, *(p for p in _points(rows, "val") if p.task not in tested))


def _points(rows: Rows, split: str) -> tuple[Point, ...]:
    """A point for each task of each cell that has a score.

    What the tasks of a cell share counts in equal parts for each.
    """
    together: dict[str, int] = {}
    for row in rows:
        together[row["cell"]] = together.get(row["cell"], 0) + 1
    words = {"test": "test", "val": "validation"}
    return tuple(
        Point(
            method=row["label"],
            task=row["task"],
            seed=int(row["seed"]),
            score=float(row[split]),
            own_bytes=int(row["own_bytes"] + row["shared_bytes"] / together[row["cell"]]),
            own_fraction=float(row.get("own_fraction") or 0.0),
            metric=f"{words[split]} {row['metric']}",
            higher_is_better=bool(row["higher_is_better"]),
        )
        for row in rows
        if row[split] is not None
    )


def _table(
    rows: Rows, tasks: Sequence[str], picked: Mapping[str, str]
) -> tuple[dict[str, Any], ...]:
    """Means over seeds of every task by every method."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["task"], row["label"]), []).append(row)
    order = sorted(groups, key=lambda key: tasks.index(key[0]))
    return tuple(
        {
            "task": task,
            "label": label,
            "method": found[0]["method"],
            "metric": found[0]["metric"],
            **_spread_of(found, "val"),
            **_spread_of(found, "test"),
            "own_bytes": _mean(found, "own_bytes"),
            "own_fraction": _mean(found, "own_fraction"),
            "head_bytes": _mean(found, "head_bytes"),
            "seconds": _mean(found, "seconds"),
            "latency": _mean(found, "latency_ms_per_row"),
            "memory": _mean(found, "peak_memory_bytes"),
            "seeds": len(found),
            "planned": picked.get(task) == label,
        }
        for task, label in order
        for found in [groups[task, label]]
    )


def _mean(rows: Rows, key: str) -> float:
    return statistics.fmean([float(row[key]) for row in rows if row.get(key) is not None] or [0.0])


def _spread_of(rows: Rows, split: str) -> dict[str, float | None]:
    values = [float(row[split]) for row in rows if row[split] is not None]
    return {
        split: statistics.fmean(values) if values else None,
        f"{split}_spread": statistics.stdev(values) if len(values) > 1 else None,
    }


def _curves(fleet: Fleet, tasks: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """By task and method, the mean validation score after each epoch, of finished cells."""
    found: dict[str, dict[str, list[list[float]]]] = {task: {} for task in tasks}
    for cell in fleet.cells:
        file = cell.folder.history("cell")
        if not cell.finished or not file.is_file():
            continue
        lines: dict[str, list[float]] = {}
        for text in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            scores = [v for k, v in (row.get("val") or {}).items() if k != "loss"]
            if scores and scores[0] is not None:  # an undefined score has no place in a curve
                lines.setdefault(row["task"], []).append(float(scores[0]))
        for task, values in lines.items():
            found.setdefault(task, {}).setdefault(cell.label, []).append(values)
    return {
        task: {label: _means(seeds) for label, seeds in curves.items()}
        for task, curves in found.items()
        if curves
    }


def _means(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean after each epoch that every curve reached."""
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]
