"""Real numbers per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError

from weft.core.options import Options
from weft.core.task import Metric, Task
from weft.errors import ConfigError, DataError

from .heads import MakePooledLinear


@final
@dataclass(frozen=True)
class RegressionLoss:
    """The mean squared or absolute error.

    Args:
        kind: "mse" or "l1".
    """

    kind: Literal["mse", "l1"]

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """A scalar."""
        loss = F.mse_loss if self.kind == "mse" else F.l1_loss
        return loss(output, target.to(output.dtype))


@final
@dataclass(frozen=True)
class CheckRegression:
    """Refuses targets that are no numbers in the shape of the outputs."""

    def __call__(self, output: Tensor, target: Tensor) -> None:
        """Look at the targets of one batch.

        Raises:
            DataError: says what is wrong with them.
        """
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
        targets: how many numbers, >= 1.
        loss: squared or absolute error.

    Returns:
        The task; targets have shape (rows,) for one number, else (rows, targets). The best epoch
        has the least mean squared (or absolute) error.

    Raises:
        ConfigError: an option that cannot work.
    """
    Options("Regression", ConfigError).word("loss", loss, ("mse", "l1"))
    if targets < 1:
        raise ConfigError(f"Regression needs at least 1 target, found {targets}.")
    metrics: dict[str, Metric] = {"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}
    if loss == "l1":  # the first metric chooses the best epoch
        metrics = dict(reversed(metrics.items()))
    return Task(
        head=MakePooledLinear(targets, squeeze=targets == 1),
        loss=RegressionLoss(loss),
        metric=metrics,
        check=CheckRegression(),
        spec={"kind": "regression", "targets": targets, "loss": loss},
    )
