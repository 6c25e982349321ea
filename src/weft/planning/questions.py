"""What is asked of a comparison: the objective, what counts, and whether it means anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from weft.comparing import open_fleet
from weft.errors import ConfigError, close_matches

from .choices import Choice, Choices, read_choices
from .knapsack import Item, Objective

if TYPE_CHECKING:
    import pandas as pd


@final
@dataclass(frozen=True)
class Question:
    """What is asked of a comparison.

    Args:
        choices: what can be chosen.
        objective: "mean" of the tasks' validation scores, or the "worst" of them.
        weights: by task, its weight in the mean; default 1.
        heads: whether the bytes of heads count.
    """

    choices: Choices
    objective: Objective
    weights: Mapping[str, float]
    heads: bool

    def item(self, choice: Choice) -> Item:
        """A choice as the solver sees it."""
        values = {t: s.sign * statistics.fmean(s.val) for t, s in choice.scores.items()}
        return Item(values, choice.bytes(heads=self.heads))

    def score(self, picks: Sequence[Choice], split: str) -> tuple[float, float] | None:
        """Mean and standard deviation over seeds of what the objective is about.

        The objective is taken of scores that are means over seeds; the deviation is that of the
        objective seed by seed (0 for one seed).

        Args:
            picks: choices that cover every task once.
            split: "val" or "test".

        Returns:
            None where a task has no such scores.
        """
        scores = {t: s for pick in picks for t, s in pick.scores.items()}
        values = {t: s.val if split == "val" else s.test for t, s in scores.items()}
        if not all(values.values()):
            return None
        signed = {t: [scores[t].sign * v for v in values[t]] for t in values}
        sign = next(iter(scores.values())).sign
        mean = sign * self._objective({t: statistics.fmean(v) for t, v in signed.items()})
        seeds = range(len(self.choices.seeds))
        by_seed = [self._objective({t: v[place] for t, v in signed.items()}) for place in seeds]
        return mean, statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0

    def _objective(self, values: Mapping[str, float]) -> float:
        if self.objective == "worst":
            return min(values.values())
        weights = {task: self.weights.get(task, 1.0) for task in values}
        return sum(weights[t] * v for t, v in values.items()) / sum(weights.values())


def question(
    comparison: str | Path | pd.DataFrame,
    objective: Objective,
    weights: Mapping[str, float] | None,
    *,
    heads: bool,
    max_seeds: int | None,
) -> tuple[Question, Path | None]:
    """Read a comparison and check what is asked of it; arguments as for `plan`.

    Returns:
        The question, and the folder of the comparison if it has one.
    """
    if isinstance(comparison, (str, Path)):
        fleet = open_fleet(comparison)
        stated = fleet.comparison
        choices = read_choices(
            fleet.table(), tasks=tuple(stated.tasks), seeds=stated.seeds, max_seeds=max_seeds
        )
        folder: Path | None = fleet.root
    else:
        choices, folder = read_choices(comparison, max_seeds=max_seeds), None
    asked = Question(choices, objective, dict(weights or {}), heads)
    _check(asked)
    return asked, folder


def _check(asked: Question) -> None:
    """Refuse objectives that mean nothing.

    Raises:
        ConfigError: says which, and what to do.
    """
    tasks = asked.choices.tasks
    if asked.objective not in ("mean", "worst"):
        raise ConfigError(f"objective: found '{asked.objective}', expected mean or worst.")
    for task, weight in asked.weights.items():
        if task not in tasks:
            raise ConfigError(f"weights: there is no task '{task}'.{close_matches(task, tasks)}")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"weights: '{task}' has {weight}, expected a number >= 0.")
    if asked.objective == "worst" and asked.weights:
        raise ConfigError("weights belong to the mean; the worst of the tasks has none.")
    if sum(asked.weights.get(task, 1.0) for task in tasks) == 0:
        raise ConfigError("weights: all are 0, expected one that is not.")
    metrics = {s.metric for choice in asked.choices.choices for s in choice.scores.values()}
    signs = {s.sign for choice in asked.choices.choices for s in choice.scores.values()}
    unlike = len(metrics) > 1 or len(signs) > 1
    if unlike and (asked.objective == "worst" or set(asked.weights) < set(tasks)):
        raise ConfigError(
            f"The tasks are scored by different metrics, {', '.join(sorted(metrics))}, of which a "
            "mean or a worst means nothing. Give each task a weight."
        )
    if len(signs) > 1:
        raise ConfigError("Of some tasks a larger score is better, of others a smaller one.")
