"""What a report is made of: plain data, from wherever it comes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from weft.core.ledger import Ledger
from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.errors import DataError

FLOAT_BYTES = 4


@dataclass(frozen=True)
class TaskReport:
    """What a report says about one task.

    Args:
        name: the task.
        method: the method that made its plan.
        ledger: what it owns, shares and costs.
        metrics: scores by name, split included ("test accuracy"); the first one is the primary.
        history: one row per epoch: "epoch", "phase", "loss", "val" (scores by name), "open_gates",
            "gates", "own_fraction"; what is missing is left out of the figures.
        base_bytes: bytes of the base's tensors, if known; else estimated from the ledger.
        shared_bytes: bytes of shared tensors that the plan adds to the base.
    """

    name: str
    method: str
    ledger: Ledger
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    base_bytes: int | None = None
    shared_bytes: int = 0

    @property
    def primary(self) -> tuple[str, float] | None:
        """Name and value of the primary score."""
        return next(iter(self.metrics.items()), None)

    @property
    def full_bytes(self) -> int:
        """Bytes of one full copy of the base, without a head."""
        if self.base_bytes is not None:
            return self.base_bytes
        rows = self.ledger.rows
        return sum(
            r.size * (r.own_bytes // r.own if r.own else FLOAT_BYTES) for r in rows if r.size
        )


@dataclass(frozen=True)
class Point:
    """One run of one method on one task, for a comparison.

    Args:
        method: what is compared.
        task: the task.
        seed: of the run; runs of one method and task differ in it.
        score: the metric's value.
        own_bytes: bytes that the task owns, without its head.
        own_fraction: own parameters over the base's.
        metric: name of the score, split included ("test accuracy").
        higher_is_better: whether a larger score is a better one.
    """

    method: str
    task: str
    seed: int
    score: float
    own_bytes: int
    own_fraction: float
    metric: str
    higher_is_better: bool = True


@runtime_checkable
class HasTaskReports(Protocol):
    """Anything that can describe its tasks, for instance a bank."""

    def task_reports(self) -> list[TaskReport]:
        """One report per task, in the order in which they are to appear."""


Source = Sequence[TaskReport] | MultiTaskModel | HasTaskReports


def task_report(
    name: str,
    method: str,
    ledger: Ledger,
    facts: Mapping[str, Any],
    *,
    base_bytes: int | None = None,
    shared_bytes: int = 0,
) -> TaskReport:
    """The report of a task whose metrics and history are the facts that travel with it.

    Args:
        name: the task.
        method: the method that made its plan.
        ledger: its ledger.
        facts: ``{"metrics": {split: {name: value}}, "history": [row, ...]}``; both may be missing.
        base_bytes: bytes of the base's tensors, if known.
        shared_bytes: bytes of shared tensors that the plan adds.

    Returns:
        The report. Test scores come before validation scores, and losses last.
    """
    splits: Mapping[str, Mapping[str, float]] = facts.get("metrics") or {}
    order = sorted(splits, key=lambda s: ["test", "val"].index(s) if s in ("test", "val") else 2)
    scores = [(s, n, float(v)) for s in order for n, v in splits[s].items() if v is not None]
    scores.sort(key=lambda item: item[1] == "loss")
    metrics = {f"{split} {metric}": value for split, metric, value in scores}
    history = tuple(facts.get("history") or ())
    return TaskReport(name, method, ledger, metrics, history, base_bytes, shared_bytes)


def from_model(model: MultiTaskModel) -> list[TaskReport]:
    """The reports of a model's tasks.

    Args:
        model: any model; its tasks' facts supply metrics and history where there are any.

    Returns:
        One report per task, in the model's order.
    """
    base = sum(t.numel() * t.element_size() for _, t in named_tensors(model.base))
    shared = sum(t.numel() * t.element_size() for t in model.shared.values())
    return [
        task_report(
            name,
            model.plan(name).method,
            model.ledger(name),
            model.tasks[name].facts,
            base_bytes=base,
            shared_bytes=shared,
        )
        for name in model.task_names
    ]


def collect(source: Source) -> list[TaskReport]:
    """The task reports of a source, checked to stand on one base.

    Raises:
        DataError: the source is nothing of the kind, is empty, or mixes bases.
    """
    if isinstance(source, MultiTaskModel):
        reports = from_model(source)
    elif isinstance(source, HasTaskReports):
        reports = list(source.task_reports())
    elif isinstance(source, Sequence) and all(isinstance(r, TaskReport) for r in source):
        reports = list(source)
    else:
        raise DataError(
            "A report is made from a model, a bank, or a list of TaskReport, "
            f"found {type(source).__name__}."
        )
    if not reports:
        raise DataError("There is no task to report on. Add a task first.")
    sizes = {r.ledger.base_parameters: r.name for r in reports}
    if len(sizes) > 1:
        found = ", ".join(f"{size} parameters ('{name}')" for size, name in sizes.items())
        raise DataError(
            f"The tasks of one report stand on one base, found bases of {found}. "
            "Write one report per base."
        )
    return reports


def check_points(points: Sequence[Point]) -> None:
    """Refuse a comparison that cannot be read.

    Raises:
        DataError: two points of one run, a negative size, or a metric with two directions.
    """
    seen: set[tuple[str, str, str, int]] = set()
    better: dict[str, bool] = {}
    for p in points:
        key = (p.metric, p.method, p.task, p.seed)
        if key in seen:
            raise DataError(
                f"Two points for method '{p.method}', task '{p.task}', seed {p.seed}, metric "
                f"'{p.metric}'. Give each run once."
            )
        if p.own_bytes < 0 or not math.isfinite(p.own_bytes):
            raise DataError(f"'{p.method}' on '{p.task}' owns {p.own_bytes} bytes; expected >= 0.")
        if better.setdefault(p.metric, p.higher_is_better) != p.higher_is_better:
            raise DataError(f"Points disagree on whether a higher '{p.metric}' is better.")
        seen.add(key)
