"""Some tasks of a model as a model of their own, made for one call."""

from __future__ import annotations

from collections.abc import Mapping

from .model import MultiTaskModel
from .state import TaskState, TaskTable


def subset(model: MultiTaskModel, states: Mapping[str, TaskState]) -> MultiTaskModel:
    """A model that has these tasks and everything else in common with another one.

    It costs nothing, and no forward sees tasks come and go: calls in several threads have a model
    each, on the same base and the same structures.

    Args:
        model: the model; it is left alone.
        states: by name, the tasks.
    """
    table = TaskTable()
    for name, state in states.items():
        table.add(name, state)
    made = MultiTaskModel.__new__(MultiTaskModel)
    made.__dict__.update(model.__dict__)
    made.__dict__["_modules"] = {**model._modules, "tasks": table}
    return made
