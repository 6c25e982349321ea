"""The page of a comparison: what each task should own, and what that was chosen from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answer_text import answer_texts
from .compare import metrics_of, pareto_front, summarise, tasks_of
from .compared import Compared, Owned
from .drawing import Drawing
from .epochs import draw_epochs
from .html import Figure, write_figures, write_page
from .layer_map import layer_map, map_data
from .map_drawing import draw_map
from .matrix import draw_matrix
from .numbers import bytes_text, count_text, metric_text, percent_text, spread_text
from .plan_figure import draw_plan
from .records import check_points
from .similarity import reordered, strongest
from .tradeoff import draw_tradeoff, method_places

OPEN_FIGURES = 8
"""So many small figures are unfolded."""


@dataclass(frozen=True)
class _TradeOff:
    figure: Figure
    by_task: tuple[Figure, ...]


@dataclass(frozen=True)
class _Map:
    name: str
    figure: Figure
    data: dict[str, object]
    matrix: Figure | None
    said: str


def comparison_page(
    compared: Compared,
    path: str | Path,
    *,
    title: str = "What each task should own",
    figures: Path | None = None,
) -> Path:
    """Write the page of a comparison as one HTML file that needs nothing else.

    Args:
        compared: the comparison.
        path: the file to write.
        title: the page's heading.
        figures: a folder to which every figure is also written as SVG and PNG.

    Returns:
        The path of the file.

    Raises:
        DataError: two points of one run, or a metric with two directions.
    """
    check_points(compared.tests)
    answer = compared.answer
    plan = None
    if answer is not None:
        drawing = draw_plan(
            answer.budgets,
            answer.metric,
            higher_is_better=answer.higher_is_better,
            chosen=answer.budget,
            of=answer.of,
        )
        plan = Figure("plan", f"{answer.metric} against the budget of all tasks", drawing)
    metrics = metrics_of(compared.tests)
    trade_offs = [_trade_off(compared, metric) for metric in metrics]
    fronts = {task: _front(compared, task) for task in compared.tasks}
    maps = [_map(owned) for owned in compared.owned]
    curves = _curves(compared, fronts)
    values = {
        "title": title,
        "c": compared,
        "base_bytes": bytes_text(compared.base_bytes),
        "base_parameters": count_text(compared.base_parameters),
        "answer": None if answer is None else answer_texts(answer),
        "plan": plan,
        "trade_offs": trade_offs,
        "maps": maps,
        "curves": curves,
        "open_figures": OPEN_FIGURES,
        "rows": [_row(row, fronts[row["task"]]) for row in compared.rows],
        "metrics": len(metrics),
    }
    written = write_page(Path(path), "comparison.html.j2", values)
    if figures is not None:
        shown = [plan, *(f for t in trade_offs for f in (t.figure, *t.by_task))]
        shown += [*(f for m in maps for f in (m.figure, m.matrix)), *curves]
        write_figures([(f.name, f.drawing) for f in shown if f is not None], figures)
    return written


def _front(compared: Compared, task: str | None, metric: str = "") -> set[str]:
    """The methods on the Pareto front of validation scores, of one task or of all with a metric."""
    only = None if task is None else [task]
    names = [p.metric for p in compared.vals if task in (None, p.task)]
    wanted = [name for name in names if not metric or _plain(name) == _plain(metric)]
    if not wanted:
        return set()
    return {s.method for s in pareto_front(summarise(compared.vals, wanted[0], only))}


def _plain(metric: str) -> str:
    """The name of a metric without its split."""
    return metric.partition(" ")[2]


def _trade_off(compared: Compared, metric: str) -> _TradeOff:
    tasks = tasks_of(compared.tests, metric)
    better = next(p.higher_is_better for p in compared.tests if p.metric == metric)
    copy = float(compared.base_bytes)

    def draw(task: str | None, width: float, height: float) -> Drawing:
        only = None if task is None else [task]
        front = _front(compared, task, metric)
        return draw_tradeoff(
            method_places(summarise(compared.tests, metric, only), front),
            metric,
            higher_is_better=better,
            copy=copy,
            task=task or "",
            width=width,
            height=height,
        )

    mean = f"mean of {len(tasks)} tasks" if len(tasks) > 1 else tasks[0]
    whole = Figure(f"tradeoff-{metric}", f"{metric}, {mean}", draw(None, 860.0, 440.0))
    small = tuple(
        Figure(f"tradeoff-{metric}-{task}", task, draw(task, 430.0, 300.0))
        for task in (tasks if len(tasks) > 1 else ())
    )
    return _TradeOff(whole, small)


def _map(owned: Owned) -> _Map:
    found = None if owned.similarity is None else reordered(owned.similarity)
    reports = list(owned.reports)
    if found is not None:
        places = {task: i for i, task in enumerate(found.tasks)}
        reports.sort(key=lambda r: places.get(r.name, len(places)))
    data = layer_map(reports, [f"{r.name}" for r in reports])
    drawing, grid = draw_map(data)
    figure = Figure(f"layers-{owned.name}", f"Layers by tasks: {owned.name}", drawing)
    matrix, said = None, owned.why_not
    if found is not None and len(found.tasks) > 1:
        caption = f"Similarity of what tasks own: {owned.name}"
        matrix = Figure(f"similarity-{owned.name}", caption, draw_matrix(found))
        pairs = [p for p in strongest(found, 2) if p[2] >= 0.1]
        texts = [f"{a} and {b} ({value:.2f})" for a, b, value in pairs]
        alike = f"Most alike: {' and '.join(texts)}." if texts else "No two tasks are alike."
        said = f"{alike} {owned.why_not}".strip()
    return _Map(owned.name, figure, map_data(data, grid), matrix, said)


def _curves(compared: Compared, fronts: Mapping[str, set[str]]) -> list[Figure]:
    figures = []
    for task, curves in compared.curves.items():
        metric = next((_plain(p.metric) for p in compared.vals if p.task == task), "score")
        known = {label: curve for label, curve in curves.items() if curve}
        if known:
            drawing = draw_epochs(task, metric, known, fronts.get(task, set()))
            figures.append(Figure(f"epochs-{task}", task, drawing))
    return figures


def _row(row: Mapping[str, Any], front: set[str]) -> dict[str, Any]:
    """A row of the table of all choices as text, with the values that it is sorted by."""
    metric = row["metric"]

    def score(split: str) -> dict[str, Any]:
        value = row[split]
        if value is None:
            return {"text": "–", "value": ""}
        spread = spread_text(metric, row[f"{split}_spread"])
        return {"text": metric_text(metric, value) + spread, "value": value}

    return {
        "task": row["task"],
        "label": row["label"],
        "method": row["method"],
        "metric": metric,
        "val": score("val"),
        "test": score("test"),
        "own": {"text": bytes_text(row["own_bytes"]), "value": row["own_bytes"]},
        "share": {"text": percent_text(row["own_fraction"]), "value": row["own_fraction"]},
        "head": {"text": bytes_text(row["head_bytes"]), "value": row["head_bytes"]},
        "seconds": {"text": f"{row['seconds']:.1f}", "value": row["seconds"]},
        "latency": {"text": f"{row['latency']:.2f}", "value": row["latency"]},
        "memory": {"text": bytes_text(row["memory"]), "value": row["memory"]},
        "seeds": row["seeds"],
        "front": row["label"] in front,
        "planned": row["planned"],
    }
