"""Score against budget: the plan and the best single method at each of several budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.errors import ConfigError

from .budget import budget_in_bytes
from .knapsack import Objective, least_bytes, solve
from .plans import Plan, answer
from .questions import Question, question

if TYPE_CHECKING:
    import pandas as pd


def plan_curve(
    comparison: str | Path | pd.DataFrame,
    budgets: Sequence[int | str] | None = None,
    *,
    points: int = 9,
    objective: Objective = "mean",
    weights: Mapping[str, float] | None = None,
    heads: bool = False,
    max_seeds: int | None = None,
    relative_to: str | None = None,
) -> pd.DataFrame:
    """Plans at several budgets beside the best single method at each.

    Args:
        comparison: the folder of a comparison, or its table.
        budgets: as for `plan`; default from the least that covers every task up to where more
            bytes no longer help, evenly in their logarithm.
        points: how many budgets by default, >= 2.
        objective: as for `plan`.
        weights: as for `plan`.
        heads: as for `plan`.
        max_seeds: as for `plan`.
        relative_to: as for `plan`.

    Returns:
        A row for each budget: what plan and best single method take and score on validation and
        test (mean and standard deviation over seeds), and what the plan gains over it.

    Raises:
        PlanError: nothing fits a budget.
        ConfigError: a budget, objective or weight that cannot be.
        DataError: there is no comparison.
    """
    import pandas as pd

    asked, folder = question(
        comparison, objective, weights, heads=heads, max_seeds=max_seeds, relative_to=relative_to
    )
    if budgets is None:
        limits = sweep(asked, points)
    else:
        limits = [budget_in_bytes(budget, asked.choices.base_bytes) for budget in budgets]
    return pd.DataFrame([_row(answer(asked, limit, folder)) for limit in limits])


def sweep(asked: Question, points: int) -> list[int]:
    """Budgets from the least possible to where more no longer helps.

    Args:
        asked: the question.
        points: how many, >= 2; fewer if there are not as many different ones.

    Raises:
        ConfigError: too few points.
    """
    if points < 2:
        raise ConfigError(f"points: found {points}, expected at least 2.")
    items = [asked.item(choice) for choice in asked.choices.choices]
    least = least_bytes(items)
    chosen = solve(items, math.inf, asked.objective, asked.weights)
    assert chosen is not None
    most = sum(items[i].bytes for i in chosen)
    if most <= least:
        return [least]
    smallest = min(item.bytes for item in items if item.bytes > 0)
    low = max(least, min(smallest, most))
    spaced = [math.ceil(b) for b in np.geomspace(low, most, points if low == least else points - 1)]
    return sorted({least, *spaced[:-1], most})


def _row(made: Plan) -> dict[str, Any]:
    base = made.question.choices.base_bytes
    row: dict[str, Any] = {"budget_bytes": made.budget, "times_base": 1 + made.budget / base}
    for name, part in {"plan": made.chosen, "single": made.best_single}.items():
        val = (math.nan, math.nan) if part is None else part.val
        test = (math.nan, math.nan) if part is None or part.test is None else part.test
        row |= {
            f"{name}_bytes": math.nan if part is None else part.bytes,
            f"{name}_val": val[0],
            f"{name}_val_std": val[1],
            f"{name}_test": test[0],
            f"{name}_test_std": test[1],
        }
    row["single"] = None if made.best_single is None else made.best_single.name
    sign = made.question.sign
    for split in ("val", "test"):
        row[f"{split}_gain"] = sign * (row[f"plan_{split}"] - row[f"single_{split}"])
    row["methods"] = ", ".join(sorted({pick.label for pick in made.chosen.picks}))
    return row
