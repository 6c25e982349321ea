"""Forwards of tasks in memory, over the models of all shared states that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.core.model import MultiTaskModel
from weft.core.rows import Arguments, Rows, select_rows

from .loading import TaskLoader
from .residency import Resident

Residents = Mapping[str, Resident]
Context = Mapping[str, Any] | None


def run(model: MultiTaskModel, batch: Arguments, task: Rows, context: Context) -> Any:
    """A call of a model with arguments that were taken apart before."""
    args, named = batch
    if args:
        return model(*args, task=task, context=context, **named)
    return model(named, task=task, context=context)  # inputs of any name, also "task"


def row_by_row(
    loader: TaskLoader,
    residents: Residents,
    batch: Arguments,
    names: Sequence[str],
    context: Context,
) -> Any:
    """The outputs of rows of different tasks, in row order.

    Args:
        loader: has the models.
        residents: by name, the tasks.
        batch: the inputs of the base, rows first.
        names: of the rows' tasks.
        context: handed to adapters.

    Returns:
        As a call of the model with a task per row.
    """
    groups: dict[str | None, list[int]] = {}
    for i, name in enumerate(names):
        groups.setdefault(residents[name].shared, []).append(i)
    if len(groups) < 2:
        return run(loader.model(residents), batch, names, context)
    rows: list[Any] = [None] * len(names)
    for shared, places in groups.items():
        part = select_rows(batch, places, len(names))
        mine = [names[i] for i in places]
        found = run(loader.model(_of_state(residents, shared)), part, mine, context)
        for place, row in zip(places, found, strict=True):
            rows[place] = row
    kinds = {(r.shape, r.dtype) if isinstance(r, Tensor) else None for r in rows}
    return torch.stack(rows) if len(kinds) == 1 and None not in kinds else rows


def every_task(
    loader: TaskLoader, residents: Residents, batch: Arguments, context: Context
) -> dict[str, Any]:
    """Each task's output on the same input.

    Args:
        loader: has the models.
        residents: by name, the tasks.
        batch: the inputs of the base.
        context: handed to adapters.
    """
    args, named = batch if batch[0] else ((batch[1],), {})
    outputs: dict[str, Any] = {}
    for shared in dict.fromkeys(resident.shared for resident in residents.values()):
        model = loader.model(_of_state(residents, shared))
        outputs |= model.predict_all(*args, context=context, **named)
    return outputs


def _of_state(residents: Residents, shared: str | None) -> dict[str, Resident]:
    return {name: resident for name, resident in residents.items() if resident.shared == shared}
