"""A budget for gates: the price of scores moves until what is open fits, then the best set stays.

The constrained problem is min loss subject to sum_i c_i g_i <= B with c_i the cost of gate i. Its
Lagrangian charges every gate p c_i; dual ascent raises the price p while more is open than B and
lowers it while less is. Gates are whole layers, so the price alone only comes near: at the end the
set of gates with the largest scores that fits is chosen exactly (a knapsack).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.errors import PlanError

RATE = 0.05
"""How much the logarithm of the price moves in one step, at most."""

USED = 0.9
"""The share of the budget that the final set uses at least, where a set of layers can."""

GRID = 4096
"""Steps in which costs are counted when the final set is chosen."""


@dataclass(frozen=True)
class Budget:
    """What gates cost and how much a task may own.

    Args:
        scores: keys of the gates' scores.
        costs: of the gates, elements or bytes.
        fixed: what a task owns in any case.
        most: what a task may own, in the same unit.
        threshold: scores at or over it are open.
        price: key of a task's price.
    """

    scores: tuple[str, ...]
    costs: tuple[int, ...]
    fixed: int
    most: int
    threshold: float
    price: str

    def check(self, unit: str) -> None:
        """Refuse a budget that what is owned in any case exceeds.

        Raises:
            PlanError: names the smallest budget.
        """
        if self.fixed > self.most:
            raise PlanError(
                f"The budget is {self.most:,} {unit}, but normalisation alone, which a task always "
                f"owns, takes {self.fixed:,}. Give at least that."
            )

    def open(self, own: Mapping[str, Tensor]) -> Tensor:
        """Which gates are open, (gates,) bool."""
        return torch.stack([own[key] for key in self.scores]) >= self.threshold


@dataclass(frozen=True)
class DualAscent:
    """A transition after every step: log p += RATE * clip((owned - B) / B, -1, 1), for each task.

    Args:
        budget: costs and the bound.
    """

    budget: Budget

    def __call__(
        self,
        model: MultiTaskModel,  # noqa: ARG002
        own: Mapping[str, Mapping[str, Tensor]],
        gradients: Mapping[str, Mapping[str, Tensor | None]],  # noqa: ARG002
    ) -> None:
        budget = self.budget
        for tensors in own.values():
            opened = budget.open(tensors).tolist()
            owned = budget.fixed + sum(c for c, o in zip(budget.costs, opened, strict=True) if o)
            excess = (owned - budget.most) / budget.most
            tensors[budget.price].mul_(math.exp(RATE * min(max(excess, -1.0), 1.0)))


@dataclass(frozen=True)
class ChooseWithin:
    """A preparation: opens the set of gates with the largest scores that fits, closes the others.

    Args:
        budget: costs and the bound.
    """

    budget: Budget

    @torch.no_grad()
    def __call__(self, model: MultiTaskModel, data: Mapping[str, Iterable[Any]]) -> None:
        budget = self.budget
        for task in data:
            own = model.tasks[task].own
            values = [float(own[key]) - budget.threshold for key in budget.scores]
            chosen = best_within(values, budget.costs, budget.most - budget.fixed)
            for place, key in enumerate(budget.scores):
                open_, score = place in chosen, own[key]
                if (values[place] >= 0.0) != open_:
                    # As far over or under the threshold as half precision can tell.
                    score.fill_(budget.threshold + (0.05 if open_ else -0.05) * budget.threshold)


def best_within(values: Sequence[float], costs: Sequence[int], most: int) -> set[int]:
    """The set with the largest sum of values whose cost is between ``USED * most`` and ``most``.

    Where no set reaches that, the one that comes nearest to it from below. Exact where the
    costs' common divisor divides the bound into at most ``GRID`` steps, else up to rounding each
    cost up to a ``GRID``-th of the bound.

    Args:
        values: of the items, any sign.
        costs: of the items, >= 0.
        most: the bound, >= 0.

    Returns:
        The places of the chosen items.
    """
    whole = math.gcd(*costs)
    exact = 0 < most <= GRID * whole
    steps = most // whole if exact else GRID
    unit = whole if exact else max(most / GRID, 1e-12)
    rounded = [math.ceil(cost / unit - 1e-9) if cost else 0 for cost in costs]
    best = np.full(steps + 1, -np.inf)
    best[0] = 0.0
    taken = np.zeros((len(values), steps + 1), dtype=bool)
    for item, (value, cost) in enumerate(zip(values, rounded, strict=True)):
        if cost > steps:
            continue
        with_it = np.full(steps + 1, -np.inf)
        with_it[cost:] = best[: steps + 1 - cost] + value
        taken[item] = with_it > best
        best = np.maximum(best, with_it)
    reachable = np.flatnonzero(best > -np.inf)
    enough = reachable[reachable * unit >= USED * most]
    place = int(enough[best[enough].argmax()] if len(enough) else reachable[-1])
    chosen = set()
    for item in range(len(values) - 1, -1, -1):
        if taken[item, place]:
            chosen.add(item)
            place -= rounded[item]
    return chosen
