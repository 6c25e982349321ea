"""Accuracy against cost of a cascade, for every threshold that makes a difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.errors import DataError


@dataclass(frozen=True)
class Point:
    """What a cascade does at one threshold.

    Args:
        threshold: rows whose confidence is at least this leave.
        accuracy: share of rows that are right.
        multiply_adds: mean per row, over all stages that the row went through.
        shares: of the rows that leave at each stage.
    """

    threshold: float
    accuracy: float
    multiply_adds: float
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Accuracy against cost on one data set; choose on validation, report on test.

    Args:
        points: one for each threshold that treats some row differently, from the first stage alone
            to the last stage for every row.
    """

    points: tuple[Point, ...]

    def most_accurate(self, budget: float) -> Point:
        """The most accurate point within a budget; of equal ones the cheapest.

        Args:
            budget: multiply-adds per row, at most.

        Raises:
            DataError: even the cheapest point costs more.
        """
        within = [p for p in self.points if p.multiply_adds <= budget]
        if not within:
            cheapest = min(p.multiply_adds for p in self.points)
            raise DataError(
                f"No threshold keeps to {budget:g} multiply-adds a row; the first stage alone "
                f"costs {cheapest:g}."
            )
        return max(within, key=lambda p: (p.accuracy, -p.multiply_adds))

    def cheapest(self, tolerance: float = 0.0) -> Point:
        """The cheapest point that is about as accurate as the last stage for every row.

        Args:
            tolerance: accuracy that may be lost against that, >= 0, in shares of one.
        """
        enough = self.points[-1].accuracy - tolerance
        return min(
            (p for p in self.points if p.accuracy >= enough),
            key=lambda p: (p.multiply_adds, -p.accuracy),
        )


def sweep(confidence: Tensor, correct: Tensor, costs: Sequence[int]) -> Curve:
    """The curve of a cascade from what its stages say of every row.

    A row leaves at the first stage whose confidence is at least the threshold, so it goes beyond
    stage k exactly if the threshold exceeds the largest of its first k confidences. Counting those
    in order gives every point at once.

    Args:
        confidence: (rows, stages), float64.
        correct: (rows, stages), whether each stage is right.
        costs: multiply-adds of one row in each stage.

    Returns:
        A point for each interval of thresholds that treats all rows alike, with a threshold in its
        middle; at the ends 0 and 2.
    """
    rows, stages = confidence.shape
    highest = confidence[:, :-1].cummax(1).values
    values, place = highest.unique(return_inverse=True)  # ascending, of all rows and stages
    points = len(values) + 1
    # By stage and point, the rows that reach the stage, and those that are right where they leave.
    reached = [torch.full((points,), rows)]
    right = correct[:, 0].sum().expand(points).clone()
    for k in range(stages - 1):
        gain = correct[:, k + 1].long() - correct[:, k].long()
        after = place[:, k] + 1  # the first point at which the row goes beyond stage k
        right += torch.zeros(points, dtype=torch.long).index_add_(0, after, gain).cumsum(0)
        reached.append(torch.bincount(after, minlength=points).cumsum(0))
    spent = torch.stack([n * cost for n, cost in zip(reached, costs, strict=True)]).sum(0)
    leaving = torch.stack([*reached, torch.zeros(points, dtype=torch.long)]).diff(dim=0).neg().T
    middles = (values[1:] + values[:-1]) / 2
    # Between neighbouring numbers the middle is one of them: the upper one parts them, too.
    middles = torch.where(middles > values[:-1], middles, values[1:])
    thresholds = [0.0, *middles.tolist(), 2.0]
    return Curve(
        tuple(
            Point(threshold, r / rows, s / rows, tuple(n / rows for n in left))
            for threshold, r, s, left in zip(
                thresholds, right.tolist(), spent.tolist(), leaving.tolist(), strict=True
            )
        )
    )
