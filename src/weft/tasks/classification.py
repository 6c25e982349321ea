"""One of several classes per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from weft.core.options import Options
from weft.core.task import Metric, Task
from weft.errors import ConfigError, DataError

from .curves import AVERAGINGS, Averaging, auc_metric, class_areas, pair_areas
from .heads import MakePooledLinear
from .options import class_names, plain_classes


@final
@dataclass(frozen=True)
class CrossEntropy:
    """The cross entropy of logits (rows, classes, ...) with class indices.

    Args:
        smoothing: label smoothing in [0, 1).
    """

    smoothing: float = 0.0

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """A scalar."""
        return F.cross_entropy(logits, target.long(), label_smoothing=self.smoothing)


@final
@dataclass(frozen=True)
class CheckClasses:
    """Refuses targets that are no class indices.

    Args:
        classes: how many there are.
        ignore: the label of what has no class.
    """

    classes: int
    ignore: int | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> None:
        """Look at the targets of one batch.

        Raises:
            DataError: says what is wrong with them.
        """
        if target.is_floating_point():
            raise DataError(
                f"Class labels are integers 0..{self.classes - 1}, found {target.dtype}. "
                "Convert them with .long()."
            )
        if len(target) != len(logits):
            raise DataError(f"Found {len(target)} labels for {len(logits)} rows.")
        if target.dim() != logits.dim() - 1:
            raise DataError(
                f"Expected one class label per row or pixel, {logits.dim() - 1} axes; found "
                f"targets of shape {tuple(target.shape)}. Use indices, not one-hot vectors."
            )
        valid = target if self.ignore is None else target[target != self.ignore]
        if valid.numel() and (valid.min() < 0 or valid.max() >= self.classes):
            found = f"{int(valid.min())}..{int(valid.max())}"
            raise DataError(
                f"Labels are outside the classes: found {found}, expected 0..{self.classes - 1}. "
                "Correct the labels or the number of classes."
            )


def Classification(
    classes: int | Sequence[str],
    *,
    smoothing: float = 0.0,
    head_init: Literal["default", "zero"] = "default",
    head_trains: bool = True,
    auc: Averaging | None = None,
) -> Task:
    """One of several classes per row: linear head on pooled features, cross entropy, accuracy.

    Args:
        classes: how many, or their names in the order of the labels.
        smoothing: label smoothing in [0, 1).
        head_init: "zero" starts from equal logits, so that early gradients do not disturb the base.
        head_trains: False keeps the head at its random start, so that only what the task owns of
            the base learns. The head is still the task's and is stored with it.
        auc: also measure the area under the ROC curve, which keeps the outputs of the whole set:
            "pooled" is the mean over the classes that occur of each class against the rest;
            "per_batch" is what DynaShare's code computes, the mean over pairs of classes of each
            batch, averaged over batches by their rows.

    Returns:
        The task; targets are integers of shape (rows,).

    Raises:
        ConfigError: an option that cannot work.
    """
    if not 0.0 <= smoothing < 1.0:
        raise ConfigError(f"Classification(smoothing=...) is in [0, 1), found {smoothing}.")
    given = Options("Classification", ConfigError)
    given.word("head_init", head_init, ("default", "zero"))
    given.word("auc", auc, AVERAGINGS)
    if head_init == "zero" and not head_trains:
        raise ConfigError(
            "Classification(head_init='zero', head_trains=False) would give equal logits for "
            "ever, and no gradient. Leave head_init at 'default'."
        )
    names, count = class_names(classes, at_least=2)
    metrics: dict[str, Metric] = {"accuracy": MulticlassAccuracy(count, average="micro")}
    return Task(
        head=MakePooledLinear(count, zero=head_init == "zero", trains=head_trains),
        loss=CrossEntropy(smoothing),
        metric=metrics | auc_metric(auc, pooled=class_areas, per_batch=pair_areas),
        check=CheckClasses(count),
        spec={
            "kind": "classification",
            "classes": plain_classes(names, count),
            "smoothing": smoothing,
            "head_init": head_init,
            "head_trains": head_trains,
            "auc": auc,
        },
        classes=names,
    )
