"""One training step as a module: the unit that DistributedDataParallel wraps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.core.model import MultiTaskModel
from weft.errors import TrainingError


class TrainingStep(nn.Module):
    """Owns everything that trains; one forward over ``{task: (x, y)}`` per step.

    Args:
        model: the model.
        weights: by task, a factor on the loss; default 1.
    """

    def __init__(self, model: MultiTaskModel, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model = model
        self.weights = dict(weights)

    def forward(
        self, batches: Mapping[str, tuple[Any, Any]], charge: Mapping[str, float]
    ) -> dict[str, Any]:
        """``{"total": ..., "losses": {task: ...}, "penalty": ...}`` of one step.

        The total is the sum of the tasks' losses and the penalty: what to differentiate.

        Args:
            batches: by task, inputs and targets.
            charge: by task, the factor on its plan's penalties.
        """
        step = self.model.step({task: x for task, (x, _) in batches.items()}, charge=charge)
        losses: dict[str, Tensor] = {}
        for task, (_, y) in batches.items():
            description = self.model.tasks[task].task
            if description.check is not None:
                description.check(step.outputs[task], y)
            losses[task] = description.loss(step.outputs[task], y)
        weighted = [losses[task] * self.weights.get(task, 1.0) for task in losses]
        total = torch.stack([loss.reshape(()) for loss in weighted]).sum() + step.penalty
        return {"total": total, "losses": losses, "penalty": step.penalty}


def check_finite(
    result: Mapping[str, Any], batches: Mapping[str, tuple[Any, Any]], step: int
) -> None:
    """Stop a run whose loss is not a number, before it reaches any parameter.

    Raises:
        TrainingError: names the step, the task, and what to try.
    """
    if bool(torch.isfinite(result["total"])):
        return
    for task, loss in result["losses"].items():
        if bool(torch.isfinite(loss)):
            continue
        inputs = pytree.tree_leaves(batches[task][0])
        bad = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
        if any(not bool(torch.isfinite(t).all()) for t in bad):
            raise TrainingError(
                f"The inputs of '{task}' at step {step} contain NaN or infinity. "
                "Clean the data; the model is back at its last complete epoch."
            )
        raise TrainingError(
            f"The loss of '{task}' at step {step} is {float(loss)}. Try a lower learning rate, "
            "gradient clipping (clip=1.0), a warm-up, or full precision; the model is back at "
            "its last complete epoch."
        )
    raise TrainingError(
        f"The penalty at step {step} is {float(result['penalty'])}. Try a lower learning rate."
    )
