"""A comparison as its page shows it, read from its folder or its table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from weft.comparing import Fleet, open_fleet
from weft.comparing.cells import FAILURE
from weft.comparing.files import get_json
from weft.errors import ConfigError, DataError, PlanError
from weft.planning import Plan
from weft.planning.budget import budget_in_bytes
from weft.planning.choices import read_choices
from weft.planning.curve import sweep
from weft.planning.plans import Selection, answer
from weft.planning.questions import Question, question
from weft.reports import Point
from weft.reports.comparison import Answer, Compared, Owned, Owner
from weft.reports.plan_figure import Budget, Choice

from .methods_text import bibtex, paragraph
from .owned import owned_by

if TYPE_CHECKING:
    import pandas as pd

Rows = list[dict[str, Any]]
ENOUGH = 0.95
"""The share of what more bytes can gain on validation that the default budget must bring."""


@dataclass(frozen=True)
class _Read:
    """A comparison as it was found: its table, and its folder if it has one."""

    frame: pd.DataFrame
    fleet: Fleet | None


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
    read = _Read(frame, fleet)
    rows = _plain(frame)
    tasks = tuple(dict.fromkeys(row["task"] for row in rows))
    if fleet is not None:
        tasks = tuple(task for task in fleet.comparison.tasks if task in tasks)
    made, no_answer, left_out = _planned(read, budget)
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


# ----------------------------------------------------------------------- plan


@dataclass(frozen=True)
class _Planned:
    """A plan, and the plans of the budgets around it."""

    plan: Plan
    chosen_by: str
    curve: tuple[Plan, ...]
    many_seeds: bool

    @property
    def tested(self) -> bool:
        """Whether every choice has test scores; else all are shown by validation."""
        made = [s for p in (self.plan, *self.curve) for s in (p.chosen, *p.singles)]
        return all(selection.test is not None for selection in made)

    def shown(self) -> list[Selection]:
        """The plan and the best single method, whose tasks are looked at closely."""
        single = self.plan.best_single
        found = [self.plan.chosen]
        same = single is not None and single.picks == self.plan.chosen.picks
        return found if single is None or same else [*found, single]

    def answer(self) -> Answer:
        """What the head of the page says."""
        asked = self.plan.question
        scores = {t: s for pick in self.plan.chosen.picks for t, s in pick.scores.items()}
        metrics = {s.metric for s in scores.values()}
        metric = metrics.pop() if len(metrics) == 1 else "weighted score"
        if asked.relative_to is not None:
            metric = f"improvement over {asked.relative_to}, %"
        mean = "weighted mean" if asked.weights else "mean of all tasks"
        singles = self.plan.singles
        return Answer(
            budget=self.plan.budget,
            chosen_by=self.chosen_by,
            owners=tuple(
                self._owner(task, pick)
                for task in asked.choices.tasks
                for pick in self.plan.chosen.picks
                if task in pick.tasks
            ),
            budgets=tuple(self._budget(plan) for plan in self.curve),
            at=self._budget(self.plan),
            shared_bytes=sum(max(pick.shared_bytes) for pick in self.plan.chosen.picks),
            whole=self._choice(singles[0]) if singles else None,
            metric=f"{'test' if self.tested else 'validation'} {metric}",
            of="worst task" if asked.objective == "worst" else mean,
            higher_is_better=asked.sign > 0,
        )

    def _budget(self, plan: Plan) -> Budget:
        single = plan.best_single
        return Budget(
            plan.budget,
            self._choice(plan.chosen),
            None if single is None else self._choice(single),
        )

    def _choice(self, chosen: Selection) -> Choice:
        mean, spread = (chosen.test if self.tested else None) or chosen.val
        said = chosen.name
        if said == "plan":
            labels = sorted({pick.label for pick in chosen.picks})
            said = f"plan of {', '.join(labels)}"
        return Choice(chosen.bytes, chosen.val[0], mean, spread if self.many_seeds else None, said)

    def _owner(self, task: str, pick: Any) -> Owner:
        scores = pick.scores[task]
        test = scores.test
        return Owner(
            task=task,
            label=pick.label,
            together=tuple(other for other in pick.tasks if other != task),
            own_bytes=max(scores.own_bytes),
            metric=scores.metric,
            val=statistics.fmean(scores.val),
            test=statistics.fmean(test) if test else None,
            spread=statistics.stdev(test) if len(test) > 1 else None,
        )


def _planned(
    read: _Read, budget: int | str | None
) -> tuple[_Planned | None, str, Mapping[str, str]]:
    """The plan to show, or why there is none, and what plans cannot choose."""
    source = read.frame if read.fleet is None else read.fleet.root
    stated = {} if read.fleet is None else _stated(read.fleet.root)
    try:
        asked, folder = question(
            source,
            stated.get("objective") or "mean",
            stated.get("weights"),
            heads=str(stated.get("counted", "")).endswith("and heads"),
            max_seeds=len(stated["seeds"]) if stated.get("seeds") else None,
            relative_to=stated.get("relative_to"),
        )
        limits = sweep(asked, 9)
    except (PlanError, ConfigError) as error:
        return None, str(error), _left_out(read)
    said: str
    if budget is not None:
        limit = budget_in_bytes(budget, asked.choices.base_bytes)
        said = "This budget was asked for."
    elif stated:
        limit = int(stated["budget_bytes"])
        said = "This is the budget of plan.yaml in the comparison's folder."
    else:
        limit = _enough(asked, limits, folder)
        said = (
            f"This is the smallest budget of the curve that brings {100 * ENOUGH:.0f} % of what "
            "more bytes gain on validation; another one: --budget."
        )
    try:
        plan = answer(asked, limit, folder)
    except PlanError as error:
        if budget is not None:
            raise  # what was asked for cannot be
        return None, f"{error} ({said})", asked.choices.left_out
    curve = tuple(answer(asked, at, folder) for at in sorted({*limits, limit}))
    many = len(asked.choices.seeds) > 1
    return _Planned(plan, said, curve, many), "", asked.choices.left_out


def _left_out(read: _Read) -> Mapping[str, str]:
    seeds = None if read.fleet is None else read.fleet.comparison.seeds
    try:
        return read_choices(read.frame, seeds=seeds).left_out
    except (PlanError, DataError):
        return {}


def _stated(folder: Path) -> dict[str, Any]:
    """The plan that lies in a comparison's folder; empty if there is none."""
    file = folder / "plan.yaml"
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        int(found["budget_bytes"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{file} is no plan ({type(error).__name__}). Remove it, or give --budget."
        ) from error
    return found


def _enough(asked: Question, limits: Sequence[int], folder: Path | None) -> int:
    """The smallest budget that brings most of the gain on validation."""
    plans = [answer(asked, limit, folder) for limit in limits]
    scores = [asked.sign * plan.chosen.val[0] for plan in plans]
    wanted = scores[0] + ENOUGH * (max(scores) - scores[0])
    return next(limit for limit, score in zip(limits, scores, strict=True) if score >= wanted)
