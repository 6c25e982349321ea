"""The multiple-choice knapsack with joint items, solved exactly.

Every task is covered by exactly one chosen item; an item covers one task or several; the bytes of
the chosen items stay within the budget. Each question is one mixed-integer linear program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from weft.errors import PlanError

Objective = Literal["mean", "worst"]

SCALE = 1e4
"""Values are scaled to this span: the solver's absolute tolerance is 1e-6."""


@final
@dataclass(frozen=True)
class Item:
    """Something that can be chosen.

    Args:
        values: by task that it covers, the score; larger is better.
        bytes: what it costs, >= 0.
    """

    values: Mapping[str, float]
    bytes: int


def solve(
    items: Sequence[Item],
    budget: float,
    objective: Objective = "mean",
    weights: Mapping[str, float] | None = None,
) -> list[int] | None:
    """The best choice within a budget; among equally good ones the one of fewest bytes.

    Args:
        items: what can be chosen; the tasks are those that they cover.
        budget: most bytes in all; may be infinite.
        objective: "mean" of the tasks' scores, or the "worst" of them and then the mean.
        weights: by task, its weight in the mean, >= 0; default 1.

    Returns:
        Positions of the chosen items, in order; None if nothing fits the budget.

    Raises:
        PlanError: the items cannot cover each task exactly once.
    """
    allowed = list(range(len(items)))
    if objective == "worst":
        allowed = _good_enough(items, budget)
    elif least_bytes(items) > budget:
        allowed = []
    if not allowed:
        return None
    regrets = _regrets([items[i] for i in allowed], weights or {})
    while True:
        chosen, values = [items[i] for i in allowed], _scaled(-regrets)
        best = _program(chosen, -values, budget)
        assert best is not None
        # An item of more regret than a whole choice is in no better one. Without such items the
        # solver's tolerance is small beside the differences that are left.
        kept = np.flatnonzero(regrets <= regrets[best].sum())
        if len(kept) == len(allowed):
            break
        allowed, regrets = [allowed[i] for i in kept], regrets[kept]
    least = float(values[best].sum())
    tightest = _program(chosen, _bytes(chosen), budget, values=values, least=least)
    # Numerically the second question may just miss the first one's answer.
    return [allowed[i] for i in (best if tightest is None else tightest)]


def _regrets(items: Sequence[Item], weights: Mapping[str, float]) -> np.ndarray[Any, Any]:
    """How much less than the best of each task an item's tasks score, weighted; >= 0."""
    best: dict[str, float] = {}
    for item in items:
        for task, value in item.values.items():
            best[task] = max(value, best.get(task, -math.inf))
    return np.array(
        [sum(weights.get(t, 1.0) * (best[t] - v) for t, v in i.values.items()) for i in items]
    )


def least_bytes(items: Sequence[Item]) -> int:
    """The bytes of the smallest choice that covers every task.

    Raises:
        PlanError: there is none.
    """
    chosen = _program(items, _bytes(items), math.inf)
    if chosen is None:
        raise PlanError(
            "The cells cannot cover every task exactly once: cells that train several tasks "
            "together overlap, and no others cover the rest. Run weft compare for more methods."
        )
    return sum(items[i].bytes for i in chosen)


def _good_enough(items: Sequence[Item], budget: float) -> list[int]:
    """The items of the highest worst score that fits the budget; empty if nothing fits."""
    if least_bytes(items) > budget:
        return []
    tasks = _tasks(items)
    levels = sorted({value for item in items for value in item.values.values()})
    low, high = 0, len(levels) - 1  # the lowest level fits
    while low < high:
        middle = (low + high + 1) // 2
        kept = [i for i in items if min(i.values.values()) >= levels[middle]]
        chosen = _program(kept, _bytes(kept), budget) if _tasks(kept) == tasks else None
        low, high = (low, middle - 1) if chosen is None else (middle, high)
    return [i for i, item in enumerate(items) if min(item.values.values()) >= levels[low]]


def _tasks(items: Sequence[Item]) -> list[str]:
    return sorted({task for item in items for task in item.values})


def _bytes(items: Sequence[Item]) -> np.ndarray[Any, Any]:
    return np.array([item.bytes for item in items], dtype=float)


def _scaled(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Values over the solver's tolerance: a factor for all, which changes no choice."""
    return values * (SCALE / max(float(np.abs(values).max()), 1e-300))


def _program(
    items: Sequence[Item],
    cost: np.ndarray[Any, Any],
    budget: float,
    *,
    values: np.ndarray[Any, Any] | None = None,
    least: float = -math.inf,
) -> list[int] | None:
    """The cover of least cost within the budget, and of so much value at least; None if none is.

    The solver works to tolerances; a choice that it takes for affordable and that is not, in whole
    bytes, is forbidden, and the solver asked again.
    """
    tasks = {task: row for row, task in enumerate(_tasks(items))}
    entries = [(tasks[task], i) for i, item in enumerate(items) for task in item.values]
    rows, columns = zip(*entries, strict=True)
    cover = csr_array((np.ones(len(rows)), (rows, columns)), shape=(len(tasks), len(items)))
    constraints = [LinearConstraint(cover, 1, 1)]
    sizes = _bytes(items)
    unit = max(float(sizes.max()), 1.0)
    if math.isfinite(budget):
        constraints.append(LinearConstraint((sizes / unit)[None, :], -np.inf, budget / unit))
    if values is not None:
        constraints.append(LinearConstraint(values[None, :], least - 1e-6, np.inf))
    scale = max(float(np.abs(cost).max()), 1e-300)
    while True:
        answer = milp(
            cost * (SCALE / scale),
            integrality=np.ones(len(items)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if answer.x is None:
            if answer.status == 2:  # infeasible
                return None
            raise PlanError(f"The solver gave up: {answer.message}")
        chosen = [int(i) for i in np.flatnonzero(np.round(answer.x))]
        if sum(items[i].bytes for i in chosen) <= budget:
            return chosen
        taken = np.zeros((1, len(items)))
        taken[0, chosen] = 1
        constraints.append(LinearConstraint(taken, -np.inf, len(chosen) - 1))
