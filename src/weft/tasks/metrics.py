"""What the built-in tasks measure that torchmetrics has no metric for, and on which pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
import torchmetrics
from torch import Tensor, nn

Pairs = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From outputs and targets of a batch to those that count, pair by pair."""


class MeanOf(torchmetrics.Metric):
    """The mean of a quantity over all pairs of all batches; smaller is better.

    Args:
        quantity: function of outputs and targets to one number per pair.
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, quantity: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.quantity = quantity
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        values = self.quantity(output, target)
        self.total += values.sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """The mean; NaN if there was no pair."""
        return self.total / self.count


@final
class ShareOf(MeanOf):
    """The share of all pairs for which a condition holds, in 0..1; larger is better.

    Args:
        quantity: function of outputs and targets to whether it holds, for each pair.
    """

    higher_is_better = True


@final
class OnPairs(nn.Module):
    """A metric on those pairs of outputs and targets that count.

    Args:
        pairs: chooses them.
        metric: what is measured on them.
    """

    def __init__(self, pairs: Pairs, metric: torchmetrics.Metric) -> None:
        super().__init__()
        self.pairs = pairs
        self.metric = metric
        self.higher_is_better = metric.higher_is_better

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        self.metric.update(*self.pairs(output, target))

    def compute(self) -> Tensor:
        """The metric over all pairs since the last reset."""
        value: Tensor = self.metric.compute()
        return value

    def reset(self) -> None:
        """Forget all batches."""
        self.metric.reset()


@final
class PerBatch(nn.Module):
    """The mean over batches of a metric's value on each, weighted by their rows.

    It depends on how rows fall into batches. Only for comparison with published code that
    averages so. Batches on which the metric is not defined (NaN) are left out.

    Args:
        metric: what is measured on each batch.
    """

    def __init__(self, metric: torchmetrics.Metric | OnPairs) -> None:
        super().__init__()
        self.metric = metric
        self.higher_is_better = metric.higher_is_better
        self.reset()

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in one batch."""
        self.metric.reset()
        self.metric.update(output, target)
        value = float(self.metric.compute())
        if not math.isnan(value):
            self.total += value * len(target)
            self.rows += len(target)

    def compute(self) -> float:
        """The weighted mean; NaN if no batch counted."""
        return self.total / self.rows if self.rows else math.nan

    def reset(self) -> None:
        """Forget all batches."""
        self.metric.reset()
        self.total, self.rows = 0.0, 0
