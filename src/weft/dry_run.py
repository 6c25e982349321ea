"""What the tasks of an experiment would own, before any training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .assembly import (
    first_rows,
    load_experiment_base,
    make_loaders,
    make_plan,
    needs_example,
    read_task,
)
from .config import Experiment, MethodSection
from .core.ledger import Ledger
from .core.model import MultiTaskModel
from .errors import WeftError
from .tasks import task_from_spec
from .training.schedule import phase_of_each_epoch


@dataclass(frozen=True)
class PlannedTask:
    """What a task would own, before any training.

    Args:
        name: the task.
        method: its plan's method.
        ledger: what it would own at the start; gates that close later own less.
        own: by tensor, the own elements.
        refused: sites that the method leaves out, with the reason.
        problem: why the method cannot be used on this base, or "".
        options: of the method.
    """

    name: str
    method: str
    ledger: Ledger | None
    own: Mapping[str, int]
    refused: Mapping[str, str]
    problem: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def most_bytes(self) -> int | None:
        """What it can own in the end, with the budget of the method if it has one; without head."""
        budget, ledger = self.options.get("budget"), self.ledger
        if budget is None or ledger is None:
            return None if ledger is None else ledger.own_bytes
        if budget > 1:
            return min(int(budget), ledger.own_bytes)
        spared = ledger.own_parameters - math.floor(budget * ledger.base_parameters)
        size = sum(row.own_bytes for row in ledger.rows if not row.buffer)
        each = size / max(ledger.own_parameters, 1)
        return ledger.own_bytes - int(max(0.0, spared * each))


def dry_run(experiment: Experiment) -> list[PlannedTask]:
    """What every task would own: each tensor hit, its size, and each refusal with its reason."""
    base, stated = load_experiment_base(experiment)
    example = None
    if any(map(needs_example, _methods(experiment))):
        first = next(iter(experiment.tasks))
        loaders = make_loaders(experiment, first, read_task(experiment, first), stated)
        example = first_rows({first: loaders})
    planned = []
    for name, section in experiment.tasks.items():
        chosen = section.method or experiment.method
        try:
            common = make_plan(experiment.method, base, example)
            model = MultiTaskModel(base, common)
            apart = section.method
            sharing = common if apart is None else make_plan(apart, base, example)
            model.add_task(name, task_from_spec({"kind": "regression"}), sharing=sharing)
            phase_of_each_epoch(sharing.phases, experiment.train.epochs, sharing.method)
        except WeftError as error:
            planned.append(PlannedTask(name, chosen.name, None, {}, {}, str(error), chosen.options))
            continue
        ledger = model.ledger(name)
        own = {row.tensor: row.own for row in ledger.rows if row.own}
        planned.append(
            PlannedTask(name, chosen.name, ledger, own, sharing.refused, options=chosen.options)
        )
    return planned


def _methods(experiment: Experiment) -> list[MethodSection]:
    own = [section.method for section in experiment.tasks.values() if section.method is not None]
    return [experiment.method, *own]
