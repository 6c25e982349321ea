"""Forwards of tasks in memory, over the models of all shared states that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.rows import Arguments, Rows, select_rows
from weft.core.subset import subset

from .residency import Resident

Residents = Mapping[str, Resident]
Context = Mapping[str, Any] | None


def run(model: MultiTaskModel, batch: Arguments, task: Rows, context: Context) -> Any:
    """A call of a model with arguments that were taken apart before."""
    args, named = batch
    if args:
        return model(*args, task=task, context=context, **named)
    return model(named, task=task, context=context)  # inputs of any name, also "task"


def model_of(residents: Residents) -> MultiTaskModel:
    """A model with these tasks, which have one shared state."""
    states = {name: resident.state for name, resident in residents.items()}
    return subset(next(iter(residents.values())).model, states)


def row_by_row(
    residents: Residents, batch: Arguments, names: Sequence[str], context: Context
) -> Any:
    """The outputs of rows of different tasks, in row order.

    Args:
        residents: by name, the tasks; at least one.
        batch: the inputs of the base, rows first.
        names: of the rows' tasks.
        context: handed to adapters.

    Returns:
        As a call of the model with a task per row.
    """
    parts = _by_state(residents)
    if len(parts) == 1:
        return run(model_of(residents), batch, names, context)
    rows: list[Any] = [None] * len(names)
    for tasks in parts:
        places = [i for i, name in enumerate(names) if name in tasks]
        part = select_rows(batch, places, len(names))
        mine = [names[i] for i in places]
        found = run(model_of(tasks), part, mine, context)
        for place, row in zip(places, found, strict=True):
            rows[place] = row
    kinds = {(r.shape, r.dtype) if isinstance(r, Tensor) else None for r in rows}
    return torch.stack(rows) if len(kinds) == 1 and None not in kinds else rows


def every_task(residents: Residents, batch: Arguments, context: Context) -> dict[str, Any]:
    """Each task's output on the same input.

    Args:
        residents: by name, the tasks.
        batch: the inputs of the base.
        context: handed to adapters.
    """
    args, named = batch if batch[0] else ((batch[1],), {})
    outputs: dict[str, Any] = {}
    for tasks in _by_state(residents):
        outputs |= model_of(tasks).predict_all(*args, context=context, **named)
    return outputs


def _by_state(residents: Residents) -> list[dict[str, Resident]]:
    """Tasks that run on one model, together."""
    parts: dict[int, dict[str, Resident]] = {}
    for name, resident in residents.items():
        parts.setdefault(id(resident.model), {})[name] = resident
    return list(parts.values())
