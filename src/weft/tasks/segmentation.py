"""A class per pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor

from weft.core.options import Options
from weft.core.task import Metric, Task
from weft.errors import ConfigError

from .classification import CheckClasses
from .dense import at_target
from .heads import DENSE_HEADS, DenseHead, MakeDense
from .metrics import PerBatch, ShareOf
from .options import VARIANTS, Variant, class_names, plain_classes


@final
@dataclass(frozen=True)
class PixelCrossEntropy:
    """The mean cross entropy over labelled pixels; 0 where there is none.

    Args:
        ignore: the label of pixels without a class.
    """

    ignore: int

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """A scalar, from logits (rows, classes, h, w) and labels (rows, H, W)."""
        target = target.long()
        kept = (target != self.ignore).sum().clamp(min=1)
        resized = at_target(logits, target)
        return F.cross_entropy(resized, target, ignore_index=self.ignore, reduction="sum") / kept


class MeanIoU(torchmetrics.Metric):
    """Mean over classes of intersection over union, pooled over the whole set.

    Classes that occur neither in labels nor in predictions are left out; a class that occurs and
    is never right counts as 0.

    Args:
        classes: how many.
        ignore: the label of pixels without a class.
    """

    higher_is_better = True
    full_state_update = False
    confusion: Tensor

    def __init__(self, classes: int, ignore: int) -> None:
        super().__init__()
        self.classes, self.ignore = classes, ignore
        zeros = torch.zeros(classes, classes, dtype=torch.long)
        self.add_state("confusion", zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in logits (rows, classes, h, w) and labels (rows, H, W)."""
        predicted = at_target(logits, target).argmax(1)
        valid = target != self.ignore
        pairs = target[valid].long() * self.classes + predicted[valid]
        counts = torch.bincount(pairs, minlength=self.classes**2)
        self.confusion += counts.reshape(self.classes, self.classes)

    def counted(self, hits: Tensor, union: Tensor) -> Tensor:  # noqa: ARG002
        """Which classes are averaged over, from (classes,) pixels that are right and in either."""
        return union > 0

    def compute(self) -> Tensor:
        """The mean, in 0..1; NaN if no class counts."""
        hits = self.confusion.diag().float()
        union = self.confusion.sum(0) + self.confusion.sum(1) - self.confusion.diag()
        counted = self.counted(hits, union)
        return (hits[counted] / union[counted]).mean()


@final
class MeanIoUWithHits(MeanIoU):
    """The same over classes with at least one pixel that is right: flatters weak models."""

    def counted(self, hits: Tensor, union: Tensor) -> Tensor:  # noqa: ARG002
        """Which classes are averaged over."""
        return hits > 0


@final
@dataclass(frozen=True)
class RightPixels:
    """Whether each labelled pixel is right.

    Args:
        ignore: the label of pixels that do not count; None if all below the number of classes do.
    """

    ignore: int | None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """(n,) booleans, from logits (rows, classes, h, w) and labels (rows, H, W)."""
        right = at_target(logits, target).argmax(1) == target
        kept = target < logits.shape[1] if self.ignore is None else target != self.ignore
        return right[kept]


def Segmentation(
    classes: int | Sequence[str],
    *,
    ignore: int = 255,
    variant: Variant = "standard",
    head: DenseHead = "conv",
) -> Task:
    """A class per pixel: a head on a feature map, logits resized to the labels.

    Args:
        classes: how many, or their names.
        ignore: the label of pixels without a class ("void"), which count nowhere.
        variant: "standard", or "adashare" for the numbers that AdaShare's code prints (below).
        head: "conv" is one 1x1 convolution, "aspp" four dilated branches (see `DilatedBranches`).

    Returns:
        The task; targets are integers of shape (rows, H, W), outputs logits (rows, classes, h, w)
        at the resolution of the features; loss and metrics resize them bilinearly to the labels.
        Metrics over all labelled pixels of the set: "miou", the mean intersection over union of the
        classes that occur in labels or predictions, and "pixel_accuracy".

    Raises:
        ConfigError: an option that cannot work.

    Differs from AdaShare's code, which trains at the resolution of the features against the nearest
    labels; leaves classes without a pixel that is right out of the mean, instead of counting them
    as 0; and averages pixel accuracy over batches by their rows, where void pixels with a label
    below 0 (as of Cityscapes) count as wrong. ``variant="adashare"`` measures in these last ways.
    """
    given = Options("Segmentation", ConfigError)
    given.word("variant", variant, VARIANTS)
    given.word("head", head, DENSE_HEADS)
    names, count = class_names(classes, at_least=2)
    metrics: dict[str, Metric]
    if variant == "standard":
        metrics = {
            "miou": MeanIoU(count, ignore),
            "pixel_accuracy": ShareOf(RightPixels(ignore)),
        }
    else:
        metrics = {
            "miou": MeanIoUWithHits(count, ignore),
            "pixel_accuracy": PerBatch(ShareOf(RightPixels(None))),
        }
    return Task(
        head=MakeDense(count, head),
        loss=PixelCrossEntropy(ignore),
        metric=metrics,
        check=CheckClasses(count, ignore),
        spec={
            "kind": "segmentation",
            "classes": plain_classes(names, count),
            "ignore": ignore,
            "variant": variant,
            "head": head,
        },
        classes=names,
    )
