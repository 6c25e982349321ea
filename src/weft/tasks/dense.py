"""Numbers per pixel, such as keypoint or edge maps, and what all dense tasks have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError

from weft.core.options import Options
from weft.core.task import Task
from weft.errors import ConfigError, DataError

from .heads import DENSE_HEADS, DenseHead, MakeDense
from .metrics import OnPairs, Pairs


def at_target(output: Tensor, target: Tensor) -> Tensor:
    """The output at the height and width of the target.

    Args:
        output: (rows, channels, h, w).
        target: (rows, ..., H, W).

    Returns:
        (rows, channels, H, W) by bilinear interpolation, in single precision at least.
    """
    if output.dtype != torch.float64:
        output = output.float()
    if output.shape[-2:] == target.shape[-2:]:
        return output
    return F.interpolate(output, size=target.shape[-2:], mode="bilinear", align_corners=False)


def with_channels(target: Tensor) -> Tensor:
    """(rows, channels, H, W), where a target (rows, H, W) has one channel."""
    return target.unsqueeze(1) if target.dim() == 3 else target


def check_map(output: Tensor, target: Tensor) -> None:
    """Refuse targets that are no map with the rows and channels of the output.

    Args:
        output: (rows, channels, h, w).
        target: (rows, channels, H, W), or (rows, H, W) for one channel.

    Raises:
        DataError: says what was found.
    """
    rows, channels = output.shape[:2]
    if target.dim() not in (3, 4) or with_channels(target).shape[:2] != (rows, channels):
        short = f" or ({rows}, H, W)" if channels == 1 else ""
        raise DataError(
            f"Targets have shape ({rows}, {channels}, H, W){short}, found {tuple(target.shape)}."
        )


@final
@dataclass(frozen=True)
class MaskedL1:
    """The mean absolute error over the numbers that count; 0 where none does.

    Args:
        pairs: chooses them.
    """

    pairs: Pairs

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar."""
        chosen, wanted = self.pairs(output, target)
        return (chosen - wanted).abs().sum() / max(1, wanted.numel())


@final
@dataclass(frozen=True)
class ValidNumbers:
    """Chooses the numbers whose target is not the one that marks unknown places.

    Args:
        invalid: the mark; None if every target counts.
    """

    invalid: float | None

    def __call__(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) outputs and (n,) targets, from maps as `check_map` takes them."""
        resized = at_target(output, target)
        wanted = with_channels(target).to(resized.dtype)
        if self.invalid is None:
            return resized.flatten(), wanted.flatten()
        valid = wanted != self.invalid
        return resized[valid], wanted[valid]


@final
@dataclass(frozen=True)
class CheckNumbers:
    """Refuses targets that are no map of numbers.

    Args:
        pairs: the numbers that count, which are finite.
    """

    pairs: ValidNumbers

    def __call__(self, output: Tensor, target: Tensor) -> None:
        """Look at the targets of one batch.

        Raises:
            DataError: says what is wrong with them.
        """
        check_map(output, target)
        if target.is_floating_point() and not bool(torch.isfinite(target).all()):
            raise DataError(
                "Dense targets contain NaN or infinity. Fill unknown places with one number and "
                "say DenseRegression(invalid=...)."
            )


def DenseRegression(
    channels: int = 1, *, invalid: float | None = None, head: DenseHead = "conv"
) -> Task:
    """Numbers per pixel, for instance keypoint or edge maps: mean absolute error where known.

    Args:
        channels: numbers per pixel, >= 1.
        invalid: the target that marks places without one, for instance 255; None if there is no
            such place.
        head: "conv" is one 1x1 convolution, "aspp" four dilated branches (see `DilatedBranches`).

    Returns:
        The task; targets have shape (rows, channels, H, W), or (rows, H, W) for one channel.
        Outputs are (rows, channels, h, w) at the resolution of the features; loss and metric resize
        them bilinearly to the targets. The metric is "mae", the mean absolute error over all known
        places of the set.

    Raises:
        ConfigError: an option that cannot work.

    Differs from AdaShare's code, which trains at the resolution of the features against the nearest
    targets, and measures per batch, averaged by rows.
    """
    if channels < 1:
        raise ConfigError(f"DenseRegression needs at least 1 channel, found {channels}.")
    Options("DenseRegression", ConfigError).word("head", head, DENSE_HEADS)
    pairs = ValidNumbers(invalid)
    return Task(
        head=MakeDense(channels, head),
        loss=MaskedL1(pairs),
        metric={"mae": OnPairs(pairs, MeanAbsoluteError())},
        check=CheckNumbers(pairs),
        spec={
            "kind": "dense_regression",
            "channels": channels,
            "invalid": invalid,
            "head": head,
        },
    )
