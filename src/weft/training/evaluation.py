"""Scores of tasks on data."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric as TorchMetric

from weft.core.model import MultiTaskModel
from weft.core.task import Metric
from weft.errors import DataError

from .batches import Loader, split_batch, to_device

Scores = dict[str, float]


def evaluate(model: MultiTaskModel, data: Mapping[str, Loader]) -> dict[str, Scores]:
    """The metrics and the mean loss of each task, in eval mode, without changing anything.

    Args:
        model: the model; its mode is restored afterwards.
        data: by task, batches ``(x, y)``.

    Returns:
        ``{task: {metric: value, "loss": value}}``, the metric that chooses the best epoch first.

    Raises:
        TaskError: an unknown task.
        DataError: no data, or targets that the task cannot take.
    """
    for task in data:
        model.plan(task)  # an unknown task is refused before any work
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return {task: _evaluate_task(model, task, loader) for task, loader in data.items()}
    finally:
        model.train(was_training)


def _evaluate_task(model: MultiTaskModel, task: str, loader: Loader) -> Scores:
    device = device_of(model)
    description = model.tasks[task].task
    metrics = {name: _fresh(metric, device) for name, metric in description.metrics.items()}
    total, count = 0.0, 0
    for batch in loader:
        x, y = to_device(split_batch(batch, task), device)
        output = model.step({task: x}, charge={task: 0.0}).outputs[task]
        if description.check is not None:
            description.check(output, y)
        rows = len(y)
        total += float(description.loss(output, y)) * rows
        count += rows
        for metric in metrics.values():
            metric.update(output, y)
    if count == 0:
        raise DataError(f"The data of '{task}' is empty: there is nothing to evaluate.")
    scores = {name: _value(name, metric.compute()) for name, metric in metrics.items()}
    return {**scores, "loss": total / count}


def _fresh(metric: Metric, device: torch.device) -> Metric:
    fresh = copy.deepcopy(metric)
    fresh.reset()
    if isinstance(fresh, TorchMetric):
        # Every process sees all of the data, so nothing is to be added up over processes.
        fresh.sync_on_compute = False
    return fresh.to(device) if isinstance(fresh, nn.Module) else fresh


def _value(name: str, value: Any) -> float:
    number = float(value)
    if math.isinf(number):
        raise DataError(f"Metric '{name}' is infinite. Check the targets and the outputs.")
    return number


def device_of(model: MultiTaskModel) -> torch.device:
    """Where the model's tensors are."""
    tensor = next(iter(model.base.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def higher_is_better(metric: Metric) -> bool:
    """Whether larger values are better; torchmetrics' metrics say so themselves."""
    return getattr(metric, "higher_is_better", True) is not False
