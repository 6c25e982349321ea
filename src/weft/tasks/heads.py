"""Heads of the built-in tasks: a linear layer on pooled features, convolutions on feature maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from weft.errors import TaskError

DenseHead = Literal["conv", "aspp"]
"""What reads a feature map: one 1x1 convolution, or four dilated branches that are added."""

DENSE_HEADS: tuple[DenseHead, ...] = ("conv", "aspp")


@final
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
    """Features without places: (rows, C) from (rows, C), (rows, N, C) or (rows, C, H, W).

    Raises:
        TaskError: features of another number of axes.
    """
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


@final
class DilatedBranches(nn.Module):
    """The sum of four branches that look at different distances: the head of AdaShare's networks.

    Each branch is a 3x3 convolution of its dilation and two 1x1 convolutions, with ReLU and dropout
    between them (Chen et al., DeepLab, arXiv 1606.00915, where it is called ASPP-L).

    Args:
        features: channels of the feature map.
        outputs: channels of the output.
        hidden: channels inside a branch.
        dilations: one for each branch.
        dropout: in [0, 1).
    """

    def __init__(
        self,
        features: int,
        outputs: int,
        *,
        hidden: int = 1024,
        dilations: tuple[int, ...] = (6, 12, 18, 24),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(features, hidden, 3, padding=dilation, dilation=dilation),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Conv2d(hidden, hidden, 1),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Conv2d(hidden, outputs, 1),
            )
            for dilation in dilations
        )

    def forward(self, features: Tensor) -> Tensor:
        """(rows, outputs, H, W) from (rows, features, H, W)."""
        return torch.stack([branch(features) for branch in self.branches]).sum(0)


@final
@dataclass(frozen=True)
class MakePooledLinear:
    """Makes a `PooledLinear` for the features that it is given.

    Args:
        outputs: size of the output.
        squeeze: drop the last axis of a single output.
        zero: start from outputs that are zero.
        trains: whether the head learns.
    """

    outputs: int
    squeeze: bool = False
    zero: bool = False
    trains: bool = True

    def __call__(self, features: Tensor) -> nn.Module:
        """The head."""
        head = PooledLinear(pool(features).shape[1], self.outputs, squeeze=self.squeeze)
        if self.zero:
            nn.init.zeros_(head.linear.weight)
            nn.init.zeros_(head.linear.bias)
        return head.requires_grad_(self.trains)


@final
@dataclass(frozen=True)
class MakeDense:
    """Makes a head on the feature map that it is given; the output has the map's height and width.

    Args:
        outputs: channels of the output.
        kind: "conv" or "aspp".
    """

    outputs: int
    kind: DenseHead = "conv"

    def __call__(self, features: Tensor) -> nn.Module:
        """The head.

        Raises:
            TaskError: the features are no map.
        """
        if features.dim() != 4:
            raise TaskError(
                "A dense task reads a feature map (rows, C, H, W), but the base gives shape "
                f"{tuple(features.shape)}. Use a base without pooling, or choose the map with "
                "MultiTaskModel(..., output=...)."
            )
        if self.kind == "aspp":
            return DilatedBranches(features.shape[1], self.outputs)
        return nn.Conv2d(features.shape[1], self.outputs, 1)
