"""What is asked of a comparison: the objective, what counts, and whether it means anything."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from weft.comparing import open_fleet
from weft.errors import ConfigError, close_matches

from .choices import Choice, Choices, Scores, Split, read_choices
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
        relative_to: the label of a method; scores then count as improvements over its.
        references: by task, its scores by that method; empty without one.
    """

    choices: Choices
    objective: Objective
    weights: Mapping[str, float]
    heads: bool
    relative_to: str | None = None
    references: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def sign(self) -> float:
        """-1 if a smaller objective is better, else 1; improvements are better the larger."""
        if self.relative_to is not None:
            return 1.0
        return next(iter(self.choices.choices[0].scores.values())).sign

    def item(self, choice: Choice) -> Item:
        """A choice as the solver sees it."""
        values = {t: statistics.fmean(self._good(t, s, "val")) for t, s in choice.scores.items()}
        return Item(values, choice.bytes(heads=self.heads))

    def score(self, picks: Sequence[Choice], split: Split) -> tuple[float, float] | None:
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
        if not all(s.on(split) for s in (*scores.values(), *self.references.values())):
            return None
        good = {t: self._good(t, s, split) for t, s in scores.items()}
        mean = self.sign * self._objective({t: statistics.fmean(v) for t, v in good.items()})
        seeds = range(len(self.choices.seeds))
        by_seed = [self._objective({t: v[place] for t, v in good.items()}) for place in seeds]
        return mean, statistics.stdev(by_seed) if len(by_seed) > 1 else 0.0

    def _good(self, task: str, scores: Scores, split: Split) -> list[float]:
        """A task's scores by seed, larger is better: improvements in percent, or scores."""
        signed = [scores.sign * value for value in scores.on(split)]
        if task not in self.references:
            return signed
        reference = statistics.fmean(self.references[task].on(split))
        return [100 * (value - scores.sign * reference) / reference for value in signed]

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
    relative_to: str | None = None,
) -> tuple[Question, Path | None]:
    """Read a comparison and check what is asked of it; arguments as for `plan`.

    Returns:
        The question, and the folder of the comparison if it has one.
    """
    if isinstance(comparison, (str, Path)):
        fleet = open_fleet(comparison)
        stated = fleet.comparison
        choices = read_choices(
            fleet.table(),
            tasks=tuple(stated.tasks),
            seeds=stated.seeds,
            max_seeds=max_seeds,
            expected=[(cell.label, cell.tasks) for cell in fleet.cells],
        )
        folder: Path | None = fleet.root
    else:
        choices, folder = read_choices(comparison, max_seeds=max_seeds), None
    label, references = _references(choices, relative_to)
    asked = Question(choices, objective, dict(weights or {}), heads, label, references)
    _check(asked)
    return asked, folder


def _references(choices: Choices, relative_to: str | None) -> tuple[str | None, dict[str, Scores]]:
    """The label of the method that scores are compared with, and its scores by task.

    Raises:
        ConfigError: there is no such method, or it does not say enough.
    """
    if relative_to is None:
        return None, {}
    labels = list(dict.fromkeys(choice.label for choice in choices.choices))
    found = [label for label in labels if label == relative_to]
    if not found:
        methods = {choice.label: choice.method for choice in choices.choices}
        found = [label for label in labels if methods[label] == relative_to]
    if len(found) != 1:
        what = "several are" if found else "there is none"
        hint = f" Labels: {', '.join(found or labels)}.{close_matches(relative_to, labels)}"
        raise ConfigError(f"relative_to: found '{relative_to}', expected one method; {what}.{hint}")
    scores = {
        t: s for choice in choices.choices if choice.label == found[0]
        for t, s in choice.scores.items()
    }  # fmt: skip
    for task in choices.tasks:
        if task not in scores:
            raise ConfigError(
                f"relative_to: '{found[0]}' has no complete results for '{task}'. Compare it on "
                "all tasks, or name another method."
            )
        for split in ("val", "test"):
            values = scores[task].on(split)
            if values and not statistics.fmean(values) > 0:
                raise ConfigError(
                    f"relative_to: '{task}' scores {statistics.fmean(values):g} by '{found[0]}' on "
                    f"{split}; a relative improvement needs a number above zero. Name another "
                    "method."
                )
    return found[0], scores


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
    if asked.relative_to is not None:
        return
    metrics = {s.metric for choice in asked.choices.choices for s in choice.scores.values()}
    signs = {s.sign for choice in asked.choices.choices for s in choice.scores.values()}
    named = ", ".join(sorted(metrics))
    instead = "compare with one of the methods: relative_to, --relative-to full_finetune"
    if len(signs) > 1:
        raise ConfigError(
            f"The tasks are scored by different metrics, {named}. Of some a larger score is "
            f"better, of others a smaller one, so no sum means anything. To count improvements, "
            f"{instead}."
        )
    weighted = asked.objective == "mean" and set(asked.weights) >= set(tasks)
    if len(metrics) > 1 and not weighted:
        raise ConfigError(
            f"The tasks are scored by different metrics, {named}, of which a mean or a worst means "
            f"nothing. Give each task a weight, or {instead}."
        )
