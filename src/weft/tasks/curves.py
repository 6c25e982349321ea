"""Areas under ROC curves: of labels, of classes against the rest, of pairs of classes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Literal, final

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat

from .metrics import PerBatch

Averaging = Literal["pooled", "per_batch"]
"""One curve over the whole set, or the mean of a curve per batch."""

AVERAGINGS: tuple[Averaging | None, ...] = ("pooled", "per_batch", None)


@final
class AreaUnderCurve(torchmetrics.Metric):
    """The mean of some areas under ROC curves, each over the whole set; keeps all outputs.

    Areas that are not defined, because a label never or always holds, are left out; if all are, the
    value is NaN.

    Args:
        areas: function of logits and targets to the areas, NaN where one is not defined.
    """

    higher_is_better = True
    full_state_update = False
    logits: list[Tensor]
    targets: list[Tensor]

    def __init__(self, areas: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.areas = areas
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        self.logits.append(logits.detach())
        self.targets.append(target)

    def compute(self) -> Tensor:
        """The mean area, in 0..1."""
        # In double precision confident probabilities keep their order.
        logits = dim_zero_cat(self.logits).cpu().double()
        targets = dim_zero_cat(self.targets).cpu()
        areas = self.areas(logits, targets)
        return areas[~areas.isnan()].mean()


def area(scores: Tensor, positive: Tensor) -> Tensor:
    """The probability that a positive has a larger score than a negative, ties counting one half.

    Args:
        scores: (rows,) numbers of which only the order matters.
        positive: (rows,) whether each row is a positive.

    Returns:
        A scalar; NaN without both positives and negatives.
    """
    if positive.all() or not positive.any():
        return torch.tensor(float("nan"), dtype=scores.dtype)
    if scores.isnan().any():
        return scores.new_tensor(float("nan"))
    # torchmetrics takes a sigmoid of whatever is not in [0, 1], which rounds large logits to one.
    # Ranks in [0, 1] keep the order of any numbers.
    ranks = scores.unique(return_inverse=True)[1].double()
    return binary_auroc(ranks / len(ranks), positive.long(), validate_args=False)


def label_areas(logits: Tensor, target: Tensor) -> Tensor:
    """(labels,): the area of each label, from (rows,) or (rows, labels)."""
    columns = logits.reshape(len(logits), -1).T, target.reshape(len(target), -1).T > 0.5
    return torch.stack([area(s, p) for s, p in zip(*columns, strict=True)])


def flat_area(logits: Tensor, target: Tensor) -> Tensor:
    """(1,): one area over all rows and labels as if they were one label ("micro")."""
    return area(logits.flatten(), target.flatten() > 0.5)[None]


def class_areas(logits: Tensor, target: Tensor) -> Tensor:
    """(classes,): of each class's probability, the class against all others."""
    probability = logits.softmax(1)
    return torch.stack([area(p, target == c) for c, p in enumerate(probability.T)])


def pair_areas(logits: Tensor, target: Tensor) -> Tensor:
    """(pairs of classes,): on the rows of two classes, the mean area of either's probability.

    Source: Hand and Till, A Simple Generalisation of the Area Under the ROC Curve, 2001.
    """
    probability = logits.softmax(1)
    areas = []
    for a, b in combinations(range(logits.shape[1]), 2):
        rows = (target == a) | (target == b)
        of_a, is_a = probability[rows], target[rows] == a
        areas.append((area(of_a[:, a], is_a) + area(of_a[:, b], ~is_a)) / 2)
    return torch.stack(areas)


def auc_metric(
    averaging: Averaging | None,
    pooled: Callable[[Tensor, Tensor], Tensor],
    per_batch: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, AreaUnderCurve | PerBatch]:
    """``{"auc": metric}``, or nothing.

    Args:
        averaging: how the set is divided; None for no metric.
        pooled: the areas of "pooled".
        per_batch: the areas of "per_batch".
    """
    if averaging is None:
        return {}
    if averaging == "pooled":
        return {"auc": AreaUnderCurve(pooled)}
    return {"auc": PerBatch(AreaUnderCurve(per_batch))}
