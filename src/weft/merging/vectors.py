"""Task vectors: what a task uses, minus the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.errors import PlanError, WeftError

Vector = dict[str, Tensor]
"""By name, the change of each tensor of real or complex numbers; one name for tied ones."""


@dataclass(frozen=True)
class Base:
    """The tensors of a base that merging changes.

    Args:
        parameters: those of real or complex numbers, by name.
        statistics: likewise buffers, for instance running statistics.
    """

    parameters: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]


def base_of(model: MultiTaskModel) -> Base:
    """The tensors of a model's base; whole numbers are left out, and stay the base's.

    Raises:
        PlanError: there are none.
    """
    trained = {name for name, _ in model.base.named_parameters()}
    found = {
        n: t.detach()
        for n, t in named_tensors(model.base)
        if t.is_floating_point() or t.is_complex()
    }
    base = Base(
        {name: tensor for name, tensor in found.items() if name in trained},
        {name: tensor for name, tensor in found.items() if name not in trained},
    )
    if not base.parameters:
        raise PlanError("The base has no floating-point parameters: there is nothing to merge.")
    return base


def refuse_complex(base: Base, how: str) -> None:
    """Refuse complex numbers, which no rule that ranks or masks entries is made for.

    Raises:
        PlanError: names the first tensor.
    """
    for name, tensor in (*base.parameters.items(), *base.statistics.items()):
        if tensor.is_complex():
            raise PlanError(
                f"{how} merges real numbers, and '{name}' of the base is complex. Take "
                "how='average' or 'task_arithmetic'."
            )


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision, where sums over tasks lose digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def task_tensors(model: MultiTaskModel, task: str, base: Base) -> Vector:
    """What a task uses in the place of each tensor of the base.

    What adapters add is folded into the weights beside them.

    Args:
        model: holds the task.
        task: its name.
        base: of the model.

    Raises:
        PlanError: the task has no plain form of the base's class.
    """
    try:
        plain = dict(named_tensors(model.fold(task)))
    except WeftError as error:
        raise PlanError(f"'{task}' cannot be merged: {error}") from error
    known = dict(named_tensors(model.base))
    for these, those, what in ((plain, known, "adds"), (known, plain, "drops")):
        if apart := [name for name in these if name not in those]:
            raise PlanError(
                f"'{task}' cannot be merged: folding it {what} tensors, first '{apart[0]}'. Merge "
                "tasks that only change the base's own tensors."
            )
    return {name: plain[name].detach() for name in (*base.parameters, *base.statistics)}


def task_vectors(
    model: MultiTaskModel, tasks: Sequence[str], base: Base
) -> Iterator[tuple[str, Vector]]:
    """The vectors of tasks, one at a time, parameters and statistics together.

    Args:
        model: holds the tasks.
        tasks: their names.
        base: of the model.

    Returns:
        Names and vectors, in float32 where the base is in half precision.

    Raises:
        PlanError: as for `task_tensors`.
    """
    start = {**base.parameters, **base.statistics}
    for task in tasks:
        own = task_tensors(model, task, base)
        yield task, {name: _change(own[name], tensor) for name, tensor in start.items()}


def _change(after: Tensor, before: Tensor) -> Tensor:
    """Their difference; 0 where they agree, also at infinity, as in a mask of attention."""
    return torch.where(after == before, 0.0, precise(after) - precise(before))
