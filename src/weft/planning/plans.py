"""Plans: for each task one method with its options, the best that fits a budget of bytes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import yaml

from weft.comparing import open_fleet
from weft.comparing.files import put
from weft.errors import PlanError

from .budget import budget_in_bytes
from .choices import Choice
from .knapsack import Objective, least_bytes, solve
from .questions import Question, question

if TYPE_CHECKING:
    import pandas as pd


@final
@dataclass(frozen=True)
class Selection:
    """Choices that cover every task once.

    Args:
        name: the method with its options if it is one for all tasks, else "plan".
        picks: the choices.
        bytes: of all tasks together.
        val: mean and standard deviation over seeds of the objective on validation.
        test: likewise on test, None where a task has no test data.
    """

    name: str
    picks: tuple[Choice, ...]
    bytes: int
    val: tuple[float, float]
    test: tuple[float, float] | None


@final
@dataclass(frozen=True)
class Plan:
    """What each task should own within a budget.

    Args:
        budget: bytes that all tasks together may own.
        question: what was asked.
        chosen: the plan.
        singles: every method that covers all tasks, for comparison, the best on validation first.
        comparison: the folder of the comparison, None for a table.
    """

    budget: int
    question: Question
    chosen: Selection
    singles: tuple[Selection, ...]
    comparison: Path | None

    @property
    def best_single(self) -> Selection | None:
        """The method that is best on validation of those that fit the budget alone."""
        return next((s for s in self.singles if s.bytes <= self.budget), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        q = self.question
        return {
            "comparison": None if self.comparison is None else str(self.comparison),
            "directory": str(Path.cwd()),  # where relative paths in here are seen from
            "budget_bytes": self.budget,
            "base_bytes": q.choices.base_bytes,
            "counted": "own and shared bytes" + (" and heads" if q.heads else ", without heads"),
            "objective": q.objective,
            "weights": dict(q.weights),
            "relative_to": q.relative_to,
            "seeds": list(q.choices.seeds),
            "plan": _scores(self.chosen),
            "best_single": None if self.best_single is None else _scores(self.best_single),
            "tasks": {
                task: _line(pick, task, heads=q.heads)
                for task in q.choices.tasks
                for pick in self.chosen.picks
                if task in pick.tasks
            },
            "singles": [{**_scores(s), "fits": s.bytes <= self.budget} for s in self.singles],
            "left_out": dict(q.choices.left_out),
            "cells": self._documents(),
        }

    def _documents(self) -> dict[str, Any]:
        """By name, the cells that were picked, so that they can be trained from this alone."""
        if self.comparison is None:
            return {}
        known = {cell.name: cell for cell in open_fleet(self.comparison).cells}
        names = [
            pick.cells[pick.best_seed(heads=self.question.heads)] for pick in self.chosen.picks
        ]
        return {name: known[name].document() for name in names if name in known}

    def write(self, path: str | Path) -> Path:
        """Write the plan as YAML, or as JSON if the name ends so.

        Raises:
            TrainingError: it cannot be written.
        """
        file, content = Path(path), self.to_dict()
        if file.suffix == ".json":
            text = json.dumps(content, indent=1) + "\n"
        else:
            text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        put(file, text.encode())
        return file


def plan(
    comparison: str | Path | pd.DataFrame,
    budget: int | str,
    *,
    objective: Objective = "mean",
    weights: Mapping[str, float] | None = None,
    heads: bool = False,
    max_seeds: int | None = None,
    relative_to: str | None = None,
) -> Plan:
    """Choose what each task should own, best on validation within a budget for all together.

    The choice is exact. A method that trains tasks together is chosen for all of them or for none,
    and what they share counts once.

    Args:
        comparison: the folder of a comparison, or its table.
        budget: bytes; a size such as ``3MB``; or ``1.5x``, which counts the base itself.
        objective: "mean" of the validation scores, or the "worst" of them (then the mean).
        weights: by task, its weight in the mean, >= 0; default 1.
        heads: whether the bytes of heads count.
        max_seeds: use at most so many seeds of each cell, the first ones.
        relative_to: a method, by its label or its name alone. The objective is then about relative
            improvements over its scores, in percent and signed so that larger is better; without
            weights their mean is Delta_T (`weft.relative_improvement`). So tasks with different
            metrics can be planned for.

    Returns:
        The plan, with its test scores and every single method beside it.

    Raises:
        PlanError: nothing fits the budget (says the least that does), or a task has no results.
        ConfigError: a budget, objective or weight that cannot be.
        DataError: there is no comparison.
    """
    asked, folder = question(
        comparison, objective, weights, heads=heads, max_seeds=max_seeds, relative_to=relative_to
    )
    limit = budget_in_bytes(budget, asked.choices.base_bytes)
    return answer(asked, limit, folder)


def answer(asked: Question, budget: int, comparison: Path | None) -> Plan:
    """The plan for a budget in bytes.

    Raises:
        PlanError: nothing fits the budget.
    """
    choices = asked.choices.choices
    items = [asked.item(choice) for choice in choices]
    chosen = solve(items, budget, asked.objective, asked.weights)
    if chosen is None:
        least = least_bytes(items)
        # Rounded up, so that it would do.
        whole = 1 + math.ceil(1000 * least / max(asked.choices.base_bytes, 1)) / 1000
        raise PlanError(
            f"Nothing fits a budget of {budget:,} bytes: the least that covers every task takes "
            f"{least:,} bytes, or {whole:g}x with the base."
        )
    picks = [choices[i] for i in chosen]
    return Plan(budget, asked, selection(asked, "plan", picks), _singles(asked), comparison)


def selection(asked: Question, name: str, picks: Sequence[Choice]) -> Selection:
    """Choices with what they cost and score."""
    val = asked.score(picks, "val")
    assert val is not None
    cost = sum(pick.bytes(heads=asked.heads) for pick in picks)
    return Selection(name, tuple(picks), cost, val, asked.score(picks, "test"))


def _singles(asked: Question) -> tuple[Selection, ...]:
    """Each method that covers every task, the best on validation first, then the smallest."""
    by_label: dict[str, list[Choice]] = {}
    for choice in asked.choices.choices:
        by_label.setdefault(choice.label, []).append(choice)
    found = []
    for label, picks in by_label.items():
        covered = [task for pick in picks for task in pick.tasks]
        if sorted(covered) == sorted(asked.choices.tasks):
            found.append(selection(asked, label, picks))
    return tuple(sorted(found, key=lambda s: (-asked.sign * s.val[0], s.bytes)))


def _scores(chosen: Selection) -> dict[str, Any]:
    test = chosen.test or (None, None)
    return {
        "name": chosen.name,
        "bytes": chosen.bytes,
        "val": chosen.val[0],
        "val_std": chosen.val[1],
        "test": test[0],
        "test_std": test[1],
    }


def _line(pick: Choice, task: str, *, heads: bool) -> dict[str, Any]:
    """What a plan says about a task."""
    scores, place = pick.scores[task], pick.best_seed(heads=heads)
    return {
        "method": pick.method,
        "options": json.loads(pick.options),
        "train": json.loads(pick.train),
        "together_with": [other for other in pick.tasks if other != task],
        "metric": scores.metric,
        "val": statistics.fmean(scores.val),
        "test": statistics.fmean(scores.test) if scores.test else None,
        "own_bytes": max(scores.own_bytes),
        "head_bytes": max(scores.head_bytes),
        "shared_bytes": max(pick.shared_bytes),
        "seed": pick.seeds[place],
        "cell": pick.cells[place],
        "seed_val": scores.val[place],
        "seed_test": scores.test[place] if scores.test else None,
    }
