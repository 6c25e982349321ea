"""Task vectors: what a task uses, minus the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.errors import PlanError, TaskError, WeftError, close_matches

Vector = dict[str, Tensor]
"""By name, the change of each floating-point tensor of the base; one name for tied ones."""


@dataclass(frozen=True)
class Base:
    """The tensors of a base that merging changes.

    Args:
        parameters: floating-point parameters by name.
        statistics: floating-point buffers by name, for instance running statistics.
    """

    parameters: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor]


def base_of(model: MultiTaskModel) -> Base:
    """The tensors of a model's base; whole numbers are left out, and stay the base's."""
    trained = {name for name, _ in model.base.named_parameters()}
    found = {n: t.detach() for n, t in named_tensors(model.base) if t.is_floating_point()}
    return Base(
        {name: tensor for name, tensor in found.items() if name in trained},
        {name: tensor for name, tensor in found.items() if name not in trained},
    )


def check_tasks(model: MultiTaskModel, tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks to merge, if they can be.

    Raises:
        TaskError: one is unknown or named twice, or there is none.
    """
    for name in tasks:
        if name not in model.task_names:
            raise TaskError(
                f"There is no task '{name}' to merge. Tasks: {', '.join(model.task_names)}."
                + close_matches(name, model.task_names)
            )
    if len(set(tasks)) < len(tasks):
        raise TaskError(f"Tasks are named twice: {', '.join(tasks)}. Name each once.")
    if not tasks:
        raise TaskError("There is no task to merge. Name at least one.")
    return tuple(tasks)


def task_vectors(
    model: MultiTaskModel, tasks: Sequence[str], base: Base
) -> Iterator[tuple[str, Vector]]:
    """The vectors of tasks, one at a time, parameters and statistics together.

    What adapters add is folded into the weights beside them.

    Args:
        model: holds the tasks.
        tasks: their names.
        base: of the model.

    Raises:
        PlanError: a task has no plain form of the base's class.
    """
    start = {**base.parameters, **base.statistics}
    for name in tasks:
        try:
            plain = dict(named_tensors(model.fold(name)))
        except WeftError as error:
            raise PlanError(f"'{name}' cannot be merged: {error}") from error
        added = [key for key in plain if key not in dict(named_tensors(model.base))]
        if added:
            raise PlanError(
                f"'{name}' cannot be merged: folding it adds tensors that the base does not have, "
                f"first '{added[0]}'. Merge tasks that change the base's own tensors."
            )
        with torch.no_grad():
            yield name, {key: plain[key].detach() - tensor for key, tensor in start.items()}
