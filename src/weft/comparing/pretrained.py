"""Cells whose tasks share a base that was trained on all of them first.

The trained base is what efficient joint training starts from (`weft.efficient_joint`). In a cell it
is the shared state of its tasks: a copy of all of the base, charged once for all of them.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from weft.assembly import Folder, make_plan
from weft.config import MethodSection
from weft.core.model import MultiTaskModel
from weft.core.sites import named_tensors
from weft.data import Loader, TaskData
from weft.errors import ConfigError
from weft.pretraining import pretrained_base
from weft.training.evaluation import device_of
from weft.training.schedule import phase_of_each_epoch

from .cells import LOCK, Cell
from .locks import held

FULLY_SHARED = MethodSection(name="hard_sharing", options={"own": "nothing", "batchnorm": "follow"})


def base_folder(cell: Cell) -> Folder:
    """Where the trained base of a cell is; cells of one fleet that need the same one share it."""
    return Folder(cell.folder.root.parent.parent / "bases" / cell.pretrained)


def trained_first(
    cell: Cell,
    base: nn.Module,
    sets: Mapping[str, TaskData],
    loaders: Mapping[str, Mapping[str, Loader]],
    example: Any,
    on_epoch: Callable[[int], None],
) -> nn.Module:
    """The base trained on all tasks of a cell together; it is trained by the first who needs it.

    Args:
        cell: the cell.
        base: where to start from; not changed.
        sets: by task, its data.
        loaders: by task and split.
        example: one row of inputs.
        on_epoch: called with the number of epochs that are done.

    Raises:
        ConfigError: the method adds tensors that its tasks share.
        TrainingError: too few epochs for the method's phases.
    """
    plan = make_plan(cell.experiment.method, base, example)
    if not plan.only_owns:
        raise ConfigError(
            f"pretrain: '{plan.method}' adds tensors that its tasks share, which do not go with a "
            "base that they share. Leave pretrain out."
        )
    phase_of_each_epoch(plan.phases, cell.experiment.train.epochs, plan.method)
    folder = base_folder(cell)
    experiment = cell.experiment.model_copy(update={"output": str(folder.root), "seed": cell.seed})
    with held(folder.root / LOCK, wait=True):
        trained = pretrained_base(
            experiment,
            copy.deepcopy(base),
            sets,
            loaders,
            example,
            progress=False,
            callbacks=(lambda epoch: on_epoch(epoch.number + 1),),
        )
        shutil.rmtree(folder.base.with_name("checkpoint"), ignore_errors=True)
    return trained


def seconds_before(cell: Cell) -> float:
    """How long the training of its base took, 0 if it starts from the base as it is."""
    if not cell.pretrained:
        return 0.0
    lines = base_folder(cell).base.with_name("history.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return sum(float(row["seconds"]) for row in rows if row["task"] == rows[0]["task"])


@torch.no_grad()
def over_the_base(model: MultiTaskModel, base: nn.Module) -> MultiTaskModel:
    """The same tasks in a model of the base as it is: what was trained first is what they share.

    Args:
        model: trained tasks over a base that was trained first; not to be used any more.
        base: the base as it is.
    """
    plan = make_plan(FULLY_SHARED, base, None)
    moved = MultiTaskModel(base, plan, example=model.example, output=model.output)
    moved.to(device_of(model))
    values = dict(named_tensors(model.base))
    for name, tensor in named_tensors(moved.base):
        tensor.copy_(values[name])
    for name in model.task_names:
        moved.install(name, model.tasks[name])
    return moved
