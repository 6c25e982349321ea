"""A depth per pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanAbsolutePercentageError

from weft.core.options import Options
from weft.core.task import Metric, Task
from weft.errors import ConfigError

from .dense import MaskedL1, at_target, check_map, with_channels
from .heads import DENSE_HEADS, DenseHead, MakeDense
from .metrics import OnPairs, PerBatch, ShareOf
from .options import VARIANTS, Variant


@final
@dataclass(frozen=True)
class KnownDepths:
    """Chooses the pixels whose depth is known: finite and above a minimum.

    Args:
        minimum: depths at or below it are unknown, >= 0.
    """

    minimum: float

    def __call__(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) outputs and (n,) targets."""
        resized = at_target(output, target)
        wanted = with_channels(target).to(resized.dtype)
        known = torch.isfinite(wanted) & (wanted > self.minimum)
        return resized[known], wanted[known]


@final
@dataclass(frozen=True)
class Within:
    """Whether depths d and g differ by less than a factor: max(d/g, g/d) < factor and d > 0.

    Args:
        factor: above 1.
    """

    factor: float

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """(n,) booleans, from (n,) outputs and (n,) positive targets."""
        # Without divisions, so that a depth of zero or below is never within.
        return (output < self.factor * target) & (target < self.factor * output)


@final
@dataclass(frozen=True)
class RatioAtMost:
    """Whether max(d/g, g/d) <= factor as it stands, which holds for every negative d.

    Args:
        factor: above 1.
    """

    factor: float

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """(n,) booleans, from (n,) outputs and (n,) positive targets."""
        return torch.maximum(output / target, target / output) <= self.factor


def Depth(*, minimum: float = 0.0, variant: Variant = "standard", head: DenseHead = "conv") -> Task:
    """A depth per pixel: mean absolute error where the depth is known.

    Args:
        minimum: targets at or below it, and those that are not finite, are unknown and count
            nowhere, neither in the loss nor in a metric; >= 0. AdaShare's code has 3e-5.
        variant: "standard", or "adashare" for the numbers that AdaShare's code prints (below).
        head: "conv" is one 1x1 convolution, "aspp" four dilated branches (see `DilatedBranches`).

    Returns:
        The task; targets have shape (rows, 1, H, W) or (rows, H, W). Outputs are (rows, 1, h, w) at
        the resolution of the features; loss and metrics resize them bilinearly to the targets.
        Metrics of depths d against g, over all known pixels of the set: "abs_error" mean of
        ``|d - g|``, "rel_error" mean of ``|d - g| / g``, and "delta_t" for t = 1, 2, 3, the share
        with ``max(d/g, g/d) < 1.25^t`` and d above zero.

    Raises:
        ConfigError: an option that cannot work.

    Differs from AdaShare's code, which trains at the resolution of the features against the nearest
    targets, averages both errors over batches by their rows, and lets every negative depth pass the
    tests of ratios. ``variant="adashare"`` measures in these last two ways.
    """
    if not minimum >= 0:
        raise ConfigError(f"Depth(minimum=...) is a number >= 0, found {minimum}.")
    given = Options("Depth", ConfigError)
    given.word("variant", variant, VARIANTS)
    given.word("head", head, DENSE_HEADS)
    pairs = KnownDepths(minimum)
    errors = {"abs_error": MeanAbsoluteError(), "rel_error": MeanAbsolutePercentageError()}
    metrics: dict[str, Metric] = {}
    for name, metric in errors.items():
        pooled = OnPairs(pairs, metric)
        metrics[name] = pooled if variant == "standard" else PerBatch(pooled)
    for power in (1, 2, 3):
        factor = 1.25**power
        test = Within(factor) if variant == "standard" else RatioAtMost(factor)
        metrics[f"delta_{power}"] = OnPairs(pairs, ShareOf(test))
    return Task(
        head=MakeDense(1, head),
        loss=MaskedL1(pairs),
        metric=metrics,
        check=check_map,
        spec={"kind": "depth", "minimum": minimum, "variant": variant, "head": head},
    )
