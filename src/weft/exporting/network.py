"""What leaves: a plain network with one task baked in, and what is said about it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.core.model import MultiTaskModel
from weft.core.rows import Arguments, Output, select_output
from weft.core.sites import named_tensors
from weft.errors import PlanError


@final
class Network(nn.Module):
    """A task's folded base and its head, as one module on the CPU in eval mode.

    Args:
        base: the folded base.
        head: the head, or None for what a head would read.
        output: what heads read of the base's output.
    """

    def __init__(self, base: nn.Module, head: nn.Module | None, output: Output) -> None:
        super().__init__()
        self.base = base
        self.head = head
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The head's output, or what a head would read, with the signature of the base."""
        features = select_output(self.base(*args, **kwargs), self._output)
        return features if self.head is None else self.head(features)

    def run(self, batch: Arguments) -> Any:
        """The output for a batch as positional and keyword inputs."""
        return self(*batch[0], **batch[1])


def plain_network(model: MultiTaskModel, task: str, *, head: bool) -> Network:
    """A task as plain modules with tensors of their own.

    Args:
        model: the model; it is left alone.
        task: the task.
        head: whether the head comes along.

    Raises:
        TaskError: no such task, or its head is not built yet.
        PlanError: the task has no plain form.
    """
    chosen = model.head(task) if head else None
    if chosen is not None and model.tasks[task].task.taps:
        raise PlanError(
            f"Task '{task}' cannot leave: its head reads side sites beside the base's output, and "
            "a plain network has one output. Export what the head reads with head=False."
        )
    try:
        base = model.fold(task)
    except PlanError as error:
        raise PlanError(
            f"Task '{task}' ({model.plan(task).method}) cannot leave: {error}"
        ) from error
    return Network(base, copy.deepcopy(chosen), model.output).cpu().eval()


@final
class Choosing(nn.Module):
    """Several tasks as one module that takes each row's task as an input, ``task``, (rows,).

    Args:
        view: of the tasks.
    """

    def __init__(self, view: nn.Module) -> None:
        super().__init__()
        self.view = view

    def forward(self, *args: Any, task: Tensor, **kwargs: Any) -> Any:
        """The outputs of the tasks' heads, with the signature of the base and `task`."""
        return self.view(*args, task=task, **kwargs)


def choosing_network(model: MultiTaskModel, tasks: Sequence[str]) -> Choosing:
    """Several tasks as one module on the CPU in eval mode.

    Args:
        model: the model, on the CPU; it is left alone.
        tasks: the tasks; the module takes indices into them.

    Raises:
        TaskError: no such task.
        PlanError: the graph would depend on which rows belong to which task.
    """
    if device_of(model).type != "cpu":
        raise PlanError(
            "Several tasks leave together from a model on the CPU: model.cpu(), or a copy of it."
        )
    return Choosing(model.mixed_view(tasks)).eval()


def eager_rows(model: MultiTaskModel, tasks: Sequence[str]) -> Callable[[Arguments], Any]:
    """What the model computes for each row by itself, by the row's task."""
    alone = [eager(model, task, head=True) for task in tasks]

    def run(batch: Arguments) -> Any:
        args, kwargs = batch
        chosen = kwargs["task"].tolist()
        others = {name: value for name, value in kwargs.items() if name != "task"}
        outputs = {i: alone[i]((args, others)) for i in set(chosen)}
        return torch.stack([outputs[i][row] for row, i in enumerate(chosen)])

    return run


def eager(model: MultiTaskModel, task: str, *, head: bool) -> Callable[[Arguments], Any]:
    """What the model itself computes for a task in eval mode, whatever mode it is in.

    Args:
        model: the model; it is left alone.
        task: the task.
        head: whether to apply the head.

    Returns:
        A function of inputs on the CPU to outputs on the CPU.
    """
    view = model.view(task).eval()
    given = model.head(task) if head else None
    last = None if given is None else copy.deepcopy(given).eval()
    device = device_of(model)

    def run(batch: Arguments) -> Any:
        args, kwargs = _moved(batch, device)
        features = select_output(view(*args, **kwargs), model.output)
        return _moved(features if last is None else last(features), torch.device("cpu"))

    return run


def device_of(model: MultiTaskModel) -> torch.device:
    """Where a model's tensors are."""
    return next((t.device for _, t in named_tensors(model.base)), torch.device("cpu"))


def _moved(values: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), values)


def about(model: MultiTaskModel, task: str) -> dict[str, str]:
    """What a file says about itself: the task, its classes as a JSON list, method and base."""
    told = {
        "weft.task": task,
        "weft.method": model.plan(task).method,
        "weft.base": type(model.base).__name__,
    }
    classes = model.tasks[task].task.classes
    return told if classes is None else {**told, "weft.classes": json.dumps(classes)}


def about_tasks(model: MultiTaskModel, tasks: Sequence[str]) -> dict[str, str]:
    """The same for several tasks: their names in order, and the classes of those that have any."""
    classes = {t: c for t in tasks if (c := model.tasks[t].task.classes) is not None}
    told = {"weft.tasks": json.dumps(list(tasks)), "weft.base": type(model.base).__name__}
    return {**told, "weft.classes": json.dumps(classes)} if classes else told


def changes(model: MultiTaskModel, task: str, network: Network) -> dict[str, str]:
    """What must change in a base before it takes the tensors, if anything.

    Returns:
        Under "weft.changed" the modules that are others than the base's, by site as they print.
    """
    before = dict(model.base.named_modules())
    after = dict(network.base.named_modules())
    found: dict[str, str] = {}
    for site in sorted(model.plan(task).adapters, key=lambda s: s.count(".")):
        if site not in after or any(site.startswith(f"{outer}.") for outer in found):
            continue
        if _shape(before[site]) != _shape(after[site]):
            found[site] = " ".join(repr(after[site]).split())
    return {"weft.changed": json.dumps(found)} if found else {}


def _shape(module: nn.Module) -> tuple[type[nn.Module], list[str]]:
    return type(module), list(module.state_dict())
