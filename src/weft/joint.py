"""Efficient joint training: one base trained on all tasks together, then frozen under each of them.

Wallingford et al., "Task Adaptive Parameter Sharing for Multi-Task Learning", CVPR 2022, section
3.4, https://arxiv.org/abs/2203.16708. Memory does not grow with the number of tasks, other than by
a head each in the first stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from weft.errors import ConfigError, PlanError, close_matches

from .bank import Bank
from .core.model import MultiTaskModel
from .core.rows import Output
from .core.sharing import Sharing
from .core.task import Task
from .methods.hard_sharing import hard_sharing
from .methods.taps import taps
from .training import History, fit
from .training.batches import TaskData

Fit = Callable[[MultiTaskModel, Mapping[str, TaskData]], History]
"""`weft.fit`, or one with other settings: ``functools.partial(weft.fit, epochs=60, lr=0.01)``."""


def pretrain(
    base: nn.Module,
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    *,
    training: Fit = fit,
    example: Any = None,
    output: Output = None,
) -> nn.Module:
    """Train all of a base on several tasks together, with a head for each: fully shared.

    Args:
        base: where to start from; never modified.
        tasks: by name.
        data: by task, as for `fit`.
        training: how; ``one_at_a_time=True`` keeps the memory of a step that of one task.
        example: as for `MultiTaskModel`.
        output: as for `MultiTaskModel`.

    Returns:
        A module of the base's class. The heads are dropped. Its running statistics are those of the
        tasks in turn, which fit none of them: give tasks normalisation of their own on it.

    Raises:
        ConfigError: tasks and data do not name the same tasks.
    """
    _check_same_names(tasks, data)
    plan = hard_sharing(base, own="nothing", batchnorm="follow")
    model = MultiTaskModel(base, plan, example=example, output=output)
    for name, task in tasks.items():
        model.add_task(name, task)
    training(model, data)
    return model.fold(next(iter(tasks))).train(base.training)


def efficient_joint(
    base: nn.Module,
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    *,
    plan: Callable[[nn.Module], Sharing] = taps,
    pretraining: Fit = fit,
    training: Fit = fit,
    bank: Bank | None = None,
    example: Any = None,
    output: Output = None,
) -> MultiTaskModel:
    """Pretrain a base on all tasks together, then train each task alone over it, frozen.

    Args:
        base: where to start from; never modified.
        tasks: by name.
        data: by task, as for `fit`.
        plan: of each task over the pretrained base.
        pretraining: how the base is trained on all tasks.
        training: how each task is trained on its own.
        bank: where each task goes once it is trained, and out of memory; default: all stay.
        example: as for `MultiTaskModel`.
        output: as for `MultiTaskModel`.

    Returns:
        The model over the pretrained base, which is its ``base``; store that as well. With a bank
        it holds no tasks; load them by ``bank.load(model.base)`` or ``bank.add_to(model, name)``.

    Raises:
        ConfigError: tasks and data do not name the same tasks.
        PlanError: the plan trains shared tensors, so that tasks could not follow each other.
    """
    if plan(base).trains_shared:
        raise PlanError(
            "In the second stage tasks follow each other over a frozen base, but this plan trains "
            "tensors that they share. Use a plan that only owns, such as weft.taps."
        )
    common = pretrain(base, tasks, data, training=pretraining, example=example, output=output)
    model = MultiTaskModel(common, plan(common), example=example, output=output)
    for name, task in tasks.items():
        model.add_task(name, task)
        training(model, {name: data[name]})
        if bank is not None:
            bank.save(model, name)
            model.remove_task(name)
    return model


def _check_same_names(tasks: Mapping[str, Task], data: Mapping[str, TaskData]) -> None:
    for name in [*tasks, *data]:
        if name not in tasks or name not in data:
            lacks, known = ("data", data) if name in tasks else ("task", tasks)
            raise ConfigError(f"'{name}' has no {lacks}.{close_matches(name, known)}")
    if not tasks:
        raise ConfigError("Give at least one task with its data: {name: task}, {name: batches}.")
