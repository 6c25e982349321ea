"""Scores of tasks on data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric as TorchMetric

from weft.core.model import MultiTaskModel
from weft.core.rows import count_rows
from weft.core.task import Metric
from weft.errors import DataError, TaskError

from .batches import Loader, inputs_are_finite, split_batch, to_device
from .randomness import caller_keeps_randomness
from .step import loss_of

Scores = dict[str, float]


def evaluate(model: MultiTaskModel, data: Mapping[str, Loader]) -> dict[str, Scores]:
    """The metrics and the mean loss of each task, in eval mode, without changing anything.

    Modes and random number generators are put back afterwards. Where several processes run, each
    sees all of the data.

    Args:
        model: the model.
        data: by task, batches ``(x, y)``.

    Returns:
        ``{task: {metric: value, "loss": value}}``, the metric that chooses the best epoch first.

    Raises:
        TaskError: an unknown task, one whose head is not built yet, or a metric that is not one
            number.
        DataError: no data, or targets that the task cannot take.
    """
    for task in data:
        model.head(task)  # an unknown or unfinished task is refused before any work
    device = device_of(model)
    scores: dict[str, Scores] = {}
    with modes_kept(model), torch.no_grad():
        model.eval()
        for task, loader in data.items():
            with caller_keeps_randomness(device):
                scores[task] = _evaluate_task(model, task, loader, device)
    return scores


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's mode back at the end of the block; new ones get that of the whole."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])


def _evaluate_task(
    model: MultiTaskModel, task: str, loader: Loader, device: torch.device
) -> Scores:
    description = model.tasks[task].task
    metrics = {name: _fresh(metric, device) for name, metric in description.metrics.items()}
    total, count = 0.0, 0
    for batch in loader:
        x, y = to_device(split_batch(batch, task), device)
        if not inputs_are_finite(x):
            raise DataError(
                f"The inputs of '{task}' contain NaN or infinity. Clean the data before evaluating."
            )
        rows = count_rows((x,), {})
        output = model.step({task: x}, charge={task: 0.0}).outputs[task]
        total += float(loss_of(description, task, output, y)) * rows
        count += rows
        for metric in metrics.values():
            metric.update(output, y)
    if count == 0:
        raise DataError(f"The data of '{task}' is empty: there is nothing to evaluate.")
    scores = {name: _value(task, name, metric.compute()) for name, metric in metrics.items()}
    return {**scores, "loss": total / count}


def _fresh(metric: Metric, device: torch.device) -> Metric:
    fresh = copy.deepcopy(metric)
    fresh.reset()
    if not isinstance(fresh, nn.Module):
        return fresh
    for module in fresh.modules():
        if isinstance(module, TorchMetric):
            # Every process sees all of the data, so nothing is to be added up over processes.
            module.sync_on_compute = False
    return fresh.to(device)


def _value(task: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"Metric '{name}' of '{task}' computes one number, found {type(value).__name__} "
            f"({error}). Average it, or give several metrics by name."
        ) from error
    if math.isinf(number):
        raise DataError(
            f"Metric '{name}' of '{task}' is infinite. Check the targets and the outputs."
        )
    return number


def device_of(model: MultiTaskModel) -> torch.device:
    """Where the model's tensors are."""
    tensor = next(iter(model.parameters()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def score_of(model: MultiTaskModel, task: str, scores: Scores) -> float:
    """What chooses the task's best epoch, larger is better: its first metric, else its loss."""
    for name, metric in model.tasks[task].task.metrics.items():
        # torchmetrics' metrics say which way is better; larger is, if a metric says nothing.
        lower = getattr(metric, "higher_is_better", True) is False
        return -scores[name] if lower else scores[name]
    return -scores["loss"]
