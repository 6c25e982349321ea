"""Built-in tasks: heads, losses and metrics for the usual kinds of labels.

Each function returns a `Task` whose ``spec`` brings it back from a file. Heads and losses are
modules and classes of this file, so models with them pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from .core.task import Task
from .errors import ConfigError, DataError, TaskError, close_matches

# ------------------------------------------------------------------------------- heads


class PooledLinear(nn.Module):
    """A linear layer on features that are pooled first if they have places.

    (rows, C, H, W) is averaged over H and W; (rows, N, C) over N; (rows, C) is used as it is.

    Args:
        features: C.
        outputs: size of the output.
        squeeze: drop the last axis of a single output.
    """

    def __init__(self, features: int, outputs: int, *, squeeze: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs)
        self.squeeze = squeeze

    def forward(self, features: Tensor) -> Tensor:
        """(rows, outputs), or (rows,) when squeezed."""
        output: Tensor = self.linear(pool(features))
        return output.squeeze(-1) if self.squeeze else output


def pool(features: Tensor) -> Tensor:
    """Features without places: (rows, C) from (rows, C), (rows, N, C) or (rows, C, H, W)."""
    if features.dim() == 4:
        return features.mean((2, 3))
    if features.dim() == 3:
        return features.mean(1)
    if features.dim() == 2:
        return features
    raise TaskError(
        f"The built-in head reads features of 2, 3 or 4 axes, found shape {tuple(features.shape)}. "
        "Choose another output of the base, MultiTaskModel(..., output=...), or give an own head."
    )


@dataclass(frozen=True)
class _MakePooledLinear:
    outputs: int
    squeeze: bool = False
    zero: bool = False

    def __call__(self, features: Tensor) -> nn.Module:
        head = PooledLinear(pool(features).shape[1], self.outputs, squeeze=self.squeeze)
        if self.zero:
            nn.init.zeros_(head.linear.weight)
            nn.init.zeros_(head.linear.bias)
        return head


@dataclass(frozen=True)
class _MakeConvolution:
    outputs: int

    def __call__(self, features: Tensor) -> nn.Module:
        if features.dim() != 4:
            raise TaskError(
                "Segmentation reads a feature map (rows, C, H, W), but the base gives shape "
                f"{tuple(features.shape)}. Use a base without pooling, or choose the map with "
                "MultiTaskModel(..., output=...)."
            )
        return nn.Conv2d(features.shape[1], self.outputs, 1)


# ------------------------------------------------------------------------ classification


@dataclass(frozen=True)
class _CrossEntropy:
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target.long(), label_smoothing=self.smoothing)


@dataclass(frozen=True)
class _CheckClasses:
    classes: int
    ignore: int | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> None:
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
) -> Task:
    """One of several classes per row: linear head on pooled features, cross entropy, accuracy.

    Args:
        classes: how many, or their names in the order of the labels.
        smoothing: label smoothing in [0, 1).
        head_init: "zero" starts from equal logits, so that early gradients do not disturb the base.

    Returns:
        The task; targets are integers of shape (rows,).
    """
    if not 0.0 <= smoothing < 1.0:
        raise ConfigError(f"Classification(smoothing=...) is in [0, 1), found {smoothing}.")
    if head_init not in ("default", "zero"):
        raise ConfigError(
            f"Classification(head_init=...) is 'default' or 'zero', found {head_init!r}."
        )
    names, count = _class_names(classes, at_least=2)
    return Task(
        head=_MakePooledLinear(count, zero=head_init == "zero"),
        loss=_CrossEntropy(smoothing),
        metric={"accuracy": torchmetrics.classification.MulticlassAccuracy(count, average="micro")},
        check=_CheckClasses(count),
        spec=_spec("classification", names or count, smoothing=smoothing, head_init=head_init),
        classes=names,
    )


# -------------------------------------------------------------------------------- binary


class _BinaryMetric(torchmetrics.Metric):
    """Accuracy of logits against 0/1 targets at the threshold 0."""

    higher_is_better = True
    full_state_update = False
    right: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        self.right += ((logits > 0) == (target > 0.5)).sum()
        self.count += target.numel()

    def compute(self) -> Tensor:
        return self.right / self.count


@dataclass(frozen=True)
class _BinaryLoss:
    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype))


@dataclass(frozen=True)
class _CheckBinary:
    labels: int

    def __call__(self, logits: Tensor, target: Tensor) -> None:
        if target.shape != logits.shape:
            raise DataError(
                f"Binary targets have the shape of the logits {tuple(logits.shape)}, "
                f"found {tuple(target.shape)}."
            )
        if target.numel() and (target.min() < 0 or target.max() > 1):
            raise DataError(
                f"Binary targets are 0 or 1, found {float(target.min())}..{float(target.max())}."
            )


def Binary(labels: int | Sequence[str] = 1) -> Task:
    """One yes or no per row, or several independent ones (multi-label).

    Args:
        labels: how many, or their names.

    Returns:
        The task; targets are 0 or 1 of shape (rows,) for one label, else (rows, labels). Metrics
        are the accuracy at probability one half and, for one label, the area under the curve.
    """
    names, count = _class_names(labels, at_least=1)
    metrics: dict[str, torchmetrics.Metric] = {"accuracy": _BinaryMetric()}
    if count == 1:
        metrics["auc"] = _AreaUnderCurve()
    return Task(
        head=_MakePooledLinear(count, squeeze=count == 1),
        loss=_BinaryLoss(),
        metric=metrics,
        check=_CheckBinary(count),
        spec=_spec("binary", names or count),
        classes=names,
    )


class _AreaUnderCurve(torchmetrics.classification.BinaryAUROC):
    """The area under the ROC curve of logits against 0/1 targets."""

    def update(self, logits: Tensor, target: Tensor) -> None:
        # torchmetrics guesses for each batch whether it holds probabilities; logits that all lie
        # in [0, 1] would be mixed with the probabilities of other batches. Only their order
        # matters, and this map into (0, 1) keeps it where a sigmoid would round to one.
        super().update(0.5 + 0.5 * F.softsign(logits.float()), target.long())


# ---------------------------------------------------------------------------- regression


@dataclass(frozen=True)
class _RegressionLoss:
    kind: Literal["mse", "l1"]

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss if self.kind == "mse" else F.l1_loss
        return loss(output, target.to(output.dtype))


@dataclass(frozen=True)
class _CheckRegression:
    def __call__(self, output: Tensor, target: Tensor) -> None:
        if target.shape != output.shape:
            raise DataError(
                f"Regression targets have the shape of the outputs {tuple(output.shape)}, "
                f"found {tuple(target.shape)}."
            )
        if not bool(torch.isfinite(target).all()):
            raise DataError("Regression targets contain NaN or infinity. Drop or fill these rows.")


def Regression(targets: int = 1, *, loss: Literal["mse", "l1"] = "mse") -> Task:
    """Real numbers per row: linear head on pooled features.

    Args:
        targets: how many numbers.
        loss: squared or absolute error.

    Returns:
        The task; targets have shape (rows,) for one number, else (rows, targets). The best epoch
        has the least mean squared (or absolute) error.
    """
    if loss not in ("mse", "l1"):
        raise ConfigError(f"Regression(loss=...) is 'mse' or 'l1', found {loss!r}.")
    if targets < 1:
        raise ConfigError(f"Regression needs at least 1 target, found {targets}.")
    metrics: dict[str, torchmetrics.Metric] = {
        "mse": torchmetrics.MeanSquaredError(),
        "mae": torchmetrics.MeanAbsoluteError(),
    }
    if loss == "l1":  # the first metric chooses the best epoch
        metrics = dict(reversed(metrics.items()))
    return Task(
        head=_MakePooledLinear(targets, squeeze=targets == 1),
        loss=_RegressionLoss(loss),
        metric=metrics,
        check=_CheckRegression(),
        spec=_spec("regression", targets, key="targets", loss=loss),
    )


# -------------------------------------------------------------------------- segmentation


def _at_labels(logits: Tensor, target: Tensor) -> Tensor:
    """Logits (rows, classes, h, w) resized to the labels' height and width."""
    if logits.shape[-2:] == target.shape[-2:]:
        return logits
    return F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class _SegmentationLoss:
    ignore: int

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        # A batch without a single labelled pixel has no loss, not a NaN.
        target = target.long()
        kept = (target != self.ignore).sum().clamp(min=1)
        resized = _at_labels(logits, target)
        return F.cross_entropy(resized, target, ignore_index=self.ignore, reduction="sum") / kept


class _MeanIoU(torchmetrics.Metric):
    """Mean over classes of intersection over union, pooled over the whole set.

    Classes that occur neither in labels nor in predictions are left out; a class that occurs and
    is never right counts as 0.
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
        predicted = _at_labels(logits, target).argmax(1)
        valid = target != self.ignore
        pairs = target[valid].long() * self.classes + predicted[valid]
        counts = torch.bincount(pairs, minlength=self.classes**2)
        self.confusion += counts.reshape(self.classes, self.classes)

    def compute(self) -> Tensor:
        hits = self.confusion.diag().float()
        union = self.confusion.sum(0) + self.confusion.sum(1) - self.confusion.diag()
        present = union > 0
        return (hits[present] / union[present]).mean()


class _PixelAccuracy(_MeanIoU):
    """Share of labelled pixels that are right."""

    def compute(self) -> Tensor:
        return self.confusion.diag().sum().float() / self.confusion.sum().clamp(min=1)


def Segmentation(classes: int | Sequence[str], *, ignore: int = 255) -> Task:
    """A class per pixel: 1x1 convolution on a feature map, logits resized to the labels.

    Args:
        classes: how many, or their names.
        ignore: the label of pixels without a class.

    Returns:
        The task; targets are integers of shape (rows, H, W), outputs logits (rows, classes, h, w)
        at the resolution of the features.
    """
    names, count = _class_names(classes, at_least=2)
    return Task(
        head=_MakeConvolution(count),
        loss=_SegmentationLoss(ignore),
        metric={"miou": _MeanIoU(count, ignore), "pixel_accuracy": _PixelAccuracy(count, ignore)},
        check=_CheckClasses(count, ignore),
        spec=_spec("segmentation", names or count, ignore=ignore),
        classes=names,
    )


# --------------------------------------------------------------------------- descriptions

KINDS: dict[str, Callable[..., Task]] = {
    "classification": Classification,
    "binary": Binary,
    "regression": Regression,
    "segmentation": Segmentation,
}


def task_from_spec(spec: Mapping[str, Any]) -> Task:
    """A built-in task from its description, for instance ``{"kind": "binary", "labels": 3}``.

    Raises:
        ConfigError: an unknown kind or option, with close matches.
    """
    options = dict(spec)
    kind = options.pop("kind", None)
    if kind not in KINDS:
        raise ConfigError(
            f"There is no kind of task {kind!r}. Kinds: {', '.join(KINDS)}."
            + close_matches(str(kind), KINDS)
        )
    try:
        return KINDS[kind](**options)
    except TypeError as error:
        raise ConfigError(f"Task of kind '{kind}': {error}.") from None


def _spec(kind: str, count: int | tuple[str, ...], key: str = "", **options: Any) -> dict[str, Any]:
    key = key or ("labels" if kind == "binary" else "classes")
    return {"kind": kind, key: count if isinstance(count, int) else list(count), **options}


def _class_names(
    classes: int | Sequence[str], *, at_least: int
) -> tuple[tuple[str, ...] | None, int]:
    names = None if isinstance(classes, int) else tuple(str(c) for c in classes)
    count = classes if isinstance(classes, int) else len(classes)
    if count < at_least:
        raise ConfigError(f"Expected at least {at_least} classes or labels, found {count}.")
    if names is not None and len(set(names)) != len(names):
        raise ConfigError(f"Class names repeat: {', '.join(names)}.")
    return names, count
