"""How much better many tasks are than single-task references, in one number."""

from __future__ import annotations

import math
from collections.abc import Mapping

from weft.errors import ConfigError, DataError, close_matches

HIGHER = frozenset(
    {
        *("accuracy", "auc", "miou", "pixel_accuracy", "delta_1", "delta_2", "delta_3"),
        *("within_11.25", "within_22.5", "within_30"),
    }
)
"""Metrics of the built-in tasks of which more is better."""

LOWER = frozenset({"mse", "mae", "abs_error", "rel_error", "mean_angle", "median_angle"})
"""Metrics of the built-in tasks of which less is better."""

Table = Mapping[str, Mapping[str, float]]
"""Scores by task and metric, as `evaluate` gives them."""


def relative_improvement(
    scores: Table, reference: Table, *, lower_is_better: Mapping[str, bool] | None = None
) -> float:
    """The mean relative improvement of tasks over references ("Delta_T"), in percent.

    For task i with metrics M_i, where s_j is 1 if less of metric j is better, else 0::

        Delta_i = 100 / |M_i| * sum_j (-1)^s_j * (score_ij - reference_ij) / reference_ij
        Delta_T = mean of Delta_i over tasks

    So each task weighs the same, however many metrics it has.

    Args:
        scores: by task and metric, as `evaluate` gives them.
        reference: the same of the references, for instance each task trained alone. It says which
            metrics count; "loss" never does.
        lower_is_better: by metric, whether less of it is better; only for metrics that no built-in
            task has.

    Returns:
        Percent; above zero is better than the references.

    Raises:
        DataError: other tasks or fewer metrics than in the reference, a score that is not finite,
            or a reference that is not above zero.
        ConfigError: a metric of one's own whose direction is not stated.

    Source: Maninis, Radosavovic, Kokkinos, Attentive Single-Tasking of Multiple Tasks, CVPR 2019;
    with several metrics per task: Sun et al., AdaShare, NeurIPS 2020.
    """
    if not reference or set(scores) != set(reference):
        raise DataError(
            f"Scores are of {', '.join(scores) or 'no task'}, the reference of "
            f"{', '.join(reference) or 'no task'}; expected the same tasks."
        )
    stated = {**dict.fromkeys(HIGHER, False), **dict.fromkeys(LOWER, True)}
    stated.update(lower_is_better or {})
    by_task = [_of_task(task, scores[task], reference[task], stated) for task in reference]
    return math.fsum(by_task) / len(by_task)


def _of_task(
    task: str,
    scores: Mapping[str, float],
    reference: Mapping[str, float],
    lower_is_better: Mapping[str, bool],
) -> float:
    changes = []
    for metric, single in reference.items():
        if metric == "loss":
            continue
        if metric not in scores:
            hint = close_matches(metric, scores) or f" It has: {', '.join(scores)}."
            raise DataError(f"'{task}' has no score '{metric}', which the reference has.{hint}")
        if metric not in lower_is_better:
            raise ConfigError(
                f"Is less of '{metric}' (of '{task}') better? Say "
                f"lower_is_better={{{metric!r}: True}} or False."
                + close_matches(metric, lower_is_better)
            )
        if not (math.isfinite(scores[metric]) and math.isfinite(single) and single > 0):
            raise DataError(
                f"'{metric}' of '{task}' is {scores[metric]} against {single}; expected a number "
                "against a reference above zero."
            )
        change = (scores[metric] - single) / single
        changes.append(-change if lower_is_better[metric] else change)
    if not changes:
        raise DataError(f"The reference of '{task}' has no metric.")
    return 100 * math.fsum(changes) / len(changes)
