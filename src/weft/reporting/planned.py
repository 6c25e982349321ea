"""The plan that the page of a comparison shows, with those of the budgets around it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from weft.comparing import Fleet
from weft.errors import ConfigError, DataError, PlanError
from weft.planning import Plan
from weft.planning.budget import budget_in_bytes
from weft.planning.choices import read_choices
from weft.planning.curve import sweep
from weft.planning.plans import Selection, answer
from weft.planning.questions import Question, question
from weft.reports.compared import Answer, Owner
from weft.reports.plan_figure import Budget, Choice

if TYPE_CHECKING:
    import pandas as pd

ENOUGH = 0.95
"""The share of what more bytes can gain on validation that the default budget must bring."""


@dataclass(frozen=True)
class Planned:
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


def planned(
    frame: pd.DataFrame, fleet: Fleet | None, budget: int | str | None
) -> tuple[Planned | None, str, Mapping[str, str]]:
    """The plan to show, or why there is none, and what plans cannot choose.

    Args:
        frame: the table of the comparison.
        fleet: its folder, if it has one.
        budget: that is asked for, if any; as for `weft.plan`.

    Raises:
        PlanError: nothing fits the budget that is asked for.
        ConfigError: the budget is none.
    """
    source = frame if fleet is None else fleet.root
    stated = {} if fleet is None else _stated(fleet.root)
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
        return None, str(error), _left_out(frame, fleet)
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
    return Planned(plan, said, curve, many), "", asked.choices.left_out


def _left_out(frame: pd.DataFrame, fleet: Fleet | None) -> Mapping[str, str]:
    seeds = None if fleet is None else fleet.comparison.seeds
    try:
        return read_choices(frame, seeds=seeds).left_out
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
