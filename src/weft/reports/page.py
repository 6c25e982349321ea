"""One HTML file that needs nothing else, and its figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import DataError

from .compare import metrics_of, pareto_front, summarise, tasks_of
from .cost import cost_of, draw_cost
from .curves import draw_curves, draw_task, phases_of
from .drawing import Drawing
from .html import Figure, write_figures, write_page
from .layer_map import layer_map, map_data
from .map_drawing import draw_map
from .numbers import bytes_text, count_text, metric_text, percent_text, spread_text
from .raster import save_png
from .records import Point, Source, TaskReport, check_points, collect
from .tables import comparison_rows, task_rows, totals_row
from .tradeoff import Place, draw_tradeoff, method_places

OPEN_TASKS = 6
"""Training curves of so many tasks are unfolded."""


@dataclass(frozen=True)
class Training:
    """The training of one task on the page."""

    name: str
    method: str
    summary: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class TradeOff:
    """Score against bytes for one metric on the page."""

    metric: str
    figure: Figure
    by_task: tuple[Figure, ...]
    rows: list[dict[str, Any]]
    compared: bool


def report(
    source: Source,
    path: str | Path,
    *,
    comparison: Sequence[Point] = (),
    title: str = "What each task owns",
    figures: Path | None = None,
) -> Path:
    """Write what tasks own, share, cost and score as one HTML file that needs nothing else.

    Args:
        source: a model, a bank (anything with ``task_reports()``), or a list of `TaskReport`.
        path: the file to write.
        comparison: runs of several methods, for mean and spread by method and the Pareto front;
            without them the tasks themselves are shown against their bytes.
        title: the page's heading.
        figures: a folder to which every figure is also written as SVG and PNG.

    Returns:
        The path of the file.

    Raises:
        DataError: nothing to report, tasks of several bases, or two points of one run.
    """
    reports = collect(source)
    check_points(comparison)
    names = _names(reports)
    cost = cost_of(reports)
    overview = Figure("cost", "Bytes stored, against full copies", draw_cost(cost, names))
    data = layer_map(reports, names)
    drawing, grid = draw_map(data)
    layers = Figure("layers", "Layers by tasks", drawing)
    trade_offs = _trade_offs(reports, names, comparison)
    values = {
        "title": title,
        "tasks": len(reports),
        "base_parameters": count_text(reports[0].ledger.base_parameters),
        "base_bytes": bytes_text(cost.base),
        "own_bytes": bytes_text(sum(cost.own)),
        "own_share": percent_text(sum(cost.own) / cost.copies) if cost.copies else "none",
        "total_bytes": bytes_text(cost.total),
        "copies_bytes": bytes_text(cost.copies_total),
        "saved": cost.copies_total / cost.total if cost.total else 1.0,
        "estimated": any(r.base_bytes is None for r in reports),
        "overview": overview,
        "rows": task_rows(reports, names),
        "one_metric": _one_metric(reports),
        "totals": totals_row(reports),
        "layers": layers,
        "map_data": map_data(data, grid),
        "trainings": _trainings(reports, names),
        "open_tasks": OPEN_TASKS,
        "trade_offs": trade_offs,
    }
    write_page(Path(path), "report.html.j2", values)
    if figures is not None:
        drawings = [(f.name, f.drawing) for f in (overview, layers)]
        drawings += [(t.figure.name, t.figure.drawing) for t in trade_offs]
        for r, name in zip(reports, names, strict=True):
            if (curves := draw_task(r)) is not None:
                drawings.append((f"training-{name}", curves))
        write_figures(drawings, Path(figures))
    return Path(path)


def overview_figure(points: Sequence[Point], path: str | Path) -> Path:
    """Draw score against owned bytes by method, for instance for a README.

    Args:
        points: runs of methods; of their metrics the first one is drawn.
        path: a file ending in .png or .svg.

    Returns:
        The path of the file.

    Raises:
        DataError: no points, two points of one run, or another ending.
    """
    path = Path(path)
    if not points:
        raise DataError("A comparison needs points, found none.")
    if path.suffix.lower() not in (".png", ".svg"):
        raise DataError(f"A figure is a .png or .svg file, found '{path.name}'.")
    check_points(points)
    metric = metrics_of(points)[0]
    drawing = _compared(points, metric, None, width=860.0, height=440.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".svg":
        path.write_text(drawing.svg_file(), encoding="utf-8", newline="\n")
    else:
        save_png(drawing, path)
    return path


def _compared(
    points: Sequence[Point],
    metric: str,
    tasks: Sequence[str] | None,
    *,
    copy: float | None = None,
    width: float,
    height: float,
) -> Drawing:
    summaries = summarise(points, metric, tasks)
    better = next(p.higher_is_better for p in points if p.metric == metric)
    places = method_places(summaries)
    return draw_tradeoff(
        places,
        metric,
        higher_is_better=better,
        copy=copy,
        task=tasks[0] if tasks is not None else "",
        width=width,
        height=height,
    )


def _names(reports: Sequence[TaskReport]) -> list[str]:
    """Names of tasks; with the method where several reports have one name."""
    names = [r.name for r in reports]
    return [f"{r.name} ({r.method})" if names.count(r.name) > 1 else r.name for r in reports]


def _one_metric(reports: Sequence[TaskReport]) -> str:
    """The name of the primary score if all tasks have the same, else nothing."""
    primary = {r.primary[0] if r.primary else "" for r in reports}
    name = primary.pop()
    return "" if primary else name[:1].upper() + name[1:]


def _trainings(reports: Sequence[TaskReport], names: Sequence[str]) -> list[Training]:
    captions = {"loss": "loss", "score": "score", "gates": "what it owns"}
    found = []
    for r, name in zip(reports, names, strict=True):
        panels = draw_curves(r)
        if not panels:
            continue
        phases = [p for p in phases_of(r.history) if p[0]]
        said = ", ".join(f"{phase} {first + 1} to {last + 1}" for phase, first, last in phases)
        figures = tuple(
            Figure(f"{key}-{name}", f"{captions[key]} of {name}", panel)
            for key, panel in panels.items()
        )
        epochs = f"{len(r.history)} epoch" + ("s" if len(r.history) != 1 else "")
        summary = f"{epochs}; phases: {said}" if said else epochs
        found.append(Training(name, r.method, summary, figures))
    return found


def _trade_offs(
    reports: Sequence[TaskReport], names: Sequence[str], comparison: Sequence[Point]
) -> list[TradeOff]:
    copy = float(max(r.full_bytes for r in reports))
    found = []
    for metric in metrics_of(comparison):
        tasks = tasks_of(comparison, metric)
        summaries = summarise(comparison, metric)
        drawing = _compared(comparison, metric, None, copy=copy, width=860.0, height=440.0)
        mean = "mean of all tasks" if len(tasks) > 1 else tasks[0]
        by_task = [
            Figure(
                f"tradeoff-{metric}-{task}",
                task,
                _compared(comparison, metric, [task], copy=copy, width=430.0, height=300.0),
            )
            for task in (tasks if len(tasks) > 1 else ())
        ]
        figure = Figure(f"tradeoff-{metric}", f"{metric}, {mean}", drawing)
        rows = comparison_rows(summaries, pareto_front(summaries))
        found.append(TradeOff(metric, figure, tuple(by_task), rows, True))
    if comparison:
        return found
    by_metric: dict[str, list[Place]] = {}
    for r, name in zip(reports, names, strict=True):
        if r.primary is None or metric_text(*r.primary) == "not finite":
            continue
        metric, score = r.primary
        size, said = r.ledger.own_bytes, metric_text(metric, score)
        title = f"{name}: {said}{spread_text(metric, None)}, {bytes_text(size)}"
        by_metric.setdefault(metric, []).append(Place(name, size, score, title=title))
    for metric, places in by_metric.items():
        drawing = draw_tradeoff(places, metric, copy=copy)
        figure = Figure(f"tradeoff-{metric}", f"{metric} by task", drawing)
        found.append(TradeOff(metric, figure, (), [], False))
    return found
