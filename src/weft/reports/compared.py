"""A comparison and what a plan says of it, as data for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .plan_figure import Budget, Choice
from .records import Point, TaskReport
from .similarity import Similarity


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
