"""Several tasks made into one set of tensors: an ordinary base that serves all their heads."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.sites import tensor_slots
from weft.core.state import TaskState
from weft.errors import ConfigError, DataError
from weft.methods.baselines import linear_probe
from weft.training import evaluate
from weft.training.evaluation import choosing_scores

from .rules import Rule, Vectors, ties, total
from .vectors import Base, Vector, base_of, check_tasks, task_vectors

SCALES = tuple(round(0.1 * i, 1) for i in range(1, 11))
"""Candidates for the scale of task vectors."""


@dataclass(frozen=True)
class Merged:
    """What came of merging.

    Args:
        model: the merged base with the head of every task; a model like any other, so it can be
            evaluated, stored in a bank and reported on.
        how: the rule.
        scale: of the merged direction.
        scores: by candidate scale, by task, the validation score; empty if none was chosen.
        baseline: likewise for task arithmetic, where another rule's scale was chosen.
        warnings: what to be wary of.
    """

    model: MultiTaskModel
    how: str
    scale: float
    scores: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    baseline: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def base(self) -> nn.Module:
        """The merged base."""
        return self.model.base


def merge(
    model: MultiTaskModel,
    tasks: Sequence[str] | None = None,
    *,
    how: Rule = "task_arithmetic",
    scale: float | Literal["choose"] | None = None,
    data: Mapping[str, Any] | None = None,
    scales: Sequence[float] = SCALES,
    density: float = 0.2,
) -> Merged:
    """Merge what tasks own into one base, without training.

    With tau_t = theta_t - theta_0 the vector of task t, the merged base is theta_0 + scale * d with

    - average: d = mean_t tau_t, and scale 1;
    - task_arithmetic: d = sum_t tau_t (Ilharco et al., ICLR 2023);
    - ties: d of `ties` (Yadav et al., NeurIPS 2023).

    Running statistics are averaged, with scale 1, by every rule; whole numbers stay the base's.
    Vectors are read one at a time: memory does not grow with the number of tasks.

    Args:
        model: holds the tasks; from a bank, ``bank.load(base)``. It is not changed.
        tasks: which to merge; default all.
        how: the rule.
        scale: of d; "choose" tries ``scales`` on ``data``. Default: 1 for "average" and a single
            task, else "choose" if there is data and 0.3 (task_arithmetic) or 1 (ties) if not.
        data: by task, validation batches; never test data.
        scales: what "choose" tries; the first of the best mean score over tasks is taken.
        density: share of entries that "ties" keeps of each task, in (0, 1].

    Returns:
        The merged model, and for a chosen scale the scores of all candidates, with those of task
        arithmetic beside them.

    Raises:
        TaskError: an unknown task.
        PlanError: a task has no plain form of the base's class.
        ConfigError: an option out of range.
        DataError: a scale is to be chosen without data of every task.
    """
    chosen = check_tasks(model, model.task_names if tasks is None else tasks)
    wanted = _default(how, scale, data, len(chosen))
    _check(how, wanted, density, scales, chosen, data)
    base = base_of(model)

    def vectors() -> Any:
        return task_vectors(model, chosen, base)

    direction, statistic = _direction(how, vectors, base, density, len(chosen))
    if isinstance(wanted, float):
        merged = merged_model(model, chosen, _tensors(base, direction, statistic, wanted))
        return Merged(merged, how, wanted)
    assert data is not None
    scores = _try(model, chosen, base, direction, statistic, scales, data)
    best = max(scales, key=lambda s: statistics.fmean(_signed(model, scores[s]).values()))
    baseline: dict[float, dict[str, float]] = {}
    if how != "task_arithmetic":
        plain, _ = _direction("task_arithmetic", vectors, base, density, len(chosen))
        baseline = _try(model, chosen, base, plain, statistic, scales, data)
    merged = merged_model(model, chosen, _tensors(base, direction, statistic, best))
    return Merged(merged, how, best, scores, baseline, _warnings(model, best, scores, baseline))


def _default(
    how: str, scale: float | str | None, data: Mapping[str, Any] | None, count: int
) -> float | str:
    if scale is not None:
        return scale if isinstance(scale, str) else float(scale)
    if how == "average" or count == 1:
        return 1.0
    return "choose" if data is not None else 1.0 if how == "ties" else 0.3


def _check(
    how: str,
    scale: float | str,
    density: float,
    scales: Sequence[float],
    tasks: Sequence[str],
    data: Mapping[str, Any] | None,
) -> None:
    rules = ("average", "task_arithmetic", "ties")
    if how not in rules:
        raise ConfigError(f"merge(how=...) is one of {', '.join(rules)}; found {how!r}.")
    if isinstance(scale, str) and scale != "choose":
        raise ConfigError(f"merge(scale=...) is a number or 'choose', found {scale!r}.")
    if isinstance(scale, float) and not math.isfinite(scale):
        raise ConfigError(f"merge(scale=...) is a finite number, found {scale}.")
    if not 0 < density <= 1:
        raise ConfigError(f"merge(density=...) is in (0, 1], found {density}.")
    if scale == "choose":
        missing = [task for task in tasks if task not in (data or {})]
        if missing:
            raise DataError(
                f"A scale is chosen on validation data of every task; {', '.join(missing)} has "
                "none. Give data={task: batches}, or a number as scale."
            )
        if not scales or not all(math.isfinite(s) for s in scales):
            raise ConfigError(f"merge(scales=...) are finite numbers, found {list(scales)}.")


def _direction(
    how: str, vectors: Vectors, base: Base, density: float, count: int
) -> tuple[Vector, Vector]:
    """The merged direction of the parameters, and the mean change of the statistics."""
    summed, _ = total(vectors)
    statistic = {name: summed[name] / count for name in base.statistics}
    if how == "ties":

        def parameters() -> Any:
            for task, vector in vectors():
                yield task, {name: vector[name] for name in base.parameters}

        return ties(parameters, density), statistic
    divide = count if how == "average" else 1
    return {name: summed[name] / divide for name in base.parameters}, statistic


def _tensors(base: Base, direction: Vector, statistic: Vector, scale: float) -> dict[str, Tensor]:
    merged = {n: t + scale * direction[n].to(t.dtype) for n, t in base.parameters.items()}
    return merged | {n: t + statistic[n].to(t.dtype) for n, t in base.statistics.items()}


def merged_model(
    source: MultiTaskModel, tasks: Sequence[str], tensors: Mapping[str, Tensor]
) -> MultiTaskModel:
    """The merged base under the heads of the tasks."""
    base = copy.deepcopy(source.base)
    with torch.no_grad():
        for name, table, attribute in tensor_slots(base):
            slot = table[attribute]
            if name in tensors and slot is not None:
                slot.copy_(tensors[name])
    plan = linear_probe(base)
    merged = MultiTaskModel(base, plan, example=source.example, output=source.output)
    for task in tasks:
        state = TaskState(source.tasks[task].task, plan, plan.patches, {})
        state.set_head(copy.deepcopy(source.head(task)))
        merged.install(task, state)
    return merged.train(source.training)


def _try(
    model: MultiTaskModel,
    tasks: Sequence[str],
    base: Base,
    direction: Vector,
    statistic: Vector,
    scales: Sequence[float],
    data: Mapping[str, Any],
) -> dict[float, dict[str, float]]:
    """By scale and task, the first metric on validation."""
    found = {}
    for scale in scales:
        merged = merged_model(model, tasks, _tensors(base, direction, statistic, scale))
        scores = evaluate(merged, {task: data[task] for task in tasks})
        found[scale] = {task: next(iter(scores[task].values())) for task in tasks}
    return found


def _signed(model: MultiTaskModel, scores: Mapping[str, float]) -> dict[str, float]:
    """Scores such that larger is better."""
    named = {
        task: {next(iter(model.tasks[task].task.metrics), "loss"): value}
        for task, value in scores.items()
    }
    return choosing_scores(model, named)


def _warnings(
    model: MultiTaskModel,
    best: float,
    scores: Mapping[float, Mapping[str, float]],
    baseline: Mapping[float, Mapping[str, float]],
) -> tuple[str, ...]:
    found = []
    if best == max(scores) and len(scores) > 1:
        found.append(f"The best scale is the largest that was tried, {best}: try larger ones.")
    if baseline:
        means = [
            max(statistics.fmean(_signed(model, s).values()) for s in tried.values())
            for tried in (scores, baseline)
        ]
        if means[1] > means[0]:
            found.append("Task arithmetic with a scale chosen likewise is better on validation.")
    return tuple(found)
