"""One yes or no per row, or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from torch import Tensor

from weft.core.options import Options
from weft.core.task import Metric, Task
from weft.errors import ConfigError, DataError

from .curves import AVERAGINGS, Averaging, auc_metric, flat_area, label_areas
from .heads import MakePooledLinear
from .metrics import ShareOf
from .options import class_names, plain_classes


@final
@dataclass(frozen=True)
class BinaryLoss:
    """The cross entropy of logits with targets in 0..1, the mean over rows and labels."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """A scalar."""
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


def right_side(logits: Tensor, target: Tensor) -> Tensor:
    """Whether each logit is on its target's side of probability one half."""
    return (logits > 0) == (target > 0.5)


@final
@dataclass(frozen=True)
class CheckBinary:
    """Refuses targets that are no 0 or 1 in the shape of the logits.

    Args:
        labels: how many there are.
    """

    labels: int

    def __call__(self, logits: Tensor, target: Tensor) -> None:
        """Look at the targets of one batch.

        Raises:
            DataError: says what is wrong with them.
        """
        if target.shape != logits.shape:
            raise DataError(
                f"Binary targets have the shape of the logits {tuple(logits.shape)}, "
                f"found {tuple(target.shape)}."
            )
        if target.numel() and (target.min() < 0 or target.max() > 1):
            raise DataError(
                f"Binary targets are 0 or 1, found {float(target.min())}..{float(target.max())}."
            )


def Binary(labels: int | Sequence[str] = 1, *, auc: Averaging | None = "pooled") -> Task:
    """One yes or no per row, or several independent ones (multi-label).

    Args:
        labels: how many, or their names.
        auc: how the area under the ROC curve is measured: "pooled" is the mean over the labels of
            one curve each over the whole set, whose outputs are kept for it; "per_batch" is what
            DynaShare's code computes, one curve per batch over all labels as if they were one,
            averaged over batches by their rows; None leaves it out.

    Returns:
        The task; targets are 0 or 1 of shape (rows,) for one label, else (rows, labels). Metrics
        are the accuracy at probability one half and the area under the curve.

    Raises:
        ConfigError: an option that cannot work.
    """
    Options("Binary", ConfigError).word("auc", auc, AVERAGINGS)
    names, count = class_names(labels, at_least=1)
    metrics: dict[str, Metric] = {"accuracy": ShareOf(right_side)}
    return Task(
        head=MakePooledLinear(count, squeeze=count == 1),
        loss=BinaryLoss(),
        metric=metrics | auc_metric(auc, pooled=label_areas, per_batch=flat_area),
        check=CheckBinary(count),
        spec={"kind": "binary", "labels": plain_classes(names, count), "auc": auc},
        classes=names,
    )
