"""The page of a comparison: what each task should own, and what that was chosen from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compare import metrics_of, pareto_front, summarise, tasks_of
from .drawing import Drawing
from .epochs import draw_epochs
from .html import Figure, write_figures, write_page
from .layer_map import layer_map, map_data
from .map_drawing import draw_map
from .matrix import draw_matrix
from .numbers import bytes_text, count_text, metric_text, percent_text, spread_text
from .plan_figure import Budget, Choice, draw_plan
from .records import Point, TaskReport, check_points
from .similarity import Similarity, reordered, strongest
from .tradeoff import draw_tradeoff, method_places

OPEN_FIGURES = 8
"""So many small figures are unfolded."""

OPEN_OWNERS = 20
"""A plan of more tasks is told by method first, and task by task in a folded table."""


@dataclass(frozen=True)
class Owner:
    """What one task is to own.

    Args:
        task: its name.
        label: the method with its options.
        together: other tasks that it was trained together with.
        own_bytes: without its head.
        metric: name of its score.
        val: on validation.
        test: on test, None without test data.
        spread: standard deviation of ``test`` over seeds, None for a single seed.
    """

    task: str
    label: str
    together: tuple[str, ...]
    own_bytes: int
    metric: str
    val: float
    test: float | None
    spread: float | None


@dataclass(frozen=True)
class Answer:
    """What a plan says, for the head of the page.

    Args:
        budget: bytes for all tasks together.
        chosen_by: why this budget.
        owners: by task.
        budgets: the curve, this budget among it.
        at: the entry of this budget.
        shared_bytes: that the chosen tasks share beside the base.
        whole: the best single method of any size.
        metric: of the mean, with the split.
        higher_is_better: its direction.
        of: what of the tasks' scores is looked at.
    """

    budget: int
    chosen_by: str
    owners: tuple[Owner, ...]
    budgets: tuple[Budget, ...]
    at: Budget
    shared_bytes: int
    whole: Choice | None
    metric: str
    higher_is_better: bool
    of: str = "mean of all tasks"

    @property
    def split(self) -> str:
        """The split that is shown: "test", or "validation" where a choice has no test scores."""
        return self.metric.partition(" ")[0]


@dataclass(frozen=True)
class Owned:
    """What the tasks of one choice own.

    Args:
        name: of the choice.
        reports: one for each task.
        similarity: of what they changed; None where it cannot be told.
        why_not: then the reason; also tasks that it leaves out.
    """

    name: str
    reports: tuple[TaskReport, ...]
    similarity: Similarity | None
    why_not: str = ""


@dataclass(frozen=True)
class Compared:
    """A comparison as the page shows it.

    Args:
        tasks: names.
        seeds: of training.
        base: its name.
        base_bytes: of the base.
        base_parameters: of the base.
        tests: a point for each task, method and seed on test (validation where there is no test).
        vals: likewise on validation.
        rows: of the table of all choices.
        answer: what the plan says, or None.
        no_answer: then the reason.
        owned: maps of what tasks own.
        no_owned: why there are none.
        curves: by task, by method, the mean validation score after each epoch.
        failed: by cell, why it failed.
        missing: how many cells are not finished.
        left_out: by choice, why a plan cannot choose it.
        paragraph: how it was done, for a paper.
        bibtex: the works that it cites.
    """

    tasks: tuple[str, ...]
    seeds: tuple[int, ...]
    base: str
    base_bytes: int
    base_parameters: int
    tests: tuple[Point, ...]
    vals: tuple[Point, ...]
    rows: tuple[Mapping[str, Any], ...]
    answer: Answer | None
    no_answer: str
    owned: tuple[Owned, ...]
    no_owned: str
    curves: Mapping[str, Mapping[str, Sequence[float]]]
    paragraph: str
    bibtex: str
    failed: Mapping[str, str] = field(default_factory=dict)
    missing: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)


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
        "answer": None if answer is None else _answer_texts(answer),
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


def _answer_texts(answer: Answer) -> dict[str, Any]:
    """What the head of the page says."""
    plan, single = answer.at.plan, answer.at.single
    return {
        "budget": bytes_text(answer.budget),
        "takes": bytes_text(plan.bytes),
        "chosen_by": answer.chosen_by,
        "plan": _said(answer, plan),
        "plan_val": metric_text(answer.metric, plan.val),
        "single": None if single is None else single.said,
        "single_score": None if single is None else _said(answer, single),
        "single_bytes": None if single is None else bytes_text(single.bytes),
        "whole": None if answer.whole is None else answer.whole.said,
        "whole_score": None if answer.whole is None else _said(answer, answer.whole),
        "whole_bytes": None if answer.whole is None else bytes_text(answer.whole.bytes),
        "same": single is not None and {o.label for o in answer.owners} == {single.said},
        "by_method": _by_method(answer) if len(answer.owners) > OPEN_OWNERS else "",
        "verdict": verdict(answer),
        "metric": answer.metric,
        "split": answer.split,
        "of": answer.of,
        "shared": bytes_text(answer.shared_bytes) if answer.shared_bytes else "",
        "owners": [
            {
                "task": o.task,
                "label": o.label,
                "together": _others(o.together),
                "bytes": bytes_text(o.own_bytes),
                "bytes_value": o.own_bytes,
                "metric": o.metric,
                "val": metric_text(o.metric, o.val),
                "val_value": o.val,
                "test": "–" if o.test is None else metric_text(o.metric, o.test),
                "test_value": "" if o.test is None else o.test,
                "spread": spread_text(o.metric, o.spread),
            }
            for o in answer.owners
        ],
    }


def _by_method(answer: Answer) -> str:
    counts = Counter(owner.label for owner in answer.owners).most_common()
    return ", ".join(f"{label} for {n} task{'s' if n > 1 else ''}" for label, n in counts)


def _others(tasks: Sequence[str]) -> str:
    return ", ".join(tasks) if len(tasks) < 3 else f"{len(tasks)} other tasks"


def _said(answer: Answer, choice: Choice) -> str:
    text = metric_text(answer.metric, choice.test)
    return text + spread_text(answer.metric, choice.spread)


def verdict(answer: Answer) -> str:
    """Whether plans beat the best single method on test, over the budgets of the curve.

    A difference counts as one if it is larger than the standard deviation over seeds of either.
    """
    pairs = [(b.plan, b.single) for b in answer.budgets if b.single is not None]
    if not pairs:
        return "No single method covers all tasks, so there is nothing to compare the plan with."
    sign = 1.0 if answer.higher_is_better else -1.0
    gains = [
        (sign * (plan.test - single.test), max(plan.spread or 0.0, single.spread or 0.0))
        for plan, single in pairs
    ]
    better = sum(gain > spread for gain, spread in gains)
    worse = sum(gain < -spread for gain, spread in gains)
    same = len(gains) - better - worse
    gain = sum(gain for gain, _ in gains) / len(gains)
    points = f"{100 * gain:+.1f} points" if "accuracy" in answer.metric else f"{gain:+.3g}"
    count = f"{len(gains)} budgets" if len(gains) > 1 else "the one budget"
    return (
        f"Over {count}, a method for each task scores better on {answer.split} than the best "
        f"single method that fits at {better}, the same within the spread at {same}, and worse "
        f"at {worse}; {points} on average."
    )


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
