"""The scale of a merged direction, chosen on validation data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.core.model import MultiTaskModel
from weft.errors import DataError
from weft.training import evaluate
from weft.training.evaluation import together_scores

SCALES = tuple(round(0.1 * i, 1) for i in range(1, 11))
"""Candidates for the scale of task vectors."""


@dataclass(frozen=True)
class Tried:
    """What came of candidate scales.

    Args:
        scores: by scale, by task, the first metric.
        means: by scale, what chooses, larger is better and NaN is worst, as in `fit`: the mean of
            the tasks' metrics; where these differ, of minus their losses.
    """

    scores: Mapping[float, Mapping[str, float]]
    means: Mapping[float, float]

    @property
    def best(self) -> float:
        """The first scale of the best mean.

        Raises:
            DataError: no scale has scores that are numbers.
        """
        best = max(self.means, key=lambda scale: self.means[scale])
        if self.means[best] == -math.inf:
            raise DataError(
                f"No scale can be chosen: at each of {', '.join(f'{s:g}' for s in self.means)} the "
                "validation score of a task is NaN or infinite. Look at the tasks one by one with "
                "weft.evaluate(model, data), or give a number as scale."
            )
        return best


def try_scales(
    at: Callable[[float], MultiTaskModel], scales: Sequence[float], data: Mapping[str, Any]
) -> Tried:
    """Score the merged model at every scale.

    Args:
        at: merges at a scale.
        scales: the candidates.
        data: by task of the merged model, validation batches.
    """
    scores, means = {}, {}
    for scale in scales:
        model = at(scale)
        found = evaluate(model, data)
        scores[scale] = {task: next(iter(values.values())) for task, values in found.items()}
        together = together_scores(model, found, {}).values()
        means[scale] = statistics.fmean(-math.inf if math.isnan(s) else s for s in together)
    return Tried(scores, means)


def warnings(model: MultiTaskModel, tried: Tried, baseline: Tried | None) -> tuple[str, ...]:
    """What to be wary of in a choice.

    Args:
        model: the merged one.
        tried: with the rule itself.
        baseline: with task arithmetic, where the rule is another.
    """
    found = []
    names = {next(iter(model.tasks[t].task.metrics), "loss") for t in model.task_names}
    if len(names) > 1:
        found.append(
            f"The tasks' metrics differ ({', '.join(sorted(names))}), so their mean has no "
            "meaning: the scale has the least sum of losses."
        )
    best = tried.best
    if best == max(tried.means) and len(tried.means) > 1:
        found.append(f"The best scale is the largest that was tried, {best}: try larger ones.")
    if baseline is not None and max(baseline.means.values()) > tried.means[best]:
        found.append("Task arithmetic with a scale chosen likewise is better on validation.")
    return tuple(found)
