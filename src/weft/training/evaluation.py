"""Scores of tasks on data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric as TorchMetric

from weft.core.model import MultiTaskModel, check_model
from weft.core.rows import count_rows
from weft.core.task import Metric
from weft.errors import DataError, TaskError

from .batches import Loader, Source, inputs_are_finite, sources, to_device
from .loaders import loaders_by_task
from .randomness import caller_keeps_randomness
from .step import loss_of

Scores = dict[str, float]


def evaluate(model: MultiTaskModel, data: Mapping[str, Loader] | Loader) -> dict[str, Scores]:
    """The metrics and the mean loss of each task, in eval mode, without changing anything.

    Modes and random number generators are put back afterwards. Where several processes run, each
    sees all of the data.

    Args:
        model: the model.
        data: by task, batches ``(x, y)``; or, without a dict, batches ``(x, {task: y})`` for all
            tasks of the model.

    Returns:
        ``{task: {metric: value, "loss": value}}``, the metric that chooses the best epoch first.

    Raises:
        TaskError: an unknown task, one whose head is not built yet, or a metric that is not one
            number.
        DataError: no data, or targets that the task cannot take.
        ConfigError: this is no model.
    """
    check_model("evaluate", model)
    loaders = loaders_by_task(data, model.task_names)
    for task in loaders:
        model.head(task)  # an unknown or unfinished task is refused before any work
    device = device_of(model)
    scores: dict[str, Scores] = {}
    with modes_kept(model), torch.no_grad():
        model.eval()
        for source in sources(loaders):
            with caller_keeps_randomness(device):
                scores |= _evaluate_source(model, source, device)
    return {task: scores[task] for task in loaders}


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's mode back at the end of the block; new ones get that of the whole."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])


def _evaluate_source(
    model: MultiTaskModel, source: Source, device: torch.device
) -> dict[str, Scores]:
    """The scores of tasks whose batches are read at once."""
    tasks = {task: model.tasks[task].task for task in source.tasks}
    metrics = {
        task: {name: _fresh(metric, device) for name, metric in description.metrics.items()}
        for task, description in tasks.items()
    }
    totals, count = dict.fromkeys(tasks, 0.0), 0
    for given in source:
        batches = to_device(given, device)
        x, _ = next(iter(batches.values()))
        if not inputs_are_finite(x):
            raise DataError(
                f"The inputs of '{source.tasks[0]}' contain NaN or infinity. Clean the data before "
                "evaluating."
            )
        rows = count_rows((x,), {})
        count += rows
        inputs = {task: x for task, (x, _) in batches.items()}
        outputs = model.step(inputs, charge=dict.fromkeys(inputs, 0.0)).outputs
        for task, (_, y) in batches.items():
            totals[task] += float(loss_of(tasks[task], task, outputs[task], y)) * rows
            for metric in metrics[task].values():
                metric.update(outputs[task], y)
    if count == 0:
        raise DataError(f"The data of '{source.tasks[0]}' is empty: there is nothing to evaluate.")
    return {
        task: {
            **{name: _value(task, name, m.compute()) for name, m in metrics[task].items()},
            "loss": totals[task] / count,
        }
        for task in tasks
    }


def _fresh(metric: Metric, device: torch.device) -> Metric:
    fresh = copy.deepcopy(metric)
    fresh.reset()
    if not isinstance(fresh, nn.Module):
        return fresh
    for module in fresh.modules():
        if isinstance(module, TorchMetric):
            # Every process sees all of the data, so nothing is to be added up over processes.
            # Its own option for that, sync_on_compute, is read only when a metric is made.
            module.distributed_available_fn = _alone
    return fresh.to(device)


def _alone() -> bool:
    return False


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


def choosing_scores(model: MultiTaskModel, scores: Mapping[str, Scores]) -> dict[str, float]:
    """What chooses the best epoch of each task, larger is better: its first metric, else its loss.

    Args:
        model: the model.
        scores: of some of its tasks, as `evaluate` gives them.

    Returns:
        By task, the score, negative where smaller is better.
    """
    return {task: sign * scores[task][name] for task, (name, sign) in _choosing(model, scores)}


def together_scores(
    model: MultiTaskModel, scores: Mapping[str, Scores], weights: Mapping[str, float]
) -> dict[str, float]:
    """The same for tasks that stand and fall together, so that a mean over them means something.

    Where the tasks have different metrics, what was trained for: their losses, weighted.

    Args:
        model: the model.
        scores: of some of its tasks, as `evaluate` gives them.
        weights: by task, the factor on its loss in training; default 1.

    Returns:
        By task, a number, larger is better.
    """
    if len(set(dict(_choosing(model, scores)).values())) <= 1:
        return choosing_scores(model, scores)
    return {task: -weights.get(task, 1.0) * values["loss"] for task, values in scores.items()}


def _choosing(
    model: MultiTaskModel, tasks: Iterable[str]
) -> Iterator[tuple[str, tuple[str, float]]]:
    """By task, the name of what chooses its best epoch, and -1 if smaller is better, else 1."""
    for task in tasks:
        for name, metric in model.tasks[task].task.metrics.items():
            # torchmetrics' metrics say which way is better; larger is, if a metric says nothing.
            yield task, (name, -1.0 if getattr(metric, "higher_is_better", True) is False else 1.0)
            break
        else:
            yield task, ("loss", -1.0)
