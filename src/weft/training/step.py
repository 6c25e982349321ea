"""One training step as a module: the unit that DistributedDataParallel wraps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.model import MultiTaskModel
from weft.core.task import Task
from weft.errors import DataError, TaskError, TrainingError

from .batches import inputs_are_finite


def loss_of(description: Task, task: str, output: Any, target: Any) -> Tensor:
    """The task's loss, a scalar, on targets that the task can take.

    Args:
        description: head, loss and metric.
        task: the task's name, for errors.
        output: of the head.
        target: from the data.

    Returns:
        The loss.

    Raises:
        DataError: the task's check refuses the targets.
        TaskError: the loss is not one number.
    """
    if description.check is not None:
        try:
            description.check(output, target)
        except DataError as error:
            raise DataError(f"Task '{task}': {error}") from error
    loss = description.loss(output, target)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TaskError(f"The loss of '{task}' is one number, found {found}. Take its mean.")
    return loss.reshape(())


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
        self,
        batches: Mapping[str, tuple[Any, Any]],
        charge: Mapping[str, float],
        later: bool | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """``{"total": ..., "losses": {task: ...}, "penalty": ..., "refused": ...}`` of one step.

        The total is the sum of the tasks' losses and the penalty: what to differentiate.

        Args:
            batches: by task, inputs and targets.
            charge: by task of the step, the factor on its plan's penalties.
            later: for a step in portions, whether other tasks of it are still to come; the last
                portion charges for all of them.
            limits: by task, the loss over which, or without which, it counts as zero.
        """
        inputs = {task: x for task, (x, _) in batches.items()}
        if later is None:
            step = self.model.step(inputs, charge=charge)
        else:
            step = self.model.step(inputs, charge=dict.fromkeys(inputs, 0.0))
            if not later:
                step = replace(step, penalty=self.model.charges(charge))
        losses = {
            task: loss_of(self.model.tasks[task].task, task, step.outputs[task], y)
            for task, (_, y) in batches.items()
        }
        refused = {t for t, most in (limits or {}).items() if t in losses and over(losses[t], most)}
        counted = {t: self._zero(t) if t in refused else loss for t, loss in losses.items()}
        weighted = [loss * self.weights.get(task, 1.0) for task, loss in counted.items()]
        total = sum(weighted[1:], start=weighted[0]) + step.penalty
        # What is not differentiated must not look to other processes as if it were.
        losses |= {task: losses[task].detach() for task in refused}
        return {"total": total, "losses": losses, "penalty": step.penalty, "refused": refused}

    def _zero(self, task: str) -> Tensor:
        """Zero, as a loss on which all depends that trains with the task."""
        mine = self.model.task_parameters(task)
        trained = [*mine, *self.model.shared_trainable().values()]
        return torch.stack([(p * 0.0).sum() for p in trained]).sum()


def over(loss: Tensor, limit: float) -> bool:
    """Whether a loss is over a limit, or not a number."""
    return not bool(loss.detach() <= limit)


@dataclass(frozen=True)
class Figures:
    """The numbers of one step, fetched from the device at once.

    Args:
        total: what was differentiated.
        penalty: the plans' charges, over all tasks.
        losses: by task.
        refused: tasks that did not count.
    """

    total: float
    penalty: float
    losses: dict[str, float]
    refused: frozenset[str] = frozenset()


def figures_of(result: Mapping[str, Any]) -> Figures:
    """The numbers of a step's result."""
    losses: dict[str, Tensor] = result["losses"]
    total: Tensor = result["total"].detach()
    values = [total, result["penalty"], *losses.values()]
    numbers = torch.stack([v.detach().to(total.dtype) for v in values]).tolist()
    by_task = dict(zip(losses, numbers[2:], strict=True))
    return Figures(numbers[0], numbers[1], by_task, frozenset(result["refused"]))


def sum_of(portions: Sequence[Figures]) -> Figures:
    """The numbers of a step that was computed in portions."""
    losses = {task: loss for part in portions for task, loss in part.losses.items()}
    refused = frozenset[str]().union(*(part.refused for part in portions))
    return Figures(sum(p.total for p in portions), portions[-1].penalty, losses, refused)


def problem_with(figures: Figures, batches: Mapping[str, tuple[Any, Any]], step: int) -> str | None:
    """What is wrong with a step whose loss is not a number: the step, the task, what to try."""
    if math.isfinite(figures.total):
        return None
    for task, loss in figures.losses.items():
        if math.isfinite(loss):
            continue
        if not inputs_are_finite(batches[task][0]):
            return (
                f"The inputs of '{task}' at step {step} contain NaN or infinity. "
                "Clean the data; the model is back at its last complete epoch."
            )
        return (
            f"The loss of '{task}' at step {step} is {loss}. Try a lower learning rate, "
            "gradient clipping (clip=1.0), a warm-up (warmup_steps=100), or full precision; the "
            "model is back at its last complete epoch."
        )
    return (
        f"The penalty at step {step} is {figures.penalty}. Try a lower learning rate or a lower "
        "price in the plan; the model is back at its last complete epoch."
    )


def check_parameters(parameters: Iterable[Tensor], epoch: int) -> None:
    """Refuse an epoch that ended with parameters that are not numbers.

    Raises:
        TrainingError: some are NaN or infinite.
    """
    finite = torch.stack([torch.isfinite(p).all() for p in parameters])
    if not bool(finite.all()):
        raise TrainingError(
            f"Parameters are NaN or infinite after epoch {epoch + 1}. Try a lower learning rate, "
            "gradient clipping (clip=1.0) or full precision; the model is back at its last "
            "complete epoch."
        )


def check_reached(model: MultiTaskModel, tasks: Iterable[str]) -> None:
    """Refuse to train own tensors that no loss depends on.

    Raises:
        TrainingError: a task owns tensors, and after a backward none of them has a gradient.
    """
    for task in tasks:
        own = model.trainable(task)
        if own and all(p.grad is None for p in own.values()):
            raise TrainingError(
                f"None of the tensors that '{task}' owns takes part in the base's output, for "
                f"instance '{next(iter(own))}'. A base must reach its tensors through its modules: "
                "not through closures, lists of tensors or attributes outside of them."
            )
